"""What a call's outcome says about its model: trust it, doubt it, or leave it alone for a while. No I/O.

The counting itself is done in Redis, for all processes together (`limiter.lua`, verb `record_outcome`).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from router.task import Outcome


class Signal(enum.IntEnum):
    """What an outcome means for the breaker; the numbers are those of `limiter.lua`."""

    REST = 0  # no failure, yet nothing may be sent for a while
    GOOD = 1  # the model works: closes the breaker
    BAD = 2  # one more failure in a row: opens it in the end
    REFUSED = 3  # 429: counted, since it means that the target is above the provider's quota
    PUT_BACK = 4  # what a process still knows of a rest that Redis forgot
    NOTHING = 5  # given up by whoever asked: if it was the probe, another call may be the next one


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to tell the breaker; nothing is sent for `rest_seconds`, whatever the sign."""

    sign: Signal
    rest_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class BreakerSettings:
    """When a model is given a rest, and for how long. All times in seconds.

    After `failure_threshold` failures in a row the breaker opens for `initial_cooldown_seconds`. Each failed
    probe opens it for twice as long, up to `max_cooldown_seconds`.
    """

    failure_threshold: int = 5
    initial_cooldown_seconds: float = 1.0
    max_cooldown_seconds: float = 60.0
    default_retry_after_seconds: float = 1.0  # where a 429 or 503 does not say how long
    unknown_model_rest_seconds: float = 30.0

    def verdict(self, outcome: Outcome, retry_after_seconds: float | None) -> Verdict | None:
        """What this outcome says about the model; None if nothing.

        A 503 that names a time is a planned pause, one that does not is a failure; a time of 0 is none. A
        prompt that is refused (`rejected`) shows a model that works.
        """
        told = bool(retry_after_seconds)
        pause = retry_after_seconds or self.default_retry_after_seconds
        if outcome in _GOOD:
            return Verdict(Signal.GOOD)
        if outcome in _BAD:
            return Verdict(Signal.BAD)
        if outcome is Outcome.RATE_LIMITED:
            return Verdict(Signal.REFUSED, pause)
        if outcome is Outcome.OVERLOADED:
            return Verdict(Signal.REST if told else Signal.BAD, pause)
        if outcome is Outcome.UNKNOWN_MODEL:
            return Verdict(Signal.REST, self.unknown_model_rest_seconds)
        return Verdict(Signal.NOTHING) if outcome is Outcome.ABANDONED else None


_GOOD = frozenset({Outcome.ANSWERED, Outcome.REJECTED})
_BAD = frozenset({Outcome.ERROR, Outcome.TIMEOUT, Outcome.GARBAGE})
