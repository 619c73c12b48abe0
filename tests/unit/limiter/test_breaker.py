"""What each outcome of a call says about its model."""

from __future__ import annotations

import pytest

from router.limiter.breaker import BreakerSettings, Signal, Verdict
from router.task import Outcome

SETTINGS = BreakerSettings(default_retry_after_seconds=2, unknown_model_rest_seconds=40)


@pytest.mark.parametrize(
    ("outcome", "told", "verdict"),
    [
        (Outcome.ANSWERED, None, Verdict(Signal.GOOD)),
        (Outcome.REJECTED, None, Verdict(Signal.GOOD)),
        (Outcome.ERROR, None, Verdict(Signal.BAD)),
        (Outcome.TIMEOUT, None, Verdict(Signal.BAD)),
        (Outcome.GARBAGE, None, Verdict(Signal.BAD)),
        (Outcome.RATE_LIMITED, 7.0, Verdict(Signal.REFUSED, 7)),
        (Outcome.RATE_LIMITED, None, Verdict(Signal.REFUSED, 2)),
        (Outcome.OVERLOADED, 7.0, Verdict(Signal.REST, 7)),
        (Outcome.OVERLOADED, None, Verdict(Signal.BAD, 2)),
        (Outcome.OVERLOADED, 0.0, Verdict(Signal.BAD, 2)),
        (Outcome.UNKNOWN_MODEL, None, Verdict(Signal.REST, 40)),
        (Outcome.UNSENT, None, None),
        (Outcome.LOST, None, None),
    ],
)
def test_what_an_outcome_says(outcome: Outcome, told: float | None, verdict: Verdict | None):
    assert SETTINGS.verdict(outcome, told) == verdict


def test_every_outcome_is_thought_of():
    said = [outcome for outcome in Outcome if SETTINGS.verdict(outcome, None) is not None]
    assert set(Outcome) - set(said) == {Outcome.UNSENT, Outcome.LOST}
