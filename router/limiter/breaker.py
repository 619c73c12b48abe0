"""Circuit breaker policy: maps a call's outcome to a success, a failure or a cool-down. No I/O.

Redis counts the signals of all processes together (`limiter.lua`, verb `outcome`).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from router.task import Outcome


class Signal(enum.IntEnum):
    """Meaning of an outcome for the breaker; the numbers are those of `limiter.lua`."""

    COOL_DOWN = 0  # nothing may be sent for a while, without a failure
    SUCCESS = 1  # closes the breaker
    FAILURE = 2  # enough of them in a row open the breaker
    RATE_LIMITED = 3  # a 429: counted, since the target is above the provider's quota
    RESTORE = 4  # a cool-down that Redis lost, restored by a process that still knows it
    NEUTRAL = 5  # says nothing about the model; if the call was the probe, another call may be the next


@dataclass(frozen=True, slots=True)
class Verdict:
    """Signal to record. Nothing is sent for `cooldown_seconds`, whatever the signal."""

    signal: Signal
    cooldown_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class BreakerSettings:
    """Thresholds and durations of the breaker. All times in seconds.

    After `failure_threshold` failures in a row the breaker opens for `initial_cooldown_seconds`. Each failed
    probe opens it for twice as long, up to `max_cooldown_seconds`.
    """

    failure_threshold: int = 5
    initial_cooldown_seconds: float = 1.0
    max_cooldown_seconds: float = 60.0
    default_retry_after_seconds: float = 1.0  # for a 429 or 503 without Retry-After
    unknown_model_cooldown_seconds: float = 30.0

    def verdict(self, outcome: Outcome, retry_after_seconds: float | None) -> Verdict | None:
        """Returns the verdict on an outcome, or None if the outcome says nothing about the model.

        A reply with a positive Retry-After is a planned pause. A rejected prompt shows that the model works.
        An outage of the backend says nothing about the model.
        """
        cooldown = retry_after_seconds or self.default_retry_after_seconds
        if outcome in _FAILURES or outcome in _SUCCESSES:
            return Verdict(Signal.FAILURE if outcome in _FAILURES else Signal.SUCCESS)
        if outcome is Outcome.RATE_LIMITED:
            return Verdict(Signal.RATE_LIMITED, cooldown)
        if outcome is Outcome.OVERLOADED:
            return Verdict(Signal.COOL_DOWN if retry_after_seconds else Signal.FAILURE, cooldown)
        if outcome is Outcome.UNAVAILABLE and retry_after_seconds:
            return Verdict(Signal.COOL_DOWN, cooldown)
        if outcome is Outcome.UNKNOWN_MODEL:
            return Verdict(Signal.COOL_DOWN, self.unknown_model_cooldown_seconds)
        return Verdict(Signal.NEUTRAL) if outcome in _NEUTRAL else None


_SUCCESSES = frozenset({Outcome.ANSWERED, Outcome.REJECTED})
_FAILURES = frozenset({Outcome.ERROR, Outcome.TIMEOUT, Outcome.GARBAGE, Outcome.DENIED})
_NEUTRAL = frozenset({Outcome.ABANDONED, Outcome.UNAVAILABLE, Outcome.TOO_LONG})
