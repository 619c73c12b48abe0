"""`config/learning.yaml`: how the call log re-ranks the models."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from router.settings.files import Frozen
from router.settings.overrides import WithOverrides, check_overrides, load_with_overrides, overridden

GradeSource = Annotated[str, Field(pattern="^(check|reference|judge|feedback)$")]
Weight = Annotated[float, Field(ge=0, le=1000)]  # a bound that catches typing errors


class UtilitySettings(Frozen):
    """Utility of a call: weights, half-value scales of latency and cost, and the floor for models."""

    success: float = Field(default=0.25, ge=0)
    score: float = Field(default=0.50, ge=0)
    latency: float = Field(default=0.10, ge=0)
    cost: float = Field(default=0.15, ge=0)
    latency_seconds: float = Field(default=20.0, gt=0)
    cost_usd: float = Field(default=0.002, gt=0)
    floor: float = Field(default=0.4, ge=0, lt=1)

    @model_validator(mode="after")
    def _some_weight_is_positive(self) -> UtilitySettings:
        if self.success + self.score + self.latency + self.cost <= 0:
            raise ValueError("the weights success, score, latency and cost are all 0; give one a weight")
        return self


class ExplorationSettings(Frozen):
    """Traffic for models with little evidence: their share of a category, and calls per model and period."""

    share: float = Field(default=0.05, ge=0, le=0.5)
    calls: int = Field(default=150, ge=0)


class OutageSettings(Frozen):
    """When simultaneous failures are attributed to the backend instead of the models."""

    seconds: int = Field(default=30, ge=1, le=3600)
    share: float = Field(default=0.9, gt=0, le=1)
    models: int = Field(default=3, ge=2)


class GradingSettings(Frozen):
    """Number of answers graded per model, category and period, and weights of grades by source."""

    answers: int = Field(default=300, ge=0, le=100_000)
    sources: dict[GradeSource, Weight] = Field(
        default={"check": 1, "reference": 2, "judge": 2, "feedback": 3}
    )


class JudgingSettings(Frozen):
    """Pairwise judging by other models: the judges, the sample size, and the budget per period."""

    models: tuple[str, ...] = ()
    answers: int = Field(default=8, ge=0, le=1000)
    calls: int = Field(default=300, ge=0, le=100_000)
    cost_usd: float = Field(default=0.5, ge=0, le=1e6)


class LearningSettings(WithOverrides):
    """Contents of `config/learning.yaml`; categories override `utility`."""

    utility: UtilitySettings = UtilitySettings()
    period_hours: float = Field(default=24.0, ge=0.001, le=24 * 31)
    half_life_periods: float = Field(default=14.0, gt=0)
    memory_periods: int = Field(default=56, ge=1, le=400)
    change_errors: float = Field(default=4.0, ge=1)
    bound_errors: float = Field(default=1.0, ge=0)
    prior_calls: float = Field(default=15.0, gt=0)
    enough_calls: int = Field(default=40, ge=1)
    max_client_share: float = Field(default=0.3, ge=0.05, le=1)
    margin: float = Field(default=0.015, ge=0, lt=1)
    margin_errors: float = Field(default=2.0, ge=0)
    exploration: ExplorationSettings = ExplorationSettings()
    outage: OutageSettings = OutageSettings()
    grading: GradingSettings = GradingSettings()
    judging: JudgingSettings = JudgingSettings()
    undo_periods: int = Field(default=3, ge=0)
    retention_days: int = Field(default=30, ge=3, le=36_500)

    @model_validator(mode="after")
    def _overrides_are_valid(self) -> LearningSettings:
        check_overrides(self.utility, self.categories)
        return self

    def utility_of(self, category: str) -> UtilitySettings:
        """Returns the utility settings of a category: the usual ones with its overrides."""
        return overridden(self.utility, self.categories.get(category, {}))

    @property
    def period_seconds(self) -> int:
        """Length of a period in whole seconds."""
        return max(1, round(self.period_hours * 3600))


def load_learning(folder: Path | None, categories: Collection[str]) -> LearningSettings:
    """Loads `learning.yaml`; see `load_with_overrides`."""
    return load_with_overrides(LearningSettings, "learning.yaml", folder, categories)
