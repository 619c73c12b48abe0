"""Ranks the models of a category by their evidence. Pure.

Models are ordered by a lower confidence bound of their utility (see `utility`): the mean minus `bound_errors`
standard errors. A model overtakes another only by a margin, so that the order does not flap.

A bounded share of the category's tasks explores: it goes to models below the floor and on probation, which
get no other traffic, and to models whose upper bound still exceeds the lower bound of the first.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from router.learning.evidence import Evidence
from router.learning.utility import Prior, Utility, category_prior, estimate_utility
from router.settings import LearningSettings

UNBOUNDED = 1.0  # share of the tasks


class Standing(str, enum.Enum):
    """Standing of a model in a category; the values are stored."""

    RANKED = "ranked"
    NEW = "young"  # too few calls: it keeps its rank and gets some exploration
    PROBATION = "trial"  # its share is bounded
    BELOW_FLOOR = "low"  # it gets only exploration

    @property
    def label(self) -> str:
        """The standing as it is shown to people."""
        return _LABELS[self]


_LABELS = {
    Standing.RANKED: "ranked",
    Standing.NEW: "new (few calls)",
    Standing.PROBATION: "on probation",
    Standing.BELOW_FLOOR: "below the floor",
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model to be ranked. `place` is its rank so far; 1 is first."""

    model: str
    place: int
    evidence: Evidence = field(default_factory=Evidence)
    on_probation: bool = False


@dataclass(frozen=True, slots=True)
class Placed:
    """A model with its new rank. It gets between `least_share` and `most_share` of the tasks.

    `quality` is the lower bound, made non-increasing from rank to rank; the assignment maximizes it.
    """

    model: str
    place: int
    place_before: int
    standing: Standing
    utility: Utility
    evidence: Evidence
    quality: float
    least_share: float
    most_share: float
    reason: str


def rank(
    category: str,
    candidates: Sequence[Candidate],
    learning: LearningSettings,
    priors: Mapping[str, Prior] | None = None,
) -> list[Placed]:
    """Ranks the candidates, best first. Without evidence the order stays.

    `priors` replaces the category's prior for single models.
    """
    settings = learning.utility_of(category)
    prior = category_prior([c.evidence for c in candidates], settings, learning.prior_calls)
    utilities = {
        c.model: estimate_utility(
            c.evidence, (priors or {}).get(c.model, prior), settings, learning.grading.sources,
            learning.bound_errors,
        )
        for c in candidates
    }  # fmt: skip
    standings = _standings(candidates, utilities, settings.floor, learning)
    before = sorted(candidates, key=lambda c: (c.place, c.model))
    low = [c for c in before if standings[c.model] is Standing.BELOW_FLOOR]
    order = _ordered([c for c in before if c not in low], utilities, learning)
    order += sorted(low, key=lambda c: -utilities[c.model].lower)
    shares = _shares(order, utilities, standings, settings.floor, learning)
    qualities = _non_increasing([utilities[c.model].lower for c in order])
    return [
        Placed(
            c.model, place, c.place, standings[c.model], utilities[c.model], c.evidence, quality,
            *shares[c.model], _reason(c, order, utilities, standings[c.model], settings.floor),
        )
        for place, (c, quality) in enumerate(zip(order, qualities, strict=True), 1)
    ]  # fmt: skip


def _standings(
    candidates: Sequence[Candidate],
    utilities: Mapping[str, Utility],
    floor: float,
    learning: LearningSettings,
) -> dict[str, Standing]:
    standings = {}
    for c in candidates:
        own, has_enough = utilities[c.model], c.evidence.seen >= learning.enough_calls
        is_below = own.good + learning.bound_errors * own.good_error < floor
        if is_below and (has_enough or own.success.mean < floor):
            standings[c.model] = Standing.BELOW_FLOOR
        elif c.on_probation:
            standings[c.model] = Standing.PROBATION
        else:
            standings[c.model] = Standing.RANKED if has_enough else Standing.NEW
    regular = [m for m, standing in standings.items() if standing in (Standing.RANKED, Standing.NEW)]
    if candidates and not regular:  # one model has to take the tasks
        standings[max(standings, key=lambda model: utilities[model].lower)] = Standing.RANKED
    return standings


def _ordered(
    before: Sequence[Candidate], utilities: Mapping[str, Utility], learning: LearningSettings
) -> list[Candidate]:
    """Fills rank by rank: the previous holder, unless another model is better by the margin."""
    left, order = list(before), []
    while left:
        first = left[0]
        rivals = [c for c in left[1:] if c.evidence.seen >= learning.enough_calls]
        best = max(rivals, key=lambda c: utilities[c.model].lower, default=first)
        if _overtakes(utilities[best.model], utilities[first.model], first.evidence, learning):
            first = best
        left.remove(first)
        order.append(first)
    return order


def _overtakes(best: Utility, first: Utility, known: Evidence, learning: LearningSettings) -> bool:
    if known.seen < learning.enough_calls:  # a new model loses its rank only if it is clearly worse
        return best.lower > first.mean + learning.bound_errors * first.error + learning.margin
    error = math.hypot(best.error, first.error)
    return (
        best.lower > first.lower + learning.margin and best.mean - first.mean > learning.margin_errors * error
    )


def _shares(
    order: Sequence[Candidate],
    utilities: Mapping[str, Utility],
    standings: Mapping[str, Standing],
    floor: float,
    learning: LearningSettings,
) -> dict[str, tuple[float, float]]:
    """model -> (least, most) share of the category's tasks.

    Half of the exploration is split evenly among models without other traffic, and models that may still be
    below the floor: ranked last after many failures, they would otherwise never show that they recovered.
    The other half goes to new models, then to models that may be better than the first, most of it to one
    at a time.
    """
    shut_out = [c.model for c in order if standings[c.model] in (Standing.BELOW_FLOOR, Standing.PROBATION)]
    first = utilities[order[0].model] if order else None
    new = [c for c in order if standings[c.model] is Standing.NEW]
    others = [c for c in order[1:] if standings[c.model] is Standing.RANKED]
    promising = [c.model for c in sorted(new, key=lambda c: -c.evidence.seen)]
    promising += sorted(
        (c.model for c in others if first and utilities[c.model].upper > first.lower),
        key=lambda model: -utilities[model].upper,
    )
    doubtful = [
        c.model
        for c in others
        if c.model not in promising
        and utilities[c.model].good - learning.bound_errors * utilities[c.model].good_error < floor
    ]
    calls = sum(c.evidence.newest_calls for c in order)
    cap = learning.exploration.calls / calls if calls > 0 else UNBOUNDED
    half = learning.exploration.share / (2 if (shut_out or doubtful) and promising else 1)
    given = {model: min(cap, half / len(shut_out + doubtful)) for model in shut_out + doubtful}
    left = half
    for model in promising:
        given[model] = min(cap, left / 2)
        left -= given[model]
    return {
        c.model: (given.get(c.model, 0.0), given[c.model] if c.model in shut_out else UNBOUNDED)
        for c in order
    }


def _non_increasing(lowers: Sequence[float]) -> list[float]:
    """Raises each number to the highest that follows it."""
    qualities, highest = [], 0.0
    for lower in reversed(lowers):
        highest = max(highest, lower)
        qualities.append(highest)
    return qualities[::-1]


def _reason(
    candidate: Candidate,
    order: Sequence[Candidate],
    utilities: Mapping[str, Utility],
    standing: Standing,
    floor: float,
) -> str:
    own, place = utilities[candidate.model], order.index(candidate) + 1
    if standing is Standing.BELOW_FLOOR:
        return f"{own.good:.0%} of its calls return a good answer, below the floor of {floor:.0%}"
    if standing is Standing.NEW:
        return f"new: {candidate.evidence.seen:.0f} calls are too few to rank it"
    passed = [c.model for c in order[place:] if c.place < candidate.place]
    passed_by = [c.model for c in order[: place - 1] if c.place > candidate.place]
    if passed:
        return f"its bound of {own.lower:.3f} exceeds {', '.join(passed)}"
    if passed_by:
        return f"its bound of {own.lower:.3f} is exceeded by {', '.join(passed_by)}"
    return f"bound {own.lower:.3f}"
