"""Snapshot of one model's limiter: usage of each limit, breaker, refusals."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from router.limiter.budget import forecast, level_reached, use_text
from router.limiter.permit import WaitReason
from router.traffic import TrafficTarget

_MINUTES_FROM_SECONDS = 120


@dataclass(frozen=True, slots=True)
class ModelTraffic:
    """Usage of one model now. Counts are by limit, e.g. `{"120/min": 96}`, and never above it.

    They are of the sends within the limit's window until now, without the slacks; sends whose time has yet to
    come do not count. Money is in millionths of a US dollar. `version` is the target's, 0 if unknown.

    `failures` are those in a row. `trips` counts how often in a row the breaker opened; 0 is closed.
    `refused` counts the 429s since `refused_since_seconds` ago, the last of them `refused_seconds` ago.
    """

    model: str
    target: str | None
    sent: dict[str, int]
    tokens: dict[str, int]
    in_flight: int
    next_seconds: float | None
    waiting_for: WaitReason
    cooldown_seconds: float
    cooldown_reason: str | None
    failures: int = 0
    trips: int = 0
    refused: int = 0
    refused_since_seconds: float | None = None
    refused_seconds: float | None = None
    version: int = 0
    money: dict[str, int] = field(default_factory=dict)
    recent_money: dict[str, int] = field(default_factory=dict)  # of the latest 24th of each window

    def forecast(self, now: datetime) -> dict[str, int]:
        """Returns what each budget comes to by its end at the recent pace."""
        limits = TrafficTarget.parse(self.target).money if self.target else ()
        found = {str(limit): limit for limit in limits}
        return {
            name: forecast(found[name], used, self.recent_money.get(name, 0), now)
            for name, used in self.money.items()
        }

    @property
    def budget_warnings(self) -> tuple[str, ...]:
        """One sentence for each budget of which 80 % or more is used."""
        limits = TrafficTarget.parse(self.target).money if self.target else ()
        used = [(limit, self.money.get(str(limit), 0)) for limit in limits]
        return tuple(f"budget: {use_text(limit, n)}" for limit, n in used if level_reached(limit, n))

    @property
    def breaker(self) -> str:
        """State of the circuit breaker: `closed`, `open` or `half-open`."""
        if not self.trips:
            return "closed"
        return "open" if self.cooldown_seconds > 0 else "half-open"

    @property
    def quota_warning(self) -> str | None:
        """Warning about the 429s of the last hour, or None if there were none."""
        if not self.refused or self.refused_since_seconds is None or self.refused_seconds is None:
            return None
        since, last = _duration(self.refused_since_seconds), _duration(self.refused_seconds)
        return (
            f"{self.refused:,} of its calls refused (429) in the last {since}, the latest {last} ago: its "
            "traffic target is above what the provider allows; lower it, or have the quota raised."
        )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < _MINUTES_FROM_SECONDS else f"{seconds / 60:.0f} min"
