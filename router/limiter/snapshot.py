"""Snapshot of one model's limiter: usage of each limit, breaker, refusals."""

from __future__ import annotations

from dataclasses import dataclass

from router.limiter.permit import WaitReason


@dataclass(frozen=True, slots=True)
class ModelTraffic:
    """What a model's limiter holds now; counts are by limit, e.g. `{"120/min": 96}`, slacks included.

    `failures` are those in a row; `trip` is how often in a row the breaker opened, 0 if it is closed.
    `refused` counts the 429s since `refused_since_seconds` ago, the last of them `refused_seconds` ago.
    """

    model: str
    target: str | None
    sent: dict[str, int]
    tokens: dict[str, int]
    at_once: int
    next_seconds: float | None
    waiting_for: WaitReason
    resting_seconds: float
    rest_reason: str | None
    failures: int = 0
    trip: int = 0
    refused: int = 0
    refused_since_seconds: float | None = None
    refused_seconds: float | None = None

    @property
    def breaker(self) -> str:
        """`closed`, `open`, or `half-open`: one call at a time is let through to try the model out."""
        if not self.trip:
            return "closed"
        return "open" if self.resting_seconds > 0 else "half-open"

    @property
    def quota_warning(self) -> str | None:
        """What the 429s of the last hour mean; None if there were none."""
        if not self.refused or self.refused_since_seconds is None or self.refused_seconds is None:
            return None
        since, last = _span(self.refused_since_seconds), _span(self.refused_seconds)
        return (
            f"{self.refused:,} of its calls refused (429) in the last {since}, the latest {last} ago: its "
            "traffic target is above what the provider allows; lower it, or have the quota raised."
        )


def _span(seconds: float) -> str:
    """A time for people: `40 s`, `12 min`."""
    return f"{seconds:.0f} s" if seconds < _MINUTES_FROM_SECONDS else f"{seconds / 60:.0f} min"


_MINUTES_FROM_SECONDS = 120
