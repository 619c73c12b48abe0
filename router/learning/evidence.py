"""Decayed statistics of one model in one category, with change detection. Pure.

`Moments`      weighted count, sum and sum of squares of observations
`PeriodStats`  the calls of one client in one period: count, answers, latency, cost and grades
`decayed`      combines all periods: a period weighs 0.5^(age / half life), and periods before the last
               significant change weigh nothing. A client weighs at most a share; see `router.learning.shares`

The effective sample size is Kish's (sum of weights)^2 / (sum of squared weights).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from router.learning.shares import UNBOUNDED, ClientBound, client_shares

MIN_CALLS_TO_COMPARE = 10.0  # on each side of a change
RELEVANT_SHARE = 0.1  # of answered calls or of the score
RELEVANT_RATIO = 1.5  # of seconds or cost
MIN_VARIANCE = 1e-12


@dataclass(frozen=True, slots=True)
class Moments:
    """Weighted observations: `count` sums the weights, `count_squares` their squares."""

    count: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    count_squares: float = 0.0

    @classmethod
    def of(cls, count: float, total: float, squares: float) -> Moments:
        """Observations of weight 1."""
        return cls(count, total, squares, count)

    @classmethod
    def of_share(cls, calls: float, good: float) -> Moments:
        """`calls` observations of 0 or 1, of which `good` are 1."""
        return cls(calls, good, good, calls)

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count,
            self.total + other.total,
            self.squares + other.squares,
            self.count_squares + other.count_squares,
        )

    def weighted(self, weight: float) -> Moments:
        """The same observations, each multiplied by this weight."""
        return Moments(
            self.count * weight, self.total * weight, self.squares * weight, self.count_squares * weight**2
        )

    def thinned(self, share: float) -> Moments:
        """What a random share of the observations is expected to be."""
        return Moments(
            self.count * share, self.total * share, self.squares * share, self.count_squares * share
        )

    @property
    def mean(self) -> float:
        """The mean; 0 without observations."""
        return self.total / self.count if self.count else 0.0

    @property
    def variance(self) -> float:
        """The variance; 0 without observations."""
        return max(0.0, self.squares / self.count - self.mean**2) if self.count else 0.0

    @property
    def effective(self) -> float:
        """The effective sample size."""
        return self.count**2 / self.count_squares if self.count_squares else 0.0


@dataclass(frozen=True, slots=True)
class PeriodStats:
    """The calls of one client to one model in one category and period; OTHERS are all but the largest ones.

    `calls` counts those that are evidence, `answered` those with an answer. `latencies` (natural logarithms
    of seconds) and `costs` (USD) cover answered calls. `scores` are grades by their source.
    """

    period: int
    calls: float = 0.0
    answered: float = 0.0
    latencies: Moments = Moments()
    costs: Moments = Moments()
    scores: Mapping[str, Moments] = field(default_factory=dict)
    client: str = ""


@dataclass(frozen=True, slots=True)
class Evidence:
    """The combined evidence of one model in one category. `since` is its oldest period."""

    success: Moments = Moments()
    latencies: Moments = Moments()
    costs: Moments = Moments()
    scores: Mapping[str, Moments] = field(default_factory=dict)
    since: int | None = None
    forgot_before: int | None = None  # the period of the last change; older periods were dropped
    newest_calls: float = 0.0  # calls in the newest period that has any
    seen: float = 0.0  # calls of any age that are included

    @property
    def calls(self) -> float:
        """The effective number of calls."""
        return self.success.effective


def decayed(
    history: Iterable[PeriodStats], now_period: int, *, half_life: float, memory: int, change_errors: float,
    bound: ClientBound = UNBOUNDED,
) -> Evidence:  # fmt: skip
    """Combines periods; `half_life` and `memory` in periods. A period after `now_period` has age 0.

    `bound` limits the weight of each client's calls, and of its grades of each source.
    """
    known = [stats for stats in history if now_period - stats.period < memory]
    clients = _callers(known)
    detected = _since_last_change(_by_period(known, _thinned(known, clients, bound)), change_errors)
    since, kept = _representative(known, clients, detected, bound)
    weights = _thinned(kept, clients, bound, lambda stats: _fade(stats.period, now_period, half_life))
    evidence = Evidence()
    for stats in _by_period(kept, weights):
        evidence = _with(evidence, stats, _fade(stats.period, now_period, half_life))
    newest = max((stats.period for stats in known if stats.calls), default=None)
    return replace(
        evidence,
        forgot_before=since,
        newest_calls=sum(stats.calls for stats in known if stats.period == newest),
        seen=sum(stats.calls for stats in _by_period(kept, _thinned(kept, clients, bound))),
    )


def _callers(known: Iterable[PeriodStats]) -> int:
    """The number of clients with calls; others have only rated answers."""
    return len({stats.client for stats in known if stats.calls})


def _fade(period: int, now_period: int, half_life: float) -> float:
    return float(0.5 ** (max(0, now_period - period) / half_life))


Weights = Mapping[tuple[str, str], float]  # (client, measure) -> share of its observations that counts
CALLS = "calls"  # the measure of success, latency and cost; the others are sources of grades


def _thinned(
    known: Sequence[PeriodStats],
    clients: int,
    bound: ClientBound,
    fade: Callable[[PeriodStats], float] = lambda _stats: 1.0,
) -> Weights:
    """The shares of each client's observations that count, so that none weighs more than the bound."""
    counts: dict[str, dict[str, float]] = {}
    for stats in known:
        for measure, count in _counts(stats).items():
            of_clients = counts.setdefault(measure, {})
            of_clients[stats.client] = of_clients.get(stats.client, 0.0) + count * fade(stats)
    return {
        (client, measure): share
        for measure, of_clients in counts.items()
        for client, share in client_shares(of_clients, max(clients, len(of_clients)), bound).items()
    }


def _counts(stats: PeriodStats) -> dict[str, float]:
    scores = {source: moments.count for source, moments in stats.scores.items()}
    return {**scores, **({CALLS: stats.calls} if stats.calls else {})}


def _by_period(known: Iterable[PeriodStats], weights: Weights) -> list[PeriodStats]:
    """The sums over all clients, newest period first."""
    periods: dict[int, PeriodStats] = {}
    for stats in known:
        one = _weighed(stats, weights)
        periods[one.period] = _merged(periods[one.period], one) if one.period in periods else one
    return sorted(periods.values(), key=lambda stats: -stats.period)


def _weighed(stats: PeriodStats, weights: Weights) -> PeriodStats:
    share = weights.get((stats.client, CALLS), 1.0)
    return PeriodStats(
        stats.period, stats.calls * share, stats.answered * share, stats.latencies.thinned(share),
        stats.costs.thinned(share),
        {source: moments.thinned(weights[stats.client, source]) for source, moments in stats.scores.items()},
    )  # fmt: skip


def _merged(one: PeriodStats, other: PeriodStats) -> PeriodStats:
    return PeriodStats(
        one.period, one.calls + other.calls, one.answered + other.answered, one.latencies + other.latencies,
        one.costs + other.costs, _added(one.scores, other.scores),
    )  # fmt: skip


def _added(one: Mapping[str, Moments], other: Mapping[str, Moments]) -> dict[str, Moments]:
    return {
        source: one.get(source, Moments()) + other.get(source, Moments())
        for source in sorted(one.keys() | other.keys())
    }


def _representative(
    known: Sequence[PeriodStats], clients: int, since: int | None, bound: ClientBound
) -> tuple[int | None, Sequence[PeriodStats]]:
    """The period of the change and the periods from then on; all periods if too few clients saw the change.

    Otherwise a client could be the only evidence that is left.
    """
    if since is not None:
        kept = [stats for stats in known if stats.period >= since]
        if bound.is_met_by(_callers(kept), clients):
            return since, kept
    return None, known


def _with(evidence: Evidence, stats: PeriodStats, weight: float) -> Evidence:
    scores = {source: moments.weighted(weight) for source, moments in stats.scores.items()}
    return Evidence(
        success=evidence.success + Moments.of_share(stats.calls, stats.answered).weighted(weight),
        latencies=evidence.latencies + stats.latencies.weighted(weight),
        costs=evidence.costs + stats.costs.weighted(weight),
        scores=_added(evidence.scores, scores),
        since=stats.period if evidence.since is None else min(evidence.since, stats.period),
    )


def _since_last_change(newest_first: Sequence[PeriodStats], change_errors: float) -> int | None:
    """The period of the last significant change, or None.

    Replays the periods in order: once dropped, a period must not return and hide the next change.
    """
    recent: list[PeriodStats] = []  # oldest first
    single: list[Evidence] = []  # of each period alone
    cumulative: list[Evidence] = [Evidence()]  # of the first n periods
    changed: int | None = None
    for stats in reversed(newest_first):
        recent.append(stats)
        single.append(_with(Evidence(), stats, 1.0))
        cumulative.append(_sum(cumulative[-1], single[-1]))
        change = _last_change(single, cumulative, change_errors)
        if change is not None:
            recent, single = recent[change:], single[change:]
            cumulative = list(itertools.accumulate(single, _sum, initial=Evidence()))
            changed = recent[0].period
    return changed


def _last_change(
    single: Sequence[Evidence], cumulative: Sequence[Evidence], change_errors: float
) -> int | None:
    """The number of oldest periods that differ significantly from all newer ones, or None."""
    if cumulative[-1].success.count < 2 * MIN_CALLS_TO_COMPARE:
        return None
    newer = Evidence()
    for split in range(len(single) - 1, 0, -1):
        newer = _sum(newer, single[split])
        if _differ(newer, cumulative[split], change_errors):
            return split
    return None


def _sum(one: Evidence, other: Evidence) -> Evidence:
    return Evidence(
        one.success + other.success, one.latencies + other.latencies, one.costs + other.costs,
        _added(one.scores, other.scores),
    )  # fmt: skip


def _differ(newer: Evidence, older: Evidence, errors: float) -> bool:
    min_cost = max(newer.costs.mean, older.costs.mean) * (1 - 1 / RELEVANT_RATIO)
    return (
        _changed(newer.success, older.success, errors, RELEVANT_SHARE)
        or any(
            _changed(newer.scores[source], older.scores[source], errors, RELEVANT_SHARE)
            for source in newer.scores.keys() & older.scores.keys()
        )
        or _changed(newer.latencies, older.latencies, errors, math.log(RELEVANT_RATIO))
        or (min_cost > 0 and _changed(newer.costs, older.costs, errors, min_cost))
    )


def _changed(newer: Moments, older: Moments, errors: float, min_difference: float) -> bool:
    """Whether the means differ by `min_difference` and by `errors` standard errors of the difference."""
    if min(newer.count, older.count) < MIN_CALLS_TO_COMPARE:
        return False
    difference = abs(newer.mean - older.mean)
    if difference < min_difference:
        return False
    pooled = (newer.variance * newer.count + older.variance * older.count) / (newer.count + older.count)
    error = math.sqrt(max(pooled, MIN_VARIANCE) * (1 / newer.count + 1 / older.count))
    return difference > errors * error
