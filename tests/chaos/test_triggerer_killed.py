"""A triggerer dies or stands still in the middle of a drain: nothing is lost, nothing is recorded twice."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import psutil
import pytest

from local.processes import GuardedProcess
from tests.support.stack import LEASE_SECONDS, Solving, say, wait_for, wait_until

pytestmark = [pytest.mark.airflow, pytest.mark.alone, pytest.mark.timeout(180)]

RESUME_SECONDS = LEASE_SECONDS + 5.0
SECOND = "triggerer-2"
FAST = "20/s"  # to see the end of a backlog soon
COUNT = "SELECT count(*) FROM model_calls WHERE"


def test_a_killed_triggerer_is_followed_by_the_next(solving: Solving) -> None:
    _start(solving, 800)
    known = _triggerers(solving)
    solving.stack.process("triggerer").kill()
    killed = time.monotonic()
    solving.stack.restart("triggerer")
    up = _until_up(solving, known)
    resumed = _resumed(solving, killed + 1)
    say(f"up {up - killed:.1f} s after the kill, sending again {resumed - killed:.1f} s after it")
    assert resumed - up <= RESUME_SECONDS
    solving.set_targets(FAST)
    solving.until_drained(60)
    solving.assert_nothing_lost_or_doubled()


@pytest.fixture
def second(solving: Solving) -> Iterator[GuardedProcess]:
    """One more triggerer, gone when the test is over; the first one runs then."""
    known = _triggerers(solving)
    part = solving.stack.add_triggerer(SECOND)
    _until_up(solving, known)
    yield part
    if part.running:
        part.kill()
    del solving.stack._parts[SECOND]  # it has ended on purpose: no reason to call the stack unwell


def test_a_triggerer_that_stood_still_is_fenced_off_and_a_killed_one_is_replaced(
    solving: Solving, second: GuardedProcess
) -> None:
    _start(solving, 1500)
    stopped = _stop(solving.stack.process("triggerer"))
    stood_still = time.monotonic()
    resumed = _resumed(solving, stood_still + 1)
    say(f"stood still: the other sends {resumed - stood_still:.1f} s later")
    lost = f"{COUNT} outcome = 'lost' AND finished_at > now() - interval '1 minute'"
    wait_until(lambda: solving.value(lost) > 0, 30, "the claims of the one that stands still are released")
    for process in stopped:
        process.send_signal(signal.SIGCONT)
    woke = time.monotonic()
    solving.until_all_send(woke, 30)

    solving.stack.process(SECOND).kill()
    killed = time.monotonic()
    resumed = _resumed(solving, killed + 1)
    refused = solving.value(f"{COUNT} late AND settlement = 'superseded'")
    say(f"killed: the first one sends {resumed - killed:.1f} s later; late answers refused: {refused}")
    assert resumed - killed <= RESUME_SECONDS
    solving.set_targets(FAST)
    solving.until_drained(60)
    solving.assert_nothing_lost_or_doubled()


def _start(solving: Solving, tasks: int) -> None:
    began = time.monotonic()
    solving.insert(tasks)
    solving.until_all_send(began, 60)


def _stop(part: GuardedProcess) -> list[psutil.Process]:
    """Let the triggerer and the process that runs its triggers stand still."""
    supervisor = psutil.Process(part.pid)
    processes = [supervisor, *supervisor.children(recursive=True)]
    for process in processes:
        os.kill(process.pid, signal.SIGSTOP)
    return processes


def _triggerers(solving: Solving) -> set[int]:
    """The ids under which triggerers ever reported to Airflow."""
    jobs = solving.api.call("GET", "/jobs", params={"job_type": "TriggererJob", "limit": 100})["jobs"]
    return {job["id"] for job in jobs}


def _until_up(solving: Solving, known: set[int]) -> float:
    """When one more triggerer than the `known` reported to Airflow."""
    return wait_for(
        lambda: time.monotonic() if _triggerers(solving) - known else None, 60, "the triggerer is up"
    )


def _resumed(solving: Solving, since: float) -> float:
    """When every model had been sent something after `since`."""
    solving.until_all_send(since, 60)
    return max(solving.arrived(since, model)[0] for model in solving.models)
