"""What each outcome of a call says about its model."""

from __future__ import annotations

import pytest

from router.limiter.breaker import BreakerSettings, Signal, Verdict
from router.task import Outcome

SETTINGS = BreakerSettings(default_retry_after_seconds=2, unknown_model_cooldown_seconds=40)


@pytest.mark.parametrize(
    ("outcome", "told", "verdict"),
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
def test_what_an_outcome_says(outcome: Outcome, told: float | None, verdict: Verdict | None):
    assert SETTINGS.verdict(outcome, told) == verdict


def test_every_outcome_is_thought_of():
    said = [outcome for outcome in Outcome if SETTINGS.verdict(outcome, None) is not None]
    assert set(Outcome) - set(said) == {Outcome.UNSENT, Outcome.LOST}
