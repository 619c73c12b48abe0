"""For every arrival: requests and tokens in its window, and calls in flight."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from bench.judge.arrivals import NANOSECONDS, Integers, ModelLog
from router.traffic import TrafficTarget

AGAINST_A_STOP = 2.0


class Counts:
    """Counts at each arrival, itself included; each kind of window is counted once and cached."""

    def __init__(self, log: ModelLog) -> None:
        self._log = log
        self._kept: dict[tuple[str, int], Integers] = {}

    def ratio(self, target: TrafficTarget, part: slice) -> NDArray[np.float64]:
        """The greatest count / N over the target's limits, for the arrivals of `part`."""
        worst = np.zeros(part.stop - part.start)
        if target.stopped:
            return worst + AGAINST_A_STOP
        for _, allowed, counts in self.limits(target):
            np.maximum(worst, counts[part] / allowed, out=worst)
        return worst

    def limits(self, target: TrafficTarget) -> Iterator[tuple[str, int, Integers]]:
        """Each limit of the target as text, its N, and the counts at every arrival."""
        for limit in target.requests:
            yield str(limit), limit.count, self._once("requests", limit.window_seconds, _requests_in)
        for budget in target.tokens:
            yield str(budget), budget.count, self._once("tokens", budget.window_seconds, _tokens_in)
        if target.at_once is not None:
            yield f"{target.at_once} at once", target.at_once, self._once("at once", 0, _running_at)

    def _once(self, kind: str, seconds: int, count: Callable[[ModelLog, int], Integers]) -> Integers:
        if (kind, seconds) not in self._kept:
            self._kept[kind, seconds] = count(self._log, seconds * NANOSECONDS)
        return self._kept[kind, seconds]


def _requests_in(log: ModelLog, window: int) -> Integers:
    older = np.searchsorted(log.at, log.at - window, side="right")
    return np.arange(1, len(log.at) + 1, dtype=np.int64) - older


def _running_at(log: ModelLog, _window: int) -> Integers:
    over = np.searchsorted(np.sort(log.ended), log.at, side="right")
    return np.arange(1, len(log.at) + 1, dtype=np.int64) - over


def _tokens_in(log: ModelLog, window: int) -> Integers:
    """Three events per call: reservation, correction if it ends in time, and expiry from the window."""
    if not log.reserved.any():
        return np.zeros(len(log.at), dtype=np.int64)
    too_old = log.at + window
    in_time = log.ended < too_old
    counted_last = np.where(in_time, log.used, log.reserved)
    # At equal times ends and expiries come first; the sort is stable.
    times = np.concatenate([log.ended[in_time], too_old, log.at])
    steps = np.concatenate([(log.used - log.reserved)[in_time], -counted_last, log.reserved])
    order = np.argsort(times, kind="stable")
    met = np.empty(len(times), dtype=np.int64)
    met[order] = np.cumsum(steps[order])
    # A call without tokens adds nothing to a window.
    return np.where(log.reserved > 0, met[len(times) - len(log.at) :], 0)
