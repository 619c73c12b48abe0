"""A triggerer is killed or stopped while tasks are solved: nothing is lost or recorded twice."""

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
FAST = "20/s"  # drains the backlog soon
COUNT = "SELECT count(*) FROM model_calls WHERE"


def test_killed_triggerer_is_replaced_after_a_restart(solving: Solving) -> None:
    _start(solving, 800)
    known = _triggerers(solving)
    solving.stack.process("triggerer").kill()
    killed = time.monotonic()
    solving.stack.restart("triggerer")
    up = _until_up(solving, known)
    resumed = _resumed(solving, killed + 1)
    say(f"running {up - killed:.1f} s after the kill, sending {resumed - killed:.1f} s after it")
    assert resumed - up <= RESUME_SECONDS
    solving.set_targets(FAST)
    solving.until_drained(60)
    solving.assert_nothing_lost_or_doubled()


@pytest.fixture
def second(solving: Solving) -> Iterator[GuardedProcess]:
    """A second triggerer, removed after the test."""
    known = _triggerers(solving)
    part = solving.stack.add_triggerer(SECOND)
    _until_up(solving, known)
    yield part
    if part.running:
        part.kill()
    del solving.stack._processes[SECOND]  # stopped on purpose: the stack is still healthy


def test_stopped_triggerer_is_fenced_off_and_a_killed_one_is_replaced(
    solving: Solving, second: GuardedProcess
) -> None:
    _start(solving, 1500)
    stopped = _stop(solving.stack.process("triggerer"))
    stopped_at = time.monotonic()
    resumed = _resumed(solving, stopped_at + 1)
    say(f"stopped: the other sends {resumed - stopped_at:.1f} s later")
    lost = f"{COUNT} outcome = 'lost' AND finished_at > now() - interval '1 minute'"
    wait_until(lambda: solving.value(lost) > 0, 30, "the claims of the stopped triggerer are released")
    for process in stopped:
        process.send_signal(signal.SIGCONT)
    woke = time.monotonic()
    solving.until_all_send(woke, 30)

    solving.stack.process(SECOND).kill()
    killed = time.monotonic()
    resumed = _resumed(solving, killed + 1)
    refused = solving.value(f"{COUNT} late AND settlement = 'superseded'")
    say(f"killed: the first one sends {resumed - killed:.1f} s later; late answers rejected: {refused}")
    assert resumed - killed <= RESUME_SECONDS
    solving.set_targets(FAST)
    solving.until_drained(60)
    solving.assert_nothing_lost_or_doubled()


def _start(solving: Solving, tasks: int) -> None:
    began = time.monotonic()
    solving.insert(tasks)
    solving.until_all_send(began, 60)


def _stop(part: GuardedProcess) -> list[psutil.Process]:
    """Stops the triggerer and the process that runs its triggers (SIGSTOP)."""
    supervisor = psutil.Process(part.pid)
    processes = [supervisor, *supervisor.children(recursive=True)]
    for process in processes:
        os.kill(process.pid, signal.SIGSTOP)
    return processes


def _triggerers(solving: Solving) -> set[int]:
    """Returns the ids of all triggerer jobs that Airflow knows."""
    jobs = solving.api.call("GET", "/jobs", params={"job_type": "TriggererJob", "limit": 100})["jobs"]
    return {job["id"] for job in jobs}


def _until_up(solving: Solving, known: set[int]) -> float:
    """Waits for a triggerer that is not `known`; returns when it reported to Airflow."""
    return wait_for(
        lambda: time.monotonic() if _triggerers(solving) - known else None, 60, "the triggerer is running"
    )


def _resumed(solving: Solving, since: float) -> float:
    """Waits until every model got a call after `since`; returns the time of the last first call."""
    solving.until_all_send(since, 60)
    return max(solving.arrived(since, model)[0] for model in solving.models)
