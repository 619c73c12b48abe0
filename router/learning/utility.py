"""Utility of a model's calls in a category, with its standard error. Pure.

    utility = success x (w_success + w_score x score + w_latency x fast + w_cost x cheap) / sum of weights
    fast = 1 / (1 + seconds / latency_seconds)        cheap = 1 / (1 + USD / cost_usd)

where success is the share of answered calls and score the mean grade of the answers. This is the mean utility
of a call if a failed call has utility 0. Each mean is shrunk towards the category's prior (empirical Bayes).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from router.learning.evidence import Evidence, Moments
from router.settings import UtilitySettings

DEFAULT_SUCCESS = 0.95  # the prior where no model has evidence
DEFAULT_SCORE = 0.8
PRIOR_SCORE_VARIANCE = 0.09
PRIOR_LOG_SECONDS_VARIANCE = 0.5


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error."""

    mean: float
    error: float


@dataclass(frozen=True, slots=True)
class Utility:
    """Estimated utility of a model's calls and its parts. Models are ordered by `lower`."""

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
        """The share of calls with a good answer."""
        return self.success.mean * self.score.mean

    @property
    def good_error(self) -> float:
        """The standard error of `good`."""
        return math.hypot(self.score.mean * self.success.error, self.success.mean * self.score.error)


@dataclass(frozen=True, slots=True)
class Prior:
    """Prior means, with the weight of `calls` observations."""

    success: float
    scores: Mapping[str, float]
    log_seconds: float
    cost_usd: float
    calls: float


def category_prior(evidences: Sequence[Evidence], utility: UtilitySettings, prior_calls: float) -> Prior:
    """The prior of a category: the median over its models that have evidence."""
    seen = [evidence for evidence in evidences if evidence.success.count > 0]
    sources = {source for evidence in seen for source in evidence.scores}
    return Prior(
        success=_median([e.success for e in seen], DEFAULT_SUCCESS),
        scores={
            source: _median([e.scores[source] for e in seen if source in e.scores], DEFAULT_SCORE)
            for source in sources
        },
        log_seconds=_median([e.latencies for e in seen], math.log(utility.latency_seconds)),
        cost_usd=_median([e.costs for e in seen], utility.cost_usd),
        calls=prior_calls,
    )


def _median(moments: Sequence[Moments], default: float) -> float:
    means = sorted(one.mean for one in moments if one.count > 0)
    if not means:
        return default
    return (means[(len(means) - 1) // 2] + means[len(means) // 2]) / 2


def estimate_utility(
    evidence: Evidence, prior: Prior, utility: UtilitySettings, sources: Mapping[str, float], errors: float
) -> Utility:
    """Estimates the utility of a model's calls, shrunk towards `prior`.

    `sources` weights the sources of grades; the bounds are `errors` standard errors from the mean.
    """
    success = _share(evidence.success, prior.success, prior.calls)
    score = _score(evidence.scores, prior, sources)
    log_seconds = _estimate(evidence.latencies, prior.log_seconds, prior.calls, PRIOR_LOG_SECONDS_VARIANCE)
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
    """The utility of one answered call, from its own values; a failed call has utility 0."""
    fast = 1 / (1 + seconds / utility.latency_seconds)
    cheap = 1 / (1 + max(0.0, cost_usd) / utility.cost_usd)
    weights = utility.success + utility.score + utility.latency + utility.cost
    parts = (utility.success, utility.score * score, utility.latency * fast, utility.cost * cheap)
    return sum(parts) / weights


def _share(moments: Moments, prior: float, prior_calls: float) -> Estimate:
    mean = _shrunk_mean(moments, prior, prior_calls)
    variance = max(mean * (1 - mean), 1 / (4 * (moments.effective + prior_calls)))  # never quite certain
    return Estimate(mean, math.sqrt(variance / (moments.effective + prior_calls)))


def _estimate(moments: Moments, prior: float, prior_calls: float, prior_variance: float) -> Estimate:
    effective = moments.effective
    variance = (moments.variance * effective + prior_variance * prior_calls) / (effective + prior_calls)
    mean = _shrunk_mean(moments, prior, prior_calls)
    return Estimate(mean, math.sqrt(variance / (effective + prior_calls)))


def _shrunk_mean(moments: Moments, prior: float, prior_calls: float) -> float:
    effective = moments.effective
    return (moments.mean * effective + prior * prior_calls) / (effective + prior_calls)


def _score(scores: Mapping[str, Moments], prior: Prior, sources: Mapping[str, float]) -> Estimate:
    """The weighted mean over the category's sources; without grades of a source its prior counts."""
    known = {source: sources.get(source, 0.0) for source in prior.scores if sources.get(source, 0.0) > 0}
    if not known:
        return Estimate(DEFAULT_SCORE, math.sqrt(PRIOR_SCORE_VARIANCE / prior.calls))
    mean, variance, weights = 0.0, 0.0, sum(known.values())
    for source, weight in known.items():
        grade = _estimate(
            scores.get(source, Moments()), prior.scores[source], prior.calls, PRIOR_SCORE_VARIANCE
        )
        mean += weight / weights * grade.mean
        variance += (weight / weights * grade.error) ** 2
    return Estimate(mean, math.sqrt(variance))
