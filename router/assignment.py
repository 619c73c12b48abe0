"""Which categories a model pulls now: the transport problem of backlog and targets. Pure.

Quality first, and no quota idle: all the work that can be done is done, and among the ways to do it the one
of the highest quality by rank is taken. Solved as a linear program (scipy's HiGHS; ten models by three
categories take a few milliseconds), only when something changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import linprog

WORST_PLACE = 1_000
MOST_OWED = 3.0  # calls: a backlog that came late is not made up for at the cost of all others


@dataclass(frozen=True, slots=True)
class Work:
    """What there is to do, and who may do how much.

    backlog: category -> tasks; rates: model -> calls a second that its target allows; places: category ->
    model -> place in the ranking, 1 is best (a model without a place comes last).
    """

    backlog: Mapping[str, int]
    rates: Mapping[str, float]
    places: Mapping[str, Mapping[str, int]]


def quality(place: int | None) -> float:
    """The worth of a place: 1 for the first, 1/2 for the second, and so on; nearly nothing without one."""
    return 1.0 / (place or WORST_PLACE)


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
    worth = np.array([[quality(work.places.get(c, {}).get(m)) for c in categories] for m in models])
    calls = _transport(worth, capacity, backlog)
    totals = calls.sum(axis=1)
    result: dict[str, dict[str, float]] = {model: {} for model in work.rates}
    for row, model in enumerate(models):
        if totals[row] > 0:
            result[model] = {
                category: float(calls[row, column] / totals[row])
                for column, category in enumerate(categories)
                if calls[row, column] > 0
            }
    return result


def _transport(worth: np.ndarray, capacity: np.ndarray, backlog: np.ndarray) -> np.ndarray:
    rows, columns = worth.shape
    # The constant makes every call worth more than any difference in quality: throughput comes first.
    cost = -(worth + 1.0 + worth.max()).ravel()
    of_model = np.kron(np.eye(rows), np.ones(columns))
    of_category = np.kron(np.ones(rows), np.eye(columns))
    solution = linprog(
        cost,
        A_ub=np.vstack([of_model, of_category]),
        b_ub=np.concatenate([capacity, backlog]),
        method="highs",
    )
    if solution.x is None:  # cannot be: doing nothing is always allowed
        return np.zeros((rows, columns))
    return np.asarray(solution.x).reshape(rows, columns).clip(min=0.0)


@dataclass
class PullOrder:
    """In which order one model asks for categories: where it is furthest behind its share comes first.

    Smooth weighted round robin: each pull earns every category its share, and costs the one that was pulled a
    whole call. Debts survive a change of shares, which come anew every second, but are bounded. All known
    categories are in the order, those without a share last and by quality: no quota is idle.
    """

    places: Mapping[str, int]  # category -> this model's place there
    wanted: Mapping[str, float] = field(default_factory=dict)
    owed: dict[str, float] = field(default_factory=dict)

    def aim(self, wanted: Mapping[str, float], places: Mapping[str, int]) -> None:
        """Take new shares; what is owed from before stays."""
        self.wanted = wanted
        self.places = places

    def took(self, category: str) -> None:
        """One task of this category was pulled."""
        for name in {*self.wanted, category}:
            owed = self.owed.get(name, 0.0) + self.wanted.get(name, 0.0) - (name == category)
            self.owed[name] = max(-MOST_OWED, min(MOST_OWED, owed))

    def categories(self, known: Sequence[str]) -> list[str]:
        """The order in which to ask now."""

        def key(category: str) -> tuple[bool, float, float]:
            share = self.wanted.get(category, 0.0)
            behind = share + self.owed.get(category, 0.0) if share > 0 else 0.0
            return (share <= 0, -behind, -quality(self.places.get(category)))

        return sorted(known, key=key)
