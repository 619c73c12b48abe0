"""Decides on models on probation. Pure.

In each category the model is compared with the median active model, the one with rank n/2 rounded up:

    promote   enough calls, and its lower bound is not below the median model's by more than a margin
    retire    enough calls, and its upper bound is; or it is below the category's floor
    stay      otherwise

One category that promotes is enough; the model then leaves those that would retire it. It is retired if all
categories retire it, or if the days of probation are over.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from router.learning.ranking import Placed, Standing
from router.settings import ProbationSettings


class Step(str, enum.Enum):
    """Next step of a model on probation."""

    PROMOTE = "promote"
    RETIRE = "retire"
    STAY = "stay"


@dataclass(frozen=True, slots=True)
class CategoryVerdict:
    """Verdict of one category."""

    category: str
    step: Step
    reason: str


@dataclass(frozen=True, slots=True)
class ProbationVerdict:
    """The next step, the reason, and the categories that a promoted model leaves."""

    step: Step
    reason: str
    leaves: tuple[str, ...] = ()


def category_verdict(
    category: str, own: Placed, active: Sequence[Placed], settings: ProbationSettings
) -> CategoryVerdict:
    """Compares the model with the category's active models, given in rank order."""

    def verdict(step: Step, reason: str) -> CategoryVerdict:
        return CategoryVerdict(category, step, f"{category}: {reason}")

    if own.standing is Standing.BELOW_FLOOR:
        return verdict(Step.RETIRE, own.reason)
    calls = own.evidence.seen
    if calls < settings.min_calls:
        return verdict(Step.STAY, f"{calls:.0f} of {settings.min_calls} calls")
    if not active:
        return verdict(Step.PROMOTE, "no other model is active")
    median = active[(len(active) - 1) // 2]
    bar = median.utility.lower - settings.margin
    against = f"against {median.utility.lower:.3f} of {median.model}, over {calls:.0f} calls"
    if own.utility.lower >= bar:
        return verdict(Step.PROMOTE, f"lower bound {own.utility.lower:.3f} {against}")
    if own.utility.upper < bar:
        return verdict(Step.RETIRE, f"upper bound {own.utility.upper:.3f} {against}")
    return verdict(Step.STAY, f"utility {own.utility.lower:.3f} to {own.utility.upper:.3f} {against}")


def probation_verdict(
    verdicts: Sequence[CategoryVerdict], days: float, settings: ProbationSettings
) -> ProbationVerdict:
    """Combines the verdicts of all categories on a model that has been on probation for `days`."""
    reason = "; ".join(verdict.reason for verdict in verdicts) or "not ranked in any category"
    steps = [verdict.step for verdict in verdicts]
    if Step.PROMOTE in steps:
        leaves = tuple(verdict.category for verdict in verdicts if verdict.step is Step.RETIRE)
        return ProbationVerdict(Step.PROMOTE, reason, leaves)
    if steps and all(step is Step.RETIRE for step in steps):
        return ProbationVerdict(Step.RETIRE, reason)
    if days >= settings.max_days:
        return ProbationVerdict(Step.RETIRE, f"not promoted within {settings.max_days} days; {reason}")
    return ProbationVerdict(Step.STAY, reason)
