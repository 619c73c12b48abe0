"""The ideal limiter: small cases whose sends were computed by hand."""

from __future__ import annotations

import pytest

from bench.judge import TargetChange
from bench.judge.ideal import bound, replay_ideal
from router.errors import InputError
from router.traffic import TrafficTarget


def target(line: str, at: float = 0.0, model: str = "m") -> TargetChange:
    return TargetChange(at, model, TrafficTarget.parse(line))


def sends(
    *changes: TargetChange, until: float, latency: float = 0.0, tokens: int = 0, used: int = 0
) -> list[float]:
    draws = [(tokens, used or tokens)]
    return replay_ideal(changes, [latency], 0.0, until, amounts=[(*draw, 0, 0) for draw in draws]).tolist()


def test_it_paces_at_nine_tenths_of_the_window_and_then_waits_for_it():
    assert sends(target("2/10s"), until=30) == [0, 4.5, 10, 14.5, 20, 24.5, 30]


def test_burst_lifts_the_pace():
    assert sends(target("3/10s, burst"), until=20) == [0, 0, 0, 10, 10, 10, 20, 20, 20]


def test_the_tightest_rate_sets_the_pace_and_every_window_holds():
    paced = sends(target("60/min, 4/s"), until=120)
    assert paced[:3] == [0, 0.9, 1.8]
    assert len([at for at in paced if at < 120]) == 120


def test_a_concurrency_limit_makes_calls_wait_for_a_slot():
    assert sends(target("2 at once"), until=9, latency=3) == [0, 0, 3, 3, 6, 6, 9, 9]


def test_tokens_are_corrected_when_a_call_ends():
    # 600 of 1,000 reserved and 100 used: the next fits when the first has ended.
    assert sends(target("1k tokens/min"), until=4, latency=2, tokens=600, used=100) == [0, 2, 4]
    assert sends(target("1k tokens/min"), until=130, latency=2, tokens=600) == [0, 60, 120]


def test_a_call_larger_than_the_window_waits_for_an_empty_window():
    assert sends(target("1k tokens/min"), until=130, tokens=5000) == [0, 60, 120]


def test_a_call_without_tokens_does_not_wait_for_tokens():
    draws = [(10, 50), (0, 0)]
    full = [target("10 tokens/min, 1 at once")]
    assert replay_ideal(full, [2.0], 0.0, 5.0, amounts=[(*draw, 0, 0) for draw in draws]).tolist() == [0, 2]
    assert replay_ideal(full, [2.0], 0.0, 70.0, amounts=[(*draw, 0, 0) for draw in draws]).tolist() == [
        0,
        2,
        60,
        62,
    ]


def test_a_stopped_model_keeps_its_history():
    changes = (target("2/10s, burst"), target("0", at=5), target("2/10s, burst", at=8))
    assert sends(*changes, until=12) == [0, 0, 10, 10]


def test_a_raised_target_applies_immediately():
    assert sends(target("1/10s"), target("10/10s", at=2), until=4) == [0, 2, 2.9, 3.8]


def test_a_lowered_target_counts_what_was_sent_before():
    assert sends(target("4/10s, burst"), target("1/10s", at=5), until=25) == [0, 0, 0, 0, 10, 20]


def test_nothing_is_sent_before_there_is_a_target():
    assert sends(target("1/10s", at=7), until=10) == [7]


def test_a_replay_ends_after_the_requested_number_of_sends():
    changes = [target("5 at once")]
    assert len(replay_ideal(changes, [0.0], 0.0, 1.0, most=50)) == 50


def test_a_replay_refuses_changes_of_several_models():
    with pytest.raises(ValueError, match="one model"):
        replay_ideal([target("1/s"), target("1/s", model="other")], [0.0], 0.0, 1.0)


def test_the_bound_takes_the_earliest_sends_of_all_models():
    # slow: 0, 10, ... and fast: 0, 4, 8, ...; five sends are 0, 0, 4, 8, 10; the last takes 5 s.
    changes = [target("1/10s", model="slow"), target("1/4s", model="fast")]
    soonest = bound(changes, 5, lambda model, _task: 5.0 if model == "slow" else 1.0, start=0.0)
    assert soonest.seconds == 15
    assert soonest.sent == {"fast": 3, "slow": 2}


def test_the_bound_counts_from_the_start_of_the_backlog():
    soonest = bound([target("2 at once", at=90.0)], 5, lambda *_: 3.0, start=100.0)
    assert soonest.seconds == 9


def test_the_bound_uses_the_latency_of_the_next_task():
    soonest = bound([target("1/10s")], 3, lambda _model, task: [25.0, 1.0, 2.0][task], start=0.0)
    assert soonest.seconds == 25


def test_the_bound_counts_tokens():
    changes = [target("1k tokens/min")]
    soonest = bound(
        changes, 3, lambda *_: 1.0, start=0.0, tokens_of=lambda _model, n: ([400, 900, 100][n], 0)
    )
    # The first is corrected to nothing after its second, then 900 fit, and 100 next to them.
    assert soonest.seconds == 2


def test_a_backlog_that_can_never_be_sent_is_refused():
    with pytest.raises(InputError, match="only 2 of 3"):
        bound([target("1/10s"), target("0", at=15)], 3, lambda *_: 1.0, start=0.0)
