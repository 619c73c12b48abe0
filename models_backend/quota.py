"""A model's true quota, as its provider counts it: exact in every rolling window, by arrival time."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

from router.traffic import TrafficTarget


class Quotas:
    """Quotas of all models; a model without one is never refused."""

    def __init__(self, targets: Mapping[str, TrafficTarget]) -> None:
        self._quotas = {model: _Quota(target) for model, target in targets.items()}

    def enter(self, model: str, now: float, tokens: int) -> int | None:
        """Admits a call until `leave` and returns None, or returns whole seconds until a retry."""
        quota = self._quotas.get(model)
        return None if quota is None else quota.enter(now, tokens)

    def leave(self, model: str) -> None:
        """Ends an admitted call."""
        if model in self._quotas:
            self._quotas[model].at_once -= 1


class _Quota:
    def __init__(self, target: TrafficTarget) -> None:
        self._target = target
        self._windows = [
            _Window(limit.count, limit.window_seconds, counts_tokens=False) for limit in target.requests
        ]
        self._windows += [
            _Window(limit.count, limit.window_seconds, counts_tokens=True) for limit in target.tokens
        ]
        self.at_once = 0

    def enter(self, now: float, tokens: int) -> int | None:
        waits = [window.wait_seconds(now, tokens) for window in self._windows]
        if self._target.stopped or (
            self._target.at_once is not None and self.at_once >= self._target.at_once
        ):
            waits.append(1.0)
        if any(wait > 0 for wait in waits):
            return math.ceil(max(waits))
        for window in self._windows:
            window.count(now, tokens)
        self.at_once += 1
        return None


class _Window:
    """Admitted calls of the last `seconds`; refused calls do not count."""

    def __init__(self, most: int, seconds: float, *, counts_tokens: bool) -> None:
        self._most = most
        self._seconds = seconds
        self._counts_tokens = counts_tokens
        self._entries: deque[tuple[float, int]] = deque()
        self._sum = 0

    def wait_seconds(self, now: float, tokens: int) -> float:
        """0 if the call fits now, else seconds until enough calls have left the window."""
        while self._entries and self._entries[0][0] <= now - self._seconds:
            self._sum -= self._entries.popleft()[1]
        excess = self._sum + (tokens if self._counts_tokens else 1) - self._most
        if excess <= 0:
            return 0.0
        for at, size in self._entries:
            excess -= size
            if excess <= 0:
                return at + self._seconds - now
        return self._seconds

    def count(self, now: float, tokens: int) -> None:
        size = tokens if self._counts_tokens else 1
        self._entries.append((now, size))
        self._sum += size
