"""`config/learning.yaml`: how the call log re-ranks the models."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from router.settings.environment import config_folder, own_or_shipped
from router.settings.files import Frozen, check_categories, check_overrides, overridden, read_yaml, validated

GRADE_SOURCES = ("check", "reference", "judge", "feedback")


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
    sources: dict[str, float] = Field(default={"check": 1, "reference": 2, "judge": 2, "feedback": 3})

    @field_validator("sources")
    @classmethod
    def _weights_are_weights(cls, sources: dict[str, float]) -> dict[str, float]:
        for source, weight in sources.items():
            if source not in GRADE_SOURCES:
                raise ValueError(f"{source!r} is none of {', '.join(GRADE_SOURCES)}")
            if not 0 <= weight <= 1000:  # noqa: PLR2004 - a bound that catches typing errors
                raise ValueError(f"{source}: {weight:g} is not between 0 and 1000")
        return sources


class JudgingSettings(Frozen):
    """Pairwise judging by other models: the judges, the sample size, and the budget per period."""

    models: tuple[str, ...] = ()
    answers: int = Field(default=8, ge=0, le=1000)
    calls: int = Field(default=300, ge=0, le=100_000)
    cost_usd: float = Field(default=0.5, ge=0, le=1e6)


class LearningSettings(Frozen):
    """Contents of `config/learning.yaml`."""

    utility: UtilitySettings = UtilitySettings()
    categories: dict[str, dict[str, float]] = Field(default={})  # category -> overrides of `utility`
    period_hours: float = Field(default=24.0, ge=0.001, le=24 * 31)
    half_life_periods: float = Field(default=14.0, gt=0)
    memory_periods: int = Field(default=56, ge=1, le=400)
    change_errors: float = Field(default=4.0, ge=1)
    bound_errors: float = Field(default=1.0, ge=0)
    prior_calls: float = Field(default=15.0, gt=0)
    enough_calls: int = Field(default=40, ge=1)
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
    """Loads `learning.yaml` from `folder`, or the shipped file.

    Raises ConfigError with file and key, also for overrides of a category that is not among `categories`.
    """
    folder = folder or config_folder()
    path = own_or_shipped(folder, "learning.yaml")
    settings = validated(LearningSettings, read_yaml(path), path)
    if path.parent == folder:  # the shipped file may name other categories
        check_categories(settings.categories, categories, path)
    return settings
