"""solve_tasks end to end: Postgres, Redis, a backend, and Airflow's own scheduler, triggerer and REST API.

After each test, every rolling window of the sends that reached the backend is checked against its limit.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence

import pytest

from bench.judge import TargetChange, print_verdict
from router.models.roster import sync_roster
from router.settings.router import load_config
from router.traffic import TrafficTarget
from tests.support.stack import (
    DAG,
    IDLE_LEAVE_SECONDS,
    NEWCOMER,
    Edit,
    Solving,
    crowding,
    say,
    spread,
    wait_for,
    wait_until,
)

pytestmark = [pytest.mark.airflow, pytest.mark.alone, pytest.mark.timeout(180)]

LOW, HIGH = "2/s", "8/s"
FAST = "20/s"  # to see the end of a backlog soon
ROUNDS = 5
OBSERVED_SECONDS = 1.6  # after each round of edits
JITTER = 0.8  # a pair of arrivals this much closer than a gap is not the gap's jitter
PAUSE_SECONDS = 2.0
NEWCOMER_ENTRY = (
    f"models:\n  {NEWCOMER}:\n    target: 4/s\n    ranks: {{technical: 5, creative: 5, general: 5}}\n"
)


def test_a_backlog_is_solved_once_and_within_every_target(solving: Solving) -> None:
    inserted = time.monotonic()
    solving.insert(280)
    solving.until_all_send(inserted, 60)
    all_send = time.monotonic()
    solving.until_drained(60)
    end = max(arrival.at for arrival in solving.arrivals)

    solving.assert_nothing_lost_or_doubled()
    verdict = solving.judged(all_send, end - 1.0)
    print_verdict(verdict)
    used = [model.use for model in verdict.models.values() if model.use is not None]
    say(f"all at work {all_send - inserted:.1f} s after the INSERT; use {min(used):.1%} to {max(used):.1%}")
    assert verdict.breach_count == 0
    assert sum(used) / len(used) > 0.9 / crowding()


def test_fifty_edits_hold_within_a_second(solving: Solving) -> None:
    lines = dict(zip(solving.models, itertools.cycle([LOW, HIGH]), strict=False))
    for model, line in lines.items():
        solving.set_target(model, line)
    began = time.monotonic()
    solving.insert(2000)
    solving.until_all_send(began, 60)
    edits: list[Edit] = []
    for _ in range(ROUNDS):
        for model, line in lines.items():
            lines[model] = HIGH if line == LOW else LOW
            edits.append(solving.set_target(model, lines[model]))
        time.sleep(OBSERVED_SECONDS)  # what is measured is what arrives meanwhile
    end = time.monotonic()
    solving.stop_backlog()

    ends = dict.fromkeys(lines, end)
    seconds: dict[str, list[float]] = {LOW: [], HIGH: []}
    for edit in reversed(edits):
        seconds[edit.line].append(
            _until_active(edit, solving.arrived(edit.began - 5, edit.model), ends[edit.model])
        )
        ends[edit.model] = edit.began
    everything = seconds[LOW] + seconds[HIGH]
    say(
        f"{len(edits)} edits: {spread(everything)}; up: {spread(seconds[HIGH])}; down: {spread(seconds[LOW])}"
    )
    assert len(edits) == 50
    assert max(everything) <= 1.0


def _until_active(edit: Edit, arrived: Sequence[float], until: float) -> float:
    """Seconds from the edit's return until the arrivals follow it.

    Of a raise: until the first that the old target's gap would have delayed. Of a lowering: until the last
    that the new target's gap should have delayed.
    """
    slow_gap = TrafficTarget.parse(LOW).gap_seconds * JITTER
    close = [b for a, b in itertools.pairwise(arrived) if edit.returned < b < until and b - a < slow_gap]
    if edit.line == HIGH:
        return close[0] - edit.returned if close else math.inf
    return close[-1] - edit.returned if close else 0.0


def test_a_line_that_does_not_parse_and_a_variable_that_is_gone_change_nothing(solving: Solving) -> None:
    wrong, gone = solving.models[:2]
    began = time.monotonic()
    solving.insert(600)
    solving.until_all_send(began, 60)
    solving.api.set_variable(f"traffic.{wrong}", "4/fortnight")
    solving.api.delete_variable(f"traffic.{gone}")
    changed = time.monotonic()
    trouble = wait_for(
        lambda: solving.rows("SELECT line, problem FROM traffic_troubles WHERE model = %s", wrong),
        3,
        "the trouble",
    )
    wait_until(lambda: time.monotonic() > changed + 3, 5, "three seconds of sending")
    solving.stop_backlog()

    assert trouble[0][0] == "4/fortnight"
    assert trouble[0][1]
    for model in (wrong, gone):
        assert solving.value("SELECT target FROM newest_targets WHERE model = %s", model) == "4/s"
        assert (
            len([at for at in solving.arrived(changed, model) if at < changed + 3]) >= 8
        )  # 4/s, hardly slower
    solving.set_target(wrong, "4/s")
    wait_until(lambda: not solving.rows("SELECT FROM traffic_troubles"), 3, "the trouble is over")


def test_pausing_the_dag_stops_sending_and_unpausing_goes_on(solving: Solving) -> None:
    began = time.monotonic()
    solving.insert(800)
    solving.until_all_send(began, 60)
    solving.api.pause(DAG)
    paused = time.monotonic()
    wait_until(lambda: time.monotonic() > paused + PAUSE_SECONDS + 1.5, 5, "a while of pause")
    solving.until_quiet()  # calls in flight finish
    stopped = max(solving.arrived(began)) - paused
    lost = solving.value("SELECT count(*) FROM model_calls WHERE outcome = 'lost'")

    solving.api.pause(DAG, paused=False)
    unpaused = time.monotonic()
    went_on = wait_for(lambda: solving.arrived(unpaused), 10, "sending goes on")[0] - unpaused
    say(f"paused: the last arrival {stopped:.2f} s later; unpaused: the first {went_on:.2f} s later")
    assert stopped <= PAUSE_SECONDS
    assert went_on <= PAUSE_SECONDS
    assert lost == solving.value("SELECT count(*) FROM model_calls WHERE outcome = 'lost'")


def test_a_worker_marked_failed_rests_its_model_until_it_is_cleared(solving: Solving) -> None:
    began = time.monotonic()
    solving.insert(500)
    solving.until_all_send(began, 60)
    run = solving.run()["dag_run_id"]
    model, others = solving.models[3], [*solving.models[:3], *solving.models[4:]]

    solving.api.set_task_state(DAG, run, "work", "failed", map_index=3)
    marked = time.monotonic()
    wait_until(lambda: time.monotonic() > marked + 5, 8, "a while without the model")
    resting_from = max(solving.arrived(began, model)) - marked
    for other in others:
        assert len(solving.arrived(marked + 2, other)) >= 4
    solving.clear("work", 3, run)
    cleared = time.monotonic()
    back = wait_for(lambda: solving.arrived(cleared, model), 30, "the model is back")[0] - cleared
    say(f"marked failed: its last arrival {resting_from:.2f} s later; cleared: back after {back:.2f} s")
    assert resting_from <= 3
    solving.set_targets(FAST)
    solving.until_drained(60)
    solving.assert_nothing_lost_or_doubled()


def test_all_workers_leave_an_empty_queue_together_and_a_new_task_wakes_the_next_run(
    solving: Solving,
) -> None:
    began = time.monotonic()
    solving.insert(20)
    wait_for(lambda: solving.arrived(began), 60, "the first arrival")
    run = solving.run()["dag_run_id"]
    solving.until_drained(30)
    wait_until(
        lambda: {t["state"] for t in solving.airflow_tasks(run)} == {"deferred"}, 30, "all workers at work"
    )
    warm = [_seconds_to_arrival(solving) for _ in range(5)]
    say(f"INSERT -> call, warm: {spread(warm)}")

    drained = time.monotonic()
    over = solving.until_run_is_over(run, 60)
    say(f"the run ended {time.monotonic() - drained:.1f} s after the queue was empty")
    assert over["state"] == "success"
    left = [worker["end_date"] for worker in solving.airflow_tasks(run)]
    assert {worker["state"] for worker in solving.airflow_tasks(run)} == {"success"}
    say(f"the workers left between {min(left)} and {max(left)}")
    assert solving.value("SELECT reason FROM runs WHERE run = %s", run) == "the queue was empty"
    assert time.monotonic() - drained >= IDLE_LEAVE_SECONDS - 2

    wait_until(lambda: _waits(solving, run), 30, "the next run waits for work")
    cold = _seconds_to_arrival(solving)
    say(f"INSERT -> call, cold: {cold:.2f} s")
    assert sorted(warm)[len(warm) // 2] <= 0.15
    assert cold <= 5.0 * crowding()


def _seconds_to_arrival(solving: Solving) -> float:
    inserted = time.monotonic()
    solving.insert(1)
    arrived = wait_for(lambda: solving.arrived(inserted), 30, "the task's call")[0]
    solving.until_drained(30)
    return arrived - inserted


def _waits(solving: Solving, former_run: str) -> bool:
    """Whether the next run's trigger, in a triggerer, waits for work."""
    run = solving.run()["dag_run_id"]
    waiting = solving.airflow_tasks(run, "wait_for_work")
    return run != former_run and [(entry["state"], bool(entry["triggerer_job"])) for entry in waiting] == [
        ("deferred", True)
    ]


@pytest.fixture
def newcomer(solving: Solving) -> Iterator[str]:
    """A model that is added by calling `sync`, and taken off the roster again."""
    file = solving.config_folder / "models.yaml"
    before = file.read_text()
    file.write_text(before.replace("models:\n", NEWCOMER_ENTRY, 1))
    yield NEWCOMER
    file.write_text(before)
    sync_roster(solving.database, load_config(solving.config_folder))


def test_a_model_added_in_a_drain_leaves_no_model_idle(solving: Solving, newcomer: str) -> None:
    before = solving.models
    began = time.monotonic()
    solving.insert(2500)
    solving.until_all_send(began, 60)
    solving.changes.append(TargetChange(time.monotonic(), newcomer, TrafficTarget.parse("4/s")))
    sync_roster(solving.database, load_config(solving.config_folder))
    added = time.monotonic()
    first = wait_for(lambda: solving.arrived(added, newcomer), 60, "the newcomer's first call")[0] - added
    solving.until_all_send(time.monotonic(), 30)
    wait_until(lambda: time.monotonic() > added + first + 5, 10, "a while with the newcomer")
    solving.stop_backlog()

    until = added + first + 5
    gaps = {model: _longest_gap(solving.arrived(added - 1, model), until) for model in before}
    longest = max(gaps, key=lambda model: gaps[model])
    say(f"the newcomer's first call after {first:.1f} s; the longest gap {gaps[longest]:.1f} s ({longest})")
    assert gaps[longest] <= 5.0
    assert first <= 5.0


def _longest_gap(arrived: Sequence[float], until: float) -> float:
    return max(b - a for a, b in itertools.pairwise([at for at in arrived if at < until]))
