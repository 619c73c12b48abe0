"""Which model is first for a category: from evidence to an order. Pure.

Models are ordered by a lower bound of their worth there (see `worth.py`): the mean less `bound_errors`
standard errors. An order changes only where the margin is passed, so that it does not flap.

A bounded share of a category's tasks goes to models that have to prove themselves: those below the floor and
on probation, which get nothing beyond it, and those that may be better than the first for all that is known.

A `Key` is a category, or a topic beneath it: a topic's evidence is drawn towards its category's
(`beneath`), so that it may be thin.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from router.learning.evidence import Evidence
from router.learning.utility import Prior, Utility, usual, worth
from router.settings import LearningSettings

ALL = 1.0  # of the tasks: no bound


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """What a ranking is of: a category, or a topic beneath it."""

    category: str
    topic: str = ""


class Standing(str, enum.Enum):
    """How a model stands in a category."""

    RANKED = "ranked"
    YOUNG = "young"  # too few calls: it keeps its place and is given some
    TRIAL = "trial"  # on probation: its share is bounded
    LOW = "low"  # below the floor: it gets nothing but exploration


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model to be placed: where it stood (1 is first), whether it is on probation, what is known of it."""

    model: str
    place: int
    evidence: Evidence = field(default_factory=Evidence)
    on_probation: bool = False


@dataclass(frozen=True, slots=True)
class Placed:
    """A model in its new place. It gets at least `least_share` of the tasks, at most `most_share`.

    `quality` is the lower bound, made to fall from place to place: what `assignment` weighs.
    """

    model: str
    place: int
    place_before: int
    standing: Standing
    worth: Utility
    evidence: Evidence
    quality: float
    least_share: float
    most_share: float
    reason: str


def rank(
    key: Key,
    candidates: Sequence[Candidate],
    learning: LearningSettings,
    priors: Mapping[str, Prior] | None = None,
) -> list[Placed]:
    """The candidates in their new order. Without any evidence nothing moves.

    `priors`: what each model is drawn towards; by default what is usual among the candidates.
    """
    utility = learning.utility_of(key.category)
    general = usual([c.evidence for c in candidates], utility, learning.prior_calls)
    worths = {
        c.model: worth(
            c.evidence, (priors or {}).get(c.model, general), utility, learning.grading.sources,
            learning.bound_errors,
        )
        for c in candidates
    }  # fmt: skip
    standings = _standings(candidates, worths, utility.floor, learning)
    before = sorted(candidates, key=lambda c: (c.place, c.model))
    low = [c for c in before if standings[c.model] is Standing.LOW]
    order = _ordered([c for c in before if c not in low], worths, learning)
    order += sorted(low, key=lambda c: -worths[c.model].lower)
    shares = _shares(order, worths, standings, utility.floor, learning)
    qualities = _falling([worths[c.model].lower for c in order])
    return [
        Placed(
            c.model, place, c.place, standings[c.model], worths[c.model], c.evidence, quality,
            *shares[c.model], _reason(c, order, worths, standings[c.model], utility.floor),
        )
        for place, (c, quality) in enumerate(zip(order, qualities, strict=True), 1)
    ]  # fmt: skip


def _standings(
    candidates: Sequence[Candidate], worths: Mapping[str, Utility], floor: float, learning: LearningSettings
) -> dict[str, Standing]:
    standings = {}
    for c in candidates:
        own, judged = worths[c.model], c.evidence.seen >= learning.enough_calls
        surely = own.good + learning.bound_errors * own.good_error < floor
        if surely and (judged or own.success.mean < floor):
            standings[c.model] = Standing.LOW
        elif c.on_probation:
            standings[c.model] = Standing.TRIAL
        else:
            standings[c.model] = Standing.RANKED if judged else Standing.YOUNG
    regular = [m for m, standing in standings.items() if standing in (Standing.RANKED, Standing.YOUNG)]
    if candidates and not regular:  # somebody must do the work
        standings[max(standings, key=lambda model: worths[model].lower)] = Standing.RANKED
    return standings


def _ordered(
    before: Sequence[Candidate], worths: Mapping[str, Utility], learning: LearningSettings
) -> list[Candidate]:
    """Place by place: the one who stood here before, unless another is better beyond the margin."""
    left, order = list(before), []
    while left:
        first = left[0]
        rivals = [c for c in left[1:] if c.evidence.seen >= learning.enough_calls]
        best = max(rivals, key=lambda c: worths[c.model].lower, default=first)
        if _overtakes(worths[best.model], worths[first.model], first.evidence, learning):
            first = best
        left.remove(first)
        order.append(first)
    return order


def _overtakes(best: Utility, first: Utility, known: Evidence, learning: LearningSettings) -> bool:
    if known.seen < learning.enough_calls:  # only if it is surely worse
        return best.lower > first.mean + learning.bound_errors * first.error + learning.margin
    error = math.hypot(best.error, first.error)
    return (
        best.lower > first.lower + learning.margin and best.mean - first.mean > learning.margin_errors * error
    )


def _shares(
    order: Sequence[Candidate],
    worths: Mapping[str, Utility],
    standings: Mapping[str, Standing],
    floor: float,
    learning: LearningSettings,
) -> dict[str, tuple[float, float]]:
    """model -> (least, most) share of the category's tasks.

    One half of what exploration takes goes to those who get nothing else, in equal parts; the other, most of
    it to one at a time, to those with too few calls, then to those who may be better than the first for all
    that is known. One that may be below the floor still, for all that is known, counts with the former: after
    so many bad calls it is last, nobody would ask it again, and that it is well now would never be known.
    """
    shut = [c.model for c in order if standings[c.model] in (Standing.LOW, Standing.TRIAL)]
    first = worths[order[0].model] if order else None
    young = [c for c in order if standings[c.model] is Standing.YOUNG]
    others = [c for c in order[1:] if standings[c.model] is Standing.RANKED]
    promising = [c.model for c in sorted(young, key=lambda c: -c.evidence.seen)]
    promising += sorted(
        (c.model for c in others if first and worths[c.model].upper > first.lower),
        key=lambda model: -worths[model].upper,
    )
    doubted = [
        c.model
        for c in others
        if c.model not in promising
        and worths[c.model].good - learning.bound_errors * worths[c.model].good_error < floor
    ]
    calls = sum(c.evidence.newest_calls for c in order)
    cap = learning.exploration.calls / calls if calls > 0 else ALL
    half = learning.exploration.share / (2 if (shut or doubted) and promising else 1)
    given = {model: min(cap, half / len(shut + doubted)) for model in shut + doubted}
    left = half
    for model in promising:
        given[model] = min(cap, left / 2)
        left -= given[model]
    return {c.model: (given.get(c.model, 0.0), given[c.model] if c.model in shut else ALL) for c in order}


def _falling(lowers: Sequence[float]) -> list[float]:
    """The same numbers, none lower than one that follows."""
    falling, highest = [], 0.0
    for lower in reversed(lowers):
        highest = max(highest, lower)
        falling.append(highest)
    return falling[::-1]


def _reason(
    candidate: Candidate,
    order: Sequence[Candidate],
    worths: Mapping[str, Utility],
    standing: Standing,
    floor: float,
) -> str:
    own, place = worths[candidate.model], order.index(candidate) + 1
    if standing is Standing.LOW:
        return f"{own.good:.0%} of its calls bring a good answer, below the floor of {floor:.0%}"
    if standing is Standing.YOUNG:
        return f"{candidate.evidence.seen:.0f} calls, too few to judge it by"
    passed = [c.model for c in order[place:] if c.place < candidate.place]
    passed_by = [c.model for c in order[: place - 1] if c.place > candidate.place]
    if passed:
        return f"its bound of {own.lower:.3f} passes {', '.join(passed)}"
    if passed_by:
        return f"its bound of {own.lower:.3f} is passed by {', '.join(passed_by)}"
    return f"bound {own.lower:.3f}"
