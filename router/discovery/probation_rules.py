"""Whether a model on probation has proved itself, by its log. Pure.

In each category it is measured by the middle one of the active models: of n the one in place n/2, rounded up.

    promote   enough calls, and the lower bound of its worth is not below that one's by more than a margin
    retire    enough calls, and its upper bound is; or it is surely below the category's floor
    stay      else

A model is promoted if one category promotes it, and leaves those that would retire it. It is retired if all
would, or if the nights are over without a word.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from router.learning.ranking import Placed, Standing
from router.settings import ProbationSettings


class Step(str, enum.Enum):
    """What happens to a model on probation."""

    PROMOTE = "promote"
    RETIRE = "retire"
    STAY = "stay"


@dataclass(frozen=True, slots=True)
class Stand:
    """What one category's log says of a model."""

    category: str
    step: Step
    reason: str


@dataclass(frozen=True, slots=True)
class ProbationVerdict:
    """What happens to the model, why, and which categories it leaves when it is promoted."""

    step: Step
    reason: str
    leaves: tuple[str, ...] = ()


def stand_in(category: str, own: Placed, active: Sequence[Placed], settings: ProbationSettings) -> Stand:
    """What the category's log says of the model; `active`: the active models there, in order."""

    def stand(step: Step, reason: str) -> Stand:
        return Stand(category, step, f"{category}: {reason}")

    if own.standing is Standing.LOW:
        return stand(Step.RETIRE, own.reason)
    calls = own.evidence.seen
    if calls < settings.min_calls:
        return stand(Step.STAY, f"{calls:.0f} of {settings.min_calls} calls")
    if not active:
        return stand(Step.PROMOTE, "no other model is active there")
    middle = active[(len(active) - 1) // 2]
    bar = middle.worth.lower - settings.margin
    beside = f"beside {middle.worth.lower:.3f} of {middle.model}, over {calls:.0f} calls"
    if own.worth.lower >= bar:
        return stand(Step.PROMOTE, f"its bound is {own.worth.lower:.3f} {beside}")
    if own.worth.upper < bar:
        return stand(Step.RETIRE, f"at best it is worth {own.worth.upper:.3f} {beside}")
    return stand(Step.STAY, f"worth {own.worth.lower:.3f} to {own.worth.upper:.3f} {beside}")


def probation_verdict(
    stands: Sequence[Stand], nights: float, settings: ProbationSettings
) -> ProbationVerdict:
    """What happens to a model that has been on probation for so many nights."""
    reason = "; ".join(stand.reason for stand in stands) or "it is ranked nowhere"
    steps = [stand.step for stand in stands]
    if Step.PROMOTE in steps:
        leaves = tuple(stand.category for stand in stands if stand.step is Step.RETIRE)
        return ProbationVerdict(Step.PROMOTE, reason, leaves)
    if steps and all(step is Step.RETIRE for step in steps):
        return ProbationVerdict(Step.RETIRE, reason)
    if nights >= settings.max_days:
        return ProbationVerdict(Step.RETIRE, f"not proved within {settings.max_days} nights; {reason}")
    return ProbationVerdict(Step.STAY, reason)
