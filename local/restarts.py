"""Decides when a process that ended by itself starts again."""

from __future__ import annotations

from collections import deque

MAX_DEATHS = 6
WINDOW_SECONDS = 120.0
MAX_DELAY_SECONDS = 8.0


class RestartPolicy:
    """Delays of restarts: none at first, then doubling from 1 s; ends after MAX_DEATHS in WINDOW_SECONDS."""

    def __init__(self) -> None:
        self._deaths: dict[str, deque[float]] = {}

    def died(self, name: str, now: float) -> float | None:
        """Records the end of a process. Returns the delay until its restart; None if it ended too often."""
        deaths = self._deaths.setdefault(name, deque())
        deaths.append(now)
        while deaths[0] < now - WINDOW_SECONDS:
            deaths.popleft()
        if len(deaths) >= MAX_DEATHS:
            return None
        return 0.0 if len(deaths) == 1 else min(2.0 ** (len(deaths) - 2), MAX_DELAY_SECONDS)
