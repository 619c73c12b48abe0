"""`config/learning.yaml`: how the call log re-ranks the models."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from pydantic import Field, ValidationError, field_validator, model_validator

from router.errors import ConfigError
from router.settings.environment import DEFAULT_CONFIG_FOLDER, config_folder
from router.settings.files import Frozen, read_yaml, validated

GRADE_SOURCES = ("check", "reference", "judge", "feedback")  # where the score of an answer comes from


class UtilitySettings(Frozen):
    """The worth of a call: weights, the scales of seconds and USD at which half is left, and the floor."""

    success: float = Field(default=0.25, ge=0)
    score: float = Field(default=0.50, ge=0)
    latency: float = Field(default=0.10, ge=0)
    cost: float = Field(default=0.15, ge=0)
    latency_seconds: float = Field(default=20.0, gt=0)
    cost_usd: float = Field(default=0.002, gt=0)
    floor: float = Field(default=0.4, ge=0, lt=1)

    @model_validator(mode="after")
    def _weighs_something(self) -> UtilitySettings:
        if self.success + self.score + self.latency + self.cost <= 0:
            raise ValueError("the weights success, score, latency and cost are all 0; give one a weight")
        return self


class ExplorationSettings(Frozen):
    """How much traffic goes to models that have to prove themselves: a share, and calls a period for each."""

    share: float = Field(default=0.05, ge=0, le=0.5)
    calls: int = Field(default=150, ge=0)


class OutageSettings(Frozen):
    """When failures are the backend's and no model's."""

    seconds: int = Field(default=30, ge=1, le=3600)
    share: float = Field(default=0.9, gt=0, le=1)
    models: int = Field(default=3, ge=2)


class GradingSettings(Frozen):
    """How many answers are graded, and what a grade weighs by its source."""

    answers: int = Field(default=300, ge=0, le=100_000)
    sources: dict[str, float] = Field(default={"check": 1, "reference": 2, "judge": 2, "feedback": 3})

    @field_validator("sources")
    @classmethod
    def _weights_are_weights(cls, sources: dict[str, float]) -> dict[str, float]:
        for source, weight in sources.items():
            if source not in GRADE_SOURCES:
                raise ValueError(f"{source!r} is none of {', '.join(GRADE_SOURCES)}")
            if not 0 <= weight <= 1000:  # noqa: PLR2004 - a bound that catches a typing error
                raise ValueError(f"{source}: {weight:g} is not between 0 and 1000")
        return sources


class JudgingSettings(Frozen):
    """How many answers other models judge, who they are, and what that may cost a night (a period)."""

    models: tuple[str, ...] = ()
    answers: int = Field(default=8, ge=0, le=1000)
    calls: int = Field(default=300, ge=0, le=100_000)
    cost_usd: float = Field(default=0.5, ge=0, le=1e6)


class LearningSettings(Frozen):
    """`config/learning.yaml`, whole."""

    utility: UtilitySettings = UtilitySettings()
    categories: dict[str, dict[str, float]] = Field(default={})
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
    def _categories_are_utilities(self) -> LearningSettings:
        category = ""
        try:
            for category in self.categories:
                self.utility_of(category)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"categories.{category}.{key}: {first['msg']}") from error
        return self

    def utility_of(self, category: str) -> UtilitySettings:
        """The worth of a call of this category: the usual one, with what is different there."""
        return UtilitySettings.model_validate(
            {**self.utility.model_dump(), **self.categories.get(category, {})}
        )

    @property
    def period_seconds(self) -> int:
        """The length of a period in whole seconds."""
        return max(1, round(self.period_hours * 3600))


def load_learning(folder: Path | None, categories: Collection[str]) -> LearningSettings:
    """Read and check `learning.yaml` in `folder`, or the shipped one where that has none.

    ConfigError if it speaks of a category that is not among `categories`.
    """
    path = (folder or config_folder()) / "learning.yaml"
    shipped = DEFAULT_CONFIG_FOLDER / "learning.yaml"
    own = path.exists()
    learning = validated(LearningSettings, read_yaml(path if own else shipped), path if own else shipped)
    for category in learning.categories:
        if own and category not in categories:
            raise ConfigError(f"{path}: categories.{category}: no such category; known: {sorted(categories)}")
    return learning
