"""Assigns categories to models: a transport problem of backlog and targets. Pure.

Maximizes throughput first and quality second. Quality is the learned score, or the rank where there is none.
Models on probation get their share of a category, no more and, if possible, no less. The problem is solved as
a linear program (scipy's HiGHS; ten models by three categories take a few milliseconds), only after a change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import linprog

from router.models.ranked import RankedModel, Rankings

UNRANKED = 1_000  # rank of a model without one
MAX_EXPLORATION = 0.5  # of a model's calls and of a category's tasks, for minimum shares
MAX_CREDIT = 2.0  # calls: a bounded model saves up no more
MAX_DEFICIT = 3.0  # calls: a category whose backlog arrives late catches up no more at the cost of others


@dataclass(frozen=True, slots=True)
class Work:
    """Backlog, capacity and quality.

    backlog: category -> tasks. rates: model -> calls a second that its target allows. places: category ->
    model -> rank, 1 is best; a model without a rank comes last. learned: category -> model -> learned rank.
    """

    backlog: Mapping[str, int]
    rates: Mapping[str, float]
    places: Mapping[str, Mapping[str, int]]
    learned: Rankings = field(default_factory=dict)


def quality(place: int | None) -> float:
    """Returns the quality of a rank: 1 for the first, 1/2 for the second, and nearly 0 without one."""
    return 1.0 / (place or UNRANKED)


def quality_in(work: Work, category: str, model: str) -> float:
    """Returns the learned quality; for a model without one, less than that of every model with one."""
    learned = work.learned.get(category, {})
    if model in learned:
        return learned[model].quality
    by_place = quality(work.places.get(category, {}).get(model))
    return by_place * min((other.quality for other in learned.values()), default=1.0)


def bounds(work: Work) -> dict[str, dict[str, float]]:
    """Returns model -> category -> maximum share of the category's tasks, where it is below 1.

    A category has no bounds if every model that can work is bounded there.
    """
    found: dict[str, dict[str, float]] = {}
    for category, learned in work.learned.items():
        free = [m for m, rate in work.rates.items() if rate > 0 and _max_share(learned, m) >= 1]
        for model in learned if free else ():
            if learned[model].most_share < 1:
                found.setdefault(model, {})[category] = learned[model].most_share
    return found


def _max_share(learned: Mapping[str, RankedModel], model: str) -> float:
    return learned[model].most_share if model in learned else 1.0


def shares(work: Work) -> dict[str, dict[str, float]]:
    """Returns model -> category -> share of the model's calls; the shares of a model add up to 1.

    The horizon is the time in which all models together can do all the work, so that none runs out early.
    A model that is assigned nothing has no shares: it pulls what it is best at.
    """
    models = [model for model, rate in work.rates.items() if rate > 0]
    categories = [category for category, tasks in work.backlog.items() if tasks > 0]
    if not models or not categories:
        return {model: {} for model in work.rates}
    rates = np.array([work.rates[model] for model in models])
    backlog = np.array([float(work.backlog[category]) for category in categories])
    capacity = rates * (backlog.sum() / rates.sum())
    qualities = np.array([[quality_in(work, c, m) for c in categories] for m in models])
    lower, upper = _share_limits(work, models, categories)
    calls = _transport(qualities, capacity, backlog, lower, upper)
    result: dict[str, dict[str, float]] = {model: {} for model in work.rates}
    for row, model in enumerate(models):
        # A bounded model may have calls left over; they are assigned to nothing.
        total = calls[row].sum()
        if total > 0:
            result[model] = {
                category: float(calls[row, column] / total)
                for column, category in enumerate(categories)
                if calls[row, column] > 0
            }
    return result


def _share_limits(
    work: Work, models: Sequence[str], categories: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns minimum and maximum share of the tasks, both model by category."""
    bounded = bounds(work)
    lower, upper = np.zeros((len(models), len(categories))), np.ones((len(models), len(categories)))
    for row, model in enumerate(models):
        for column, category in enumerate(categories):
            learned = work.learned.get(category, {}).get(model)
            lower[row, column] = learned.least_share if learned else 0.0
            upper[row, column] = bounded.get(model, {}).get(category, 1.0)
    return lower, upper


def _transport(
    qualities: np.ndarray, capacity: np.ndarray, backlog: np.ndarray, lower: np.ndarray, upper: np.ndarray
) -> np.ndarray:
    """Returns the calls, model by category, that maximize throughput and then quality."""
    rows, columns = qualities.shape
    # The constant makes one more call worth more than any difference in quality: throughput comes first.
    cost = -(qualities + 1.0 + qualities.max()).ravel()
    of_model = np.kron(np.eye(rows), np.ones(columns))
    of_category = np.kron(np.ones(rows), np.eye(columns))
    least = np.minimum(lower, upper) * backlog
    least *= np.minimum(1.0, MAX_EXPLORATION * capacity / np.maximum(least.sum(axis=1), 1e-9))[:, None]
    least *= np.minimum(1.0, MAX_EXPLORATION * backlog / np.maximum(least.sum(axis=0), 1e-9))
    solution = linprog(
        cost,
        A_ub=np.vstack([of_model, of_category]),
        b_ub=np.concatenate([capacity, backlog]),
        bounds=np.stack([least.ravel(), np.maximum(upper * backlog, least).ravel()], axis=1),
        method="highs",
    )
    if solution.x is None:  # cannot happen: the minimum shares leave half of everything free
        return np.zeros((rows, columns))
    return np.asarray(solution.x).reshape(rows, columns).clip(min=0.0)


@dataclass
class PullOrder:
    """Order in which one model pulls categories: the one furthest behind its share comes first.

    Smooth weighted round robin: each pull adds its share to every category's deficit and subtracts a whole
    call from the category that was pulled. Deficits survive a change of the shares, which happens every
    second, but are limited. Categories without a share come last, by quality, so that no quota is idle. Where
    the model's share is bounded, it earns each call by the tasks that all models solve.
    """

    places: Mapping[str, int]  # category -> rank of this model
    shares: Mapping[str, float] = field(default_factory=dict)
    deficits: dict[str, float] = field(default_factory=dict)
    bounds: Mapping[str, float] = field(default_factory=dict)
    credit: dict[str, float] = field(default_factory=dict)
    solved: Mapping[str, int] = field(default_factory=dict)

    def set_shares(self, shares: Mapping[str, float], places: Mapping[str, int]) -> None:
        """Replaces shares and ranks; deficits are kept."""
        self.shares = shares
        self.places = places

    def set_bounds(self, bounds: Mapping[str, float], solved: Mapping[str, int]) -> None:
        """Limits pulls to these shares of what all models solve; `solved`: category -> tasks so far."""
        for category, share in bounds.items():
            more = max(0, solved.get(category, 0) - self.solved.get(category, solved.get(category, 0)))
            self.credit[category] = min(MAX_CREDIT, self.credit.get(category, 0.0) + share * more)
        self.bounds, self.solved = bounds, solved

    def record_pull(self, category: str) -> None:
        """Accounts for one pulled task."""
        for name in {*self.shares, category}:
            deficit = self.deficits.get(name, 0.0) + self.shares.get(name, 0.0) - (name == category)
            self.deficits[name] = max(-MAX_DEFICIT, min(MAX_DEFICIT, deficit))
        if category in self.bounds:
            self.credit[category] -= 1.0

    def categories(self, known: Sequence[str]) -> list[str]:
        """Returns the categories to pull now, in order, without those whose bound is reached."""

        def key(category: str) -> tuple[bool, float, float]:
            share = self.shares.get(category, 0.0)
            behind = share + self.deficits.get(category, 0.0) if share > 0 else 0.0
            return (share <= 0, -behind, -quality(self.places.get(category)))

        allowed = [name for name in known if name not in self.bounds or self.credit[name] >= 1.0]
        return sorted(allowed, key=key)
