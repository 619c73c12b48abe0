"""Computed schedules: small cases whose ends were computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.schedules import OldShape, cut, ideal_seconds, simulate_old

TWO_BY_TWO = OldShape(workers=2, batch=2, limit_seconds=100.0, gap_seconds=10.0)


def test_the_ideal_gives_each_free_slot_the_next_call():
    assert ideal_seconds([3, 1, 1, 1, 2], slots=2) == 5  # 3+2 on the one, 1+1+1 on the other
    assert ideal_seconds([3, 1], slots=5) == 3
    assert ideal_seconds([], slots=5) == 0


def test_tasks_are_split_into_equal_partitions_in_order():
    assert cut(range(7), 3) == [[0, 1, 2], [3, 4], [5, 6]]
    assert cut([5], 3) == [[5], [], []]


def test_a_batch_takes_as_long_as_its_slowest_and_a_run_as_its_slowest_worker():
    run = simulate_old([1, 5, 2, 2, 1, 1, 1, 1], TWO_BY_TWO)
    assert (run.seconds, run.runs, run.sent) == (7, 1, 8)  # 5 + 2, while the other needs 1 + 1
    assert run.working == 14
    assert run.for_batch == 4
    assert run.for_workers == 10
    assert run.working + run.for_batch + run.for_workers + run.for_restart == run.seconds * 4


def test_at_the_limit_a_batch_may_end_and_the_rest_waits_for_the_next_run():
    shape = replace(TWO_BY_TWO, limit_seconds=3.0)
    run = simulate_old([4] * 8, shape)
    assert (run.seconds, run.runs) == (4 + 10 + 4, 2)
    assert run.for_restart == 10 * 4


def test_calls_in_flight_at_a_killing_limit_are_repeated():
    shape = replace(TWO_BY_TWO, limit_seconds=3.0, killed_at_limit=True)
    run = simulate_old([2] * 8, shape)  # 2 s of the first run are kept, the batch after them is lost at 3 s
    assert (run.seconds, run.runs, run.sent) == (3 + 10 + 2, 2, 12)
    assert run.working == 16


def test_a_call_longer_than_a_killing_limit_is_refused():
    with pytest.raises(RuntimeError, match="have not solved all tasks: 8"):
        simulate_old([4] * 8, replace(TWO_BY_TWO, limit_seconds=3.0, killed_at_limit=True))


def test_each_wait_can_be_removed_alone():
    latencies = [1, 5, 2, 2, 1, 1, 1, 1]
    assert simulate_old(latencies, replace(TWO_BY_TWO, waits_for_batch=False)).seconds == 5
    assert simulate_old(latencies, replace(TWO_BY_TWO, own_parts=False)).seconds == 5
    assert simulate_old([4] * 8, replace(TWO_BY_TWO, limit_seconds=3.0, gap_seconds=0.0)).seconds == 8


def test_without_its_waits_the_old_flow_is_the_ideal():
    latencies = [float((7 * number) % 13 + 1) for number in range(100)]
    free = replace(TWO_BY_TWO, waits_for_batch=False, own_parts=False, limit_seconds=float("inf"))
    assert simulate_old(latencies, free).seconds == ideal_seconds(latencies, TWO_BY_TWO.at_once)


def test_a_refused_call_comes_back_at_once_and_waits_for_the_next_run():
    send_times: list[float] = []

    def admit(at: float) -> bool:
        send_times.append(at)
        return len(send_times) > 4  # the first four are refused

    run = simulate_old([1] * 8, TWO_BY_TWO, admit)
    assert (run.runs, run.sent, run.refused) == (2, 12, 4)
    assert send_times == [0] * 6 + [1] * 2 + [12] * 4  # a refused batch takes no time: the next follows
