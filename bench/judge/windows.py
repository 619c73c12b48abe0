"""For every arrival: requests, tokens and money in its window, and calls in flight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from bench.judge.arrivals import NANOSECONDS, Integers, ModelLog
from router.traffic import TrafficTarget

AGAINST_A_STOP = 2.0


class Counts:
    """Counts at each arrival, itself included; each kind of window is counted once and cached.

    UTC is the log's time plus `utc_offset` (nanoseconds), which calendar periods need.
    """

    def __init__(self, log: ModelLog, utc_offset: int = 0) -> None:
        self._log = log
        self._utc_offset = utc_offset
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
        for tokens in target.tokens:
            yield str(tokens), tokens.count, self._once("tokens", tokens.window_seconds, _tokens_in)
        for budget in target.money:
            kind, count = f"money {budget.calendar}", _money_in
            if budget.calendar:
                count = partial(_money_of, kind=budget.calendar, utc_offset=self._utc_offset)
            yield str(budget), budget.count, self._once(kind, budget.window_seconds, count)
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
    return _sums(log, log.at + window, log.reserved, log.used)


def _money_in(log: ModelLog, window: int) -> Integers:
    return _sums(log, log.at + window, log.cost, log.spent)


def _money_of(log: ModelLog, _window: int, *, kind: str, utc_offset: int) -> Integers:
    """Money of the calendar period so far; periods begin at midnight UTC."""
    unit = "datetime64[D]" if kind == "day" else "datetime64[M]"
    utc = (log.at + utc_offset).astype("datetime64[ns]").astype(unit)
    ends = (utc + 1).astype("datetime64[ns]").astype(np.int64) - utc_offset
    return _sums(log, ends, log.cost, log.spent)


def _sums(log: ModelLog, too_old: Integers, reserved: Integers, used: Integers) -> Integers:
    """Three events per call: reservation, correction if it ends in time, and expiry from the window."""
    if not reserved.any():
        return np.zeros(len(log.at), dtype=np.int64)
    in_time = log.ended < too_old
    counted_last = np.where(in_time, used, reserved)
    # At equal times ends and expiries come first; the sort is stable.
    times = np.concatenate([log.ended[in_time], too_old, log.at])
    steps = np.concatenate([(used - reserved)[in_time], -counted_last, reserved])
    order = np.argsort(times, kind="stable")
    met = np.empty(len(times), dtype=np.int64)
    met[order] = np.cumsum(steps[order])
    # A call without tokens or cost adds nothing to a window.
    return np.where(reserved > 0, met[len(times) - len(log.at) :], 0)
