"""Alarm about the failing calls of one model: by their rate over a span, not by single calls. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

END_RATIO = 0.5  # the alarm ends below this part of the rate that raises it
MAX_CALLS = 10_000


@dataclass(frozen=True, slots=True)
class AlarmSettings:
    """Raises an alarm if `min_failures` of the last `seconds` and this share of all calls failed."""

    failure_rate: float
    min_failures: int
    seconds: float


@dataclass
class FailureAlarm:
    """Calls of one model within the span, and whether the alarm is raised. Times are monotonic seconds."""

    settings: AlarmSettings
    raised: bool = False
    _calls: deque[tuple[float, bool]] = field(default_factory=deque)
    _failures: int = 0
    _last_error: str = ""

    def record(self, at: float, error: str | None, *, certain: bool = False) -> None:
        """Adds one call; `error` is None for an answered one. A `certain` error needs no second one."""
        failed = error is not None
        self._calls.append((at, failed))
        self._failures += failed
        if error is not None:
            self._last_error = error
            self.raised = self.raised or certain
        if len(self._calls) > MAX_CALLS:
            self._drop_first()

    def text(self, at: float) -> str | None:
        """Returns the alarm's text at this time; None without an alarm."""
        settings = self.settings
        while self._calls and at - self._calls[0][0] > settings.seconds:
            self._drop_first()
        rate = self._failures / len(self._calls) if self._calls else 0.0
        limit = settings.failure_rate * (END_RATIO if self.raised else 1.0)
        least = 1 if self.raised else settings.min_failures
        self.raised = self._failures >= least and rate >= limit
        if not self.raised:
            return None
        counts = f"{self._failures:,} of {len(self._calls):,} calls"
        return f"{counts} failed within {settings.seconds:g} s, last: {self._last_error}"

    def _drop_first(self) -> None:
        _, failed = self._calls.popleft()
        self._failures -= failed
