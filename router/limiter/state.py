"""State of one model as this process knows it from the script's replies."""

from __future__ import annotations

from dataclasses import dataclass

from router.limiter.permit import WaitReason
from router.limiter.settings import MICRO
from router.traffic import TrafficTarget

FREED_BY_OTHERS = frozenset({WaitReason.CONCURRENCY, WaitReason.HALF_OPEN})  # sooner than their moment says


@dataclass(slots=True)
class ModelState:
    """What this process has seen of a model: by it a limiter that lost its memory is found out.

    `anchor` is Redis's kept clock minus this process's monotonic clock, as far as both are known to agree:
    it says how late it can be at most in Redis, whatever Redis's own clock was set to. In microseconds.
    """

    generation: float = 0.0
    head: float = 0.0
    version: float = 0.0
    target: TrafficTarget | None = None
    anchor: float | None = None
    failures: float = 0.0
    trip: float = 0.0
    rest_until: float = 0.0  # on the monotonic clock
    rest_reason: str = ""
    near_at: float | None = None  # when a send looks possible, on the monotonic clock; None: nobody knows
    near_known_at: float = 0.0

    def claim(self, left: float) -> float:
        """What Redis's kept clock shows at the soonest when the question leaves at `left`; 0 if unknown."""
        return 0.0 if self.anchor is None else self.anchor + left * MICRO

    def heard(self, now: float, left: float, arrived: float) -> None:
        """A reply says that Redis's kept clock showed `now` between these two moments."""
        low, high = now - arrived * MICRO, now - left * MICRO
        self.anchor = low if self.anchor is None else min(max(self.anchor, low), high)

    def hint(self, again: float | None, reason: float, arrived: float, look_ahead: float) -> None:
        """Keep when the next send looks possible, so that nobody need ask before."""
        if again is None or reason in FREED_BY_OTHERS:
            self.near_at, self.near_known_at = None, 0.0
        else:
            self.near_at, self.near_known_at = arrived + again - look_ahead, arrived
        if reason == WaitReason.COOLING_DOWN and again is not None:
            self.rest_until = arrived + again
