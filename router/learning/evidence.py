"""What the log says of one model in one category, by period, and what of it still counts. Pure.

`Moments`    a number of observations with their sum and the sum of their squares, weighed
`PeriodStats`  one period's calls: count, answers, latency, cost and grades
`decayed`      all periods as one: older ones weigh less, and what is no longer true weighs nothing
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

LEAST_CALLS_OF_A_PART = 10.0  # fewer tell nothing about a change
SHARE_THAT_MATTERS = 0.1  # of good answers
RATIO_THAT_MATTERS = 1.5  # of seconds, and of cost
NO_SPREAD = 1e-12


@dataclass(frozen=True, slots=True)
class Moments:
    """Weighed observations: `count` is the sum of the weights, `count_squares` that of their squares."""

    count: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    count_squares: float = 0.0

    @classmethod
    def of(cls, count: float, total: float, squares: float) -> Moments:
        """Observations that all weigh 1."""
        return cls(count, total, squares, count)

    @classmethod
    def of_share(cls, calls: float, good: float) -> Moments:
        """`calls` observations of 0 or 1, `good` of which are 1."""
        return cls(calls, good, good, calls)

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count,
            self.total + other.total,
            self.squares + other.squares,
            self.count_squares + other.count_squares,
        )

    def weighed(self, weight: float) -> Moments:
        """The same observations, each of them with this weight."""
        return Moments(
            self.count * weight, self.total * weight, self.squares * weight, self.count_squares * weight**2
        )

    @property
    def mean(self) -> float:
        """The mean; 0 without observations."""
        return self.total / self.count if self.count else 0.0

    @property
    def variance(self) -> float:
        """The spread around the mean; 0 without observations."""
        return max(0.0, self.squares / self.count - self.mean**2) if self.count else 0.0

    @property
    def effective(self) -> float:
        """As many observations of weight 1 would be as certain."""
        return self.count**2 / self.count_squares if self.count_squares else 0.0


@dataclass(frozen=True, slots=True)
class PeriodStats:
    """One period of one model in one category.

    `calls` are those that count, `answered` those of them that were; `latencies` are natural logarithms of
    seconds and `costs` USD, both of answered calls; `scores` are grades by their source.
    """

    period: int
    calls: float = 0.0
    answered: float = 0.0
    latencies: Moments = Moments()
    costs: Moments = Moments()
    scores: Mapping[str, Moments] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What still counts of one model in one category. `since` is the oldest period in it."""

    success: Moments = Moments()
    latencies: Moments = Moments()
    costs: Moments = Moments()
    scores: Mapping[str, Moments] = field(default_factory=dict)
    since: int | None = None
    forgot_before: int | None = None  # older evidence was forgotten, for it is no longer true
    newest_calls: float = 0.0  # calls in the newest period that has any
    seen: float = 0.0  # calls, however old, that it is made of

    @property
    def calls(self) -> float:
        """As how many fresh calls it counts."""
        return self.success.effective


def decayed(
    history: Iterable[PeriodStats], now_period: int, *, half_life: float, memory: int, change_errors: float
) -> Evidence:
    """All periods as one. Ages in periods; a period that lies ahead of now (a clock went back) is new."""
    newest_first = sorted(
        (sums for sums in history if now_period - sums.period < memory), key=lambda sums: -sums.period
    )
    kept, forgot_before = _true_still(newest_first, change_errors)
    evidence = Evidence()
    for sums in kept:
        age = max(0, now_period - sums.period)
        evidence = _joined(evidence, sums, 0.5 ** (age / half_life))
    calls = next((sums.calls for sums in newest_first if sums.calls), 0.0)
    seen = sum(sums.calls for sums in kept)
    return replace(evidence, forgot_before=forgot_before, newest_calls=calls, seen=seen)


def _joined(evidence: Evidence, sums: PeriodStats, weight: float) -> Evidence:
    scores = dict(evidence.scores)
    for source, moments in sums.scores.items():
        scores[source] = scores.get(source, Moments()) + moments.weighed(weight)
    return Evidence(
        success=evidence.success + Moments.of_share(sums.calls, sums.answered).weighed(weight),
        latencies=evidence.latencies + sums.latencies.weighed(weight),
        costs=evidence.costs + sums.costs.weighed(weight),
        scores=scores,
        since=sums.period if evidence.since is None else min(evidence.since, sums.period),
    )


def _true_still(
    newest_first: Sequence[PeriodStats], change_errors: float
) -> tuple[Sequence[PeriodStats], int | None]:
    """The newest periods up to the last change that is beyond doubt. Goes through them as they came: what was
    forgotten once must not come back into a comparison and hide the next change."""
    kept: list[PeriodStats] = []  # the oldest first
    alone: list[Evidence] = []  # each of them
    upto: list[Evidence] = [Evidence()]  # so many of the oldest as one
    forgot_before: int | None = None
    for sums in reversed(newest_first):
        kept.append(sums)
        alone.append(_joined(Evidence(), sums, 1.0))
        upto.append(_both(upto[-1], alone[-1]))
        change = _last_change(alone, upto, change_errors)
        if change is not None:
            kept, alone = kept[change:], alone[change:]
            upto = list(itertools.accumulate(alone, _both, initial=Evidence()))
            forgot_before = kept[0].period
    return kept[::-1], forgot_before


def _last_change(alone: Sequence[Evidence], upto: Sequence[Evidence], change_errors: float) -> int | None:
    """How many of the oldest differ from all that is newer, if any do."""
    if upto[-1].success.count < 2 * LEAST_CALLS_OF_A_PART:
        return None
    newer = Evidence()
    for place in range(len(alone) - 1, 0, -1):
        newer = _both(newer, alone[place])
        if _differ(newer, upto[place], change_errors):
            return place
    return None


def _both(one: Evidence, other: Evidence) -> Evidence:
    scores = {
        source: one.scores.get(source, Moments()) + other.scores.get(source, Moments())
        for source in one.scores.keys() | other.scores.keys()
    }
    return Evidence(
        one.success + other.success, one.latencies + other.latencies, one.costs + other.costs, scores
    )


def _differ(newer: Evidence, older: Evidence, errors: float) -> bool:
    share, ratio = SHARE_THAT_MATTERS, math.log(RATIO_THAT_MATTERS)
    if _moved(newer.success, older.success, errors, share):
        return True
    if any(
        _moved(newer.scores[source], older.scores[source], errors, share)
        for source in newer.scores.keys() & older.scores.keys()
    ):
        return True
    if _moved(newer.latencies, older.latencies, errors, ratio):
        return True
    least_cost = max(newer.costs.mean, older.costs.mean) * (1 - 1 / RATIO_THAT_MATTERS)
    return least_cost > 0 and _moved(newer.costs, older.costs, errors, least_cost)


def _moved(newer: Moments, older: Moments, errors: float, least: float) -> bool:
    if min(newer.count, older.count) < LEAST_CALLS_OF_A_PART:
        return False
    difference = abs(newer.mean - older.mean)
    if difference < least:
        return False
    pooled = (newer.variance * newer.count + older.variance * older.count) / (newer.count + older.count)
    spread = math.sqrt(max(pooled, NO_SPREAD) * (1 / newer.count + 1 / older.count))
    return difference > errors * spread
