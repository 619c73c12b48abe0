"""What a call of a model is worth in a category, with how sure that is. Pure.

    worth = success x (w_success + w_score x score + w_latency x fast + w_cost x cheap) / (all four weights)

where success is the share of calls that were answered, score the mean grade of the answers,
fast = 1 / (1 + seconds / latency_seconds) and cheap = 1 / (1 + USD / cost_usd): the mean worth of a call, if
one that fails is worth nothing. Each mean is drawn towards what is usual in the category.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from router.learning.evidence import Evidence, Moments
from router.settings import UtilitySettings

USUAL_SUCCESS = 0.95  # where nothing is known of any model
USUAL_SCORE = 0.8
SPREAD_OF_SCORES = 0.09  # taken for as many calls as the prior has
SPREAD_OF_LOG_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error."""

    mean: float
    error: float


@dataclass(frozen=True, slots=True)
class Utility:
    """What a call of a model is worth in a category, with its parts; `lower` orders."""

    mean: float
    error: float
    lower: float
    upper: float
    success: Estimate
    score: Estimate
    seconds: float
    cost_usd: float

    @property
    def good(self) -> float:
        """The share of calls that bring a good answer."""
        return self.success.mean * self.score.mean

    @property
    def good_error(self) -> float:
        """The standard error of `good`."""
        return math.hypot(self.score.mean * self.success.error, self.success.mean * self.score.error)


@dataclass(frozen=True, slots=True)
class Prior:
    """What is usual in a category: towards this every model's means are drawn. `calls`: how strongly."""

    success: float
    scores: Mapping[str, float]
    log_seconds: float
    cost_usd: float
    calls: float


def usual(evidences: Sequence[Evidence], utility: UtilitySettings, prior_calls: float) -> Prior:
    """The middle of the models that are known, each as much as the others."""
    seen = [evidence for evidence in evidences if evidence.success.count > 0]
    sources = {source for evidence in seen for source in evidence.scores}
    return Prior(
        success=_middle([e.success for e in seen], USUAL_SUCCESS),
        scores={
            source: _middle([e.scores[source] for e in seen if source in e.scores], USUAL_SCORE)
            for source in sources
        },
        log_seconds=_middle([e.latencies for e in seen], math.log(utility.latency_seconds)),
        cost_usd=_middle([e.costs for e in seen], utility.cost_usd),
        calls=prior_calls,
    )


def _middle(known: Sequence[Moments], otherwise: float) -> float:
    means = sorted(moments.mean for moments in known if moments.count > 0)
    if not means:
        return otherwise
    return (means[(len(means) - 1) // 2] + means[len(means) // 2]) / 2


def beneath(evidence: Evidence, general: Prior, calls: float) -> Prior:
    """What is usual for one model in a topic: what it is in the category, as if `calls` had said so."""

    def drawn(moments: Moments, towards: float) -> float:
        return (moments.total + general.calls * towards) / (moments.count + general.calls)

    return Prior(
        success=drawn(evidence.success, general.success),
        scores={
            source: drawn(evidence.scores.get(source, Moments()), towards)
            for source, towards in general.scores.items()
        },
        log_seconds=drawn(evidence.latencies, general.log_seconds),
        cost_usd=drawn(evidence.costs, general.cost_usd),
        calls=calls,
    )


def worth(
    evidence: Evidence, prior: Prior, utility: UtilitySettings, sources: Mapping[str, float], errors: float
) -> Utility:
    """The worth of a model's call by its evidence, drawn towards `prior`; bounds are `errors` errors off."""
    success = _share(evidence.success, prior.success, prior.calls)
    score = _score(evidence.scores, prior, sources)
    log_seconds = _estimate(evidence.latencies, prior.log_seconds, prior.calls, SPREAD_OF_LOG_SECONDS)
    cost = _estimate(evidence.costs, prior.cost_usd, prior.calls, prior.cost_usd**2)
    fast = 1 / (1 + math.exp(log_seconds.mean) / utility.latency_seconds)
    cheap = 1 / (1 + max(0.0, cost.mean) / utility.cost_usd)
    weights = utility.success + utility.score + utility.latency + utility.cost
    of_answer = (
        utility.success + utility.score * score.mean + utility.latency * fast + utility.cost * cheap
    ) / weights
    parts = (
        of_answer * success.error,
        success.mean * utility.score / weights * score.error,
        success.mean * utility.latency / weights * fast * (1 - fast) * log_seconds.error,
        success.mean * utility.cost / weights * cheap**2 / utility.cost_usd * cost.error,
    )
    mean, error = success.mean * of_answer, math.sqrt(sum(part**2 for part in parts))
    return Utility(
        mean,
        error,
        mean - errors * error,
        mean + errors * error,
        success,
        score,
        math.exp(log_seconds.mean),
        max(0.0, cost.mean),
    )


def call_utility(utility: UtilitySettings, *, score: float, seconds: float, cost_usd: float) -> float:
    """The worth of one call that was answered, by what it was itself; of one that failed it is 0."""
    fast = 1 / (1 + seconds / utility.latency_seconds)
    cheap = 1 / (1 + max(0.0, cost_usd) / utility.cost_usd)
    weights = utility.success + utility.score + utility.latency + utility.cost
    parts = (utility.success, utility.score * score, utility.latency * fast, utility.cost * cheap)
    return sum(parts) / weights


def _share(moments: Moments, prior: float, prior_calls: float) -> Estimate:
    mean = _drawn_mean(moments, prior, prior_calls)
    spread = max(mean * (1 - mean), 1 / (4 * (moments.effective + prior_calls)))  # never quite certain
    return Estimate(mean, math.sqrt(spread / (moments.effective + prior_calls)))


def _estimate(moments: Moments, prior: float, prior_calls: float, prior_spread: float) -> Estimate:
    effective = moments.effective
    spread = (moments.variance * effective + prior_spread * prior_calls) / (effective + prior_calls)
    mean = _drawn_mean(moments, prior, prior_calls)
    return Estimate(mean, math.sqrt(spread / (effective + prior_calls)))


def _drawn_mean(moments: Moments, prior: float, prior_calls: float) -> float:
    effective = moments.effective
    return (moments.mean * effective + prior * prior_calls) / (effective + prior_calls)


def _score(scores: Mapping[str, Moments], prior: Prior, sources: Mapping[str, float]) -> Estimate:
    """The weighed mean over the sources that the category knows; a source silent on this model is average."""
    known = {source: sources.get(source, 0.0) for source in prior.scores if sources.get(source, 0.0) > 0}
    if not known:
        return Estimate(USUAL_SCORE, math.sqrt(SPREAD_OF_SCORES / prior.calls))
    mean, variance, weights = 0.0, 0.0, sum(known.values())
    for source, weight in known.items():
        grade = _estimate(scores.get(source, Moments()), prior.scores[source], prior.calls, SPREAD_OF_SCORES)
        mean += weight / weights * grade.mean
        variance += (weight / weights * grade.error) ** 2
    return Estimate(mean, math.sqrt(variance))
