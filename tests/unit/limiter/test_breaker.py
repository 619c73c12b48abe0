"""Verdict of the circuit breaker on each outcome."""

from __future__ import annotations

import pytest

from router.limiter.breaker import BreakerSettings, Signal, Verdict
from router.task import Outcome

SETTINGS = BreakerSettings(default_retry_after_seconds=2, unknown_model_cooldown_seconds=40)


@pytest.mark.parametrize(
    ("outcome", "retry_after", "verdict"),
    [
        (Outcome.ANSWERED, None, Verdict(Signal.SUCCESS)),
        (Outcome.REJECTED, None, Verdict(Signal.SUCCESS)),
        (Outcome.ERROR, None, Verdict(Signal.FAILURE)),
        (Outcome.TIMEOUT, None, Verdict(Signal.FAILURE)),
        (Outcome.GARBAGE, None, Verdict(Signal.FAILURE)),
        (Outcome.RATE_LIMITED, 7.0, Verdict(Signal.RATE_LIMITED, 7)),
        (Outcome.RATE_LIMITED, None, Verdict(Signal.RATE_LIMITED, 2)),
        (Outcome.OVERLOADED, 7.0, Verdict(Signal.COOL_DOWN, 7)),
        (Outcome.OVERLOADED, None, Verdict(Signal.FAILURE, 2)),
        (Outcome.OVERLOADED, 0.0, Verdict(Signal.FAILURE, 2)),
        (Outcome.UNKNOWN_MODEL, None, Verdict(Signal.COOL_DOWN, 40)),
        (Outcome.UNSENT, None, None),
        (Outcome.LOST, None, None),
    ],
)
def test_verdict_of_each_outcome(outcome: Outcome, retry_after: float | None, verdict: Verdict | None):
    assert SETTINGS.verdict(outcome, retry_after) == verdict


def test_only_unsent_and_lost_calls_have_no_verdict():
    without = {outcome for outcome in Outcome if SETTINGS.verdict(outcome, None) is None}
    assert without == {Outcome.UNSENT, Outcome.LOST}
