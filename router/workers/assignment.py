"""Which categories a model pulls now: the transport problem of backlog and targets. Pure.

Quality first, and no quota idle: all the work that may be done is done, and among the ways to do it the one
of the highest quality is taken: the one that was learned, or by place where none was. Models that have to
prove themselves get no more than their share of a category, and no less, if they can. Solved as a linear
program (scipy's HiGHS; ten models by three categories take a few milliseconds), only when something changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import linprog

from router.models.ranked import RankedModel, Rankings

WORST_PLACE = 1_000
MOST_EXPLORED = 0.5  # of a model's calls, and of a category's tasks, where the least shares ask for more
MOST_CREDIT = 2.0  # calls: what a model did not explore in time it does not explore all at once
MOST_OWED = 3.0  # calls: a backlog that came late is not made up for at the cost of all others


@dataclass(frozen=True, slots=True)
class Work:
    """What there is to do, and who may do how much.

    backlog: category -> tasks; rates: model -> calls a second that its target allows; places: category ->
    model -> place in the ranking, 1 is best (a model without a place comes last); learned: category -> model
    -> what the log taught, where it did.
    """

    backlog: Mapping[str, int]
    rates: Mapping[str, float]
    places: Mapping[str, Mapping[str, int]]
    learned: Rankings = field(default_factory=dict)


def quality(place: int | None) -> float:
    """The worth of a place: 1 for the first, 1/2 for the second, and so on; nearly nothing without one."""
    return 1.0 / (place or WORST_PLACE)


def quality_in(work: Work, category: str, model: str) -> float:
    """What was learned of the model; where others were learned and it was not, less than any of them."""
    learned = work.learned.get(category, {})
    if model in learned:
        return learned[model].quality
    by_place = quality(work.places.get(category, {}).get(model))
    return by_place * min((other.quality for other in learned.values()), default=1.0)


def bounds(work: Work) -> dict[str, dict[str, float]]:
    """model -> category -> the most of the category's tasks that it may have, where that is not all.

    There is no bound in a category in which nobody else can do the work.
    """
    found: dict[str, dict[str, float]] = {}
    for category, learned in work.learned.items():
        free = [m for m, rate in work.rates.items() if rate > 0 and _most(learned, m) >= 1]
        for model in learned if free else ():
            if learned[model].most_share < 1:
                found.setdefault(model, {})[category] = learned[model].most_share
    return found


def _most(learned: Mapping[str, RankedModel], model: str) -> float:
    return learned[model].most_share if model in learned else 1.0


def shares(work: Work) -> dict[str, dict[str, float]]:
    """model -> category -> share of the model's calls that should go there; each model's shares add up to 1.

    The horizon is the time in which all models together could do all the work, so that none ends early.
    A model that gets nothing has no shares: it takes what it is best at.
    """
    models = [model for model, rate in work.rates.items() if rate > 0]
    categories = [category for category, tasks in work.backlog.items() if tasks > 0]
    if not models or not categories:
        return {model: {} for model in work.rates}
    rates = np.array([work.rates[model] for model in models])
    backlog = np.array([float(work.backlog[category]) for category in categories])
    capacity = rates * (backlog.sum() / rates.sum())
    worth = np.array([[quality_in(work, c, m) for c in categories] for m in models])
    least, most = _least_and_most(work, models, categories)
    calls = _transport(worth, capacity, backlog, least, most)
    result: dict[str, dict[str, float]] = {model: {} for model in work.rates}
    for row, model in enumerate(models):
        # Of a model whose share is bounded some calls may be left over: for them it asks for nothing.
        total = calls[row].sum()
        if total > 0:
            result[model] = {
                category: float(calls[row, column] / total)
                for column, category in enumerate(categories)
                if calls[row, column] > 0
            }
    return result


def _least_and_most(
    work: Work, models: Sequence[str], categories: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Model by category: the least and the most share of the tasks."""
    bounded = bounds(work)
    least, most = np.zeros((len(models), len(categories))), np.ones((len(models), len(categories)))
    for row, model in enumerate(models):
        for column, category in enumerate(categories):
            learned = work.learned.get(category, {}).get(model)
            least[row, column] = learned.least_share if learned else 0.0
            most[row, column] = bounded.get(model, {}).get(category, 1.0)
    return least, most


def _transport(
    worth: np.ndarray, capacity: np.ndarray, backlog: np.ndarray, least: np.ndarray, most: np.ndarray
) -> np.ndarray:
    rows, columns = worth.shape
    # The constant makes every call worth more than any difference in quality: throughput comes first.
    cost = -(worth + 1.0 + worth.max()).ravel()
    of_model = np.kron(np.eye(rows), np.ones(columns))
    of_category = np.kron(np.ones(rows), np.eye(columns))
    lower = np.minimum(least, most) * backlog
    lower *= np.minimum(1.0, MOST_EXPLORED * capacity / np.maximum(lower.sum(axis=1), 1e-9))[:, None]
    lower *= np.minimum(1.0, MOST_EXPLORED * backlog / np.maximum(lower.sum(axis=0), 1e-9))
    solution = linprog(
        cost,
        A_ub=np.vstack([of_model, of_category]),
        b_ub=np.concatenate([capacity, backlog]),
        bounds=np.stack([lower.ravel(), np.maximum(most * backlog, lower).ravel()], axis=1),
        method="highs",
    )
    if solution.x is None:  # cannot be: the least shares leave half of everything free
        return np.zeros((rows, columns))
    return np.asarray(solution.x).reshape(rows, columns).clip(min=0.0)


@dataclass
class PullOrder:
    """In which order one model asks for categories: where it is furthest behind its share comes first.

    Smooth weighted round robin: each pull earns every category its share, and costs the one that was pulled a
    whole call. Debts survive a change of shares, which come anew every second, but are bounded. All known
    categories are in the order, those without a share last and by quality: no quota is idle. But where the
    model's share is bounded, each call has to be earned by what all models have solved there.
    """

    places: Mapping[str, int]  # category -> this model's place there
    wanted: Mapping[str, float] = field(default_factory=dict)
    owed: dict[str, float] = field(default_factory=dict)
    bounds: Mapping[str, float] = field(default_factory=dict)
    credit: dict[str, float] = field(default_factory=dict)
    solved: Mapping[str, int] = field(default_factory=dict)

    def aim(self, wanted: Mapping[str, float], places: Mapping[str, int]) -> None:
        """Take new shares; what is owed from before stays."""
        self.wanted = wanted
        self.places = places

    def bound(self, bounds: Mapping[str, float], solved: Mapping[str, int]) -> None:
        """Pull no more than these shares of what all models solve; `solved`: category -> tasks up to now."""
        for category, share in bounds.items():
            more = max(0, solved.get(category, 0) - self.solved.get(category, solved.get(category, 0)))
            self.credit[category] = min(MOST_CREDIT, self.credit.get(category, 0.0) + share * more)
        self.bounds, self.solved = bounds, solved

    def took(self, category: str) -> None:
        """One task of this category was pulled."""
        for name in {*self.wanted, category}:
            owed = self.owed.get(name, 0.0) + self.wanted.get(name, 0.0) - (name == category)
            self.owed[name] = max(-MOST_OWED, min(MOST_OWED, owed))
        if category in self.bounds:
            self.credit[category] -= 1.0

    def categories(self, known: Sequence[str]) -> list[str]:
        """The order in which to ask now; without those of which the model has had its share."""

        def key(category: str) -> tuple[bool, float, float]:
            share = self.wanted.get(category, 0.0)
            behind = share + self.owed.get(category, 0.0) if share > 0 else 0.0
            return (share <= 0, -behind, -quality(self.places.get(category)))

        allowed = [name for name in known if name not in self.bounds or self.credit[name] >= 1.0]
        return sorted(allowed, key=key)
