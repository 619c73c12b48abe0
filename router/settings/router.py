"""Everything that can be configured, read once into frozen values.

Two sources: the environment (where things are, and secrets) and `config/*.yaml` (how things behave). Both
are read only here and at the edges (`cli`, plugins); below, settings are passed as values. An unknown key is
refused with its file and path.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

from pydantic import Field, field_validator, model_validator

from router.errors import ConfigError
from router.settings.classification import CATEGORY_PATTERN, ClassificationSettings, load_categories
from router.settings.environment import config_folder
from router.settings.files import Frozen, read_yaml, validated
from router.settings.models import MODEL_NAME_PATTERN, DiscoveredModel, ModelSettings, read_discovered


class BackendPaths(Frozen):
    """Where the existing Models Backend serves what."""

    renamed_keys: ClassVar = {"batch": None, "health": None}

    single: str = "/single"
    models: str = "/models"


class BackendFields(Frozen):
    """What the existing Models Backend calls things, as dotted paths into its JSON."""

    model: str = "model"
    prompt: str = "prompt"
    max_tokens: str = "max_tokens"
    request_id: str = "request_id"
    tokens_reserved: str = "tokens_reserved"
    answer: str = "answer"
    prompt_tokens: str = "usage.prompt_tokens"
    completion_tokens: str = "usage.completion_tokens"
    cost_usd: str = "cost_usd"


class BackendSettings(Frozen):
    """How to speak to the Models Backend. Its address comes from the environment."""

    paths: BackendPaths = BackendPaths()
    fields: BackendFields = BackendFields()
    connect_seconds: float = Field(default=5.0, gt=0)
    max_connections: int = Field(default=6000, ge=1)
    max_answer_bytes: int = Field(default=16 * 1024 * 1024, ge=1024)


class WorkerSettings(Frozen):
    """The pull loop and its engine. All times in seconds."""

    lease_seconds: float = Field(default=10.0, ge=1)
    heartbeat_seconds: float = Field(default=2.5, gt=0)
    look_ahead_seconds: float = Field(default=0.25, gt=0, le=0.25)
    max_attempts: int = Field(default=5, ge=1, le=100)
    retry_base_seconds: float = Field(default=1.0, gt=0)
    retry_cap_seconds: float = Field(default=60.0, gt=0)
    another_model_seconds: float = Field(default=15.0, ge=0)
    idle_leave_seconds: float = Field(default=20.0, gt=0)
    poll_seconds: float = Field(default=2.0, gt=0)
    pool_connections: int = Field(default=8, ge=2, le=100)
    max_in_flight: int = Field(default=5000, ge=1)


class TrafficSettings(Frozen):
    """How late a send may be, and when a model is given a rest. All times in seconds; see docs/limiter.md."""

    renamed_keys: ClassVar = {
        "failures_borne": "failure_threshold",
        "first_rest_seconds": "initial_cooldown_seconds",
        "longest_rest_seconds": "max_cooldown_seconds",
    }

    second_send_slack: float = Field(default=0.025, gt=0, le=0.5)
    second_transit_slack: float = Field(default=0.035, ge=0, le=5)
    minute_send_slack: float = Field(default=0.100, gt=0, le=5)
    minute_transit_slack: float = Field(default=0.150, ge=0, le=30)
    failure_threshold: int = Field(default=5, ge=1, le=1000)
    initial_cooldown_seconds: float = Field(default=1.0, gt=0, le=3600)
    max_cooldown_seconds: float = Field(default=60.0, gt=0, le=86_400)

    @model_validator(mode="after")
    def _slacks_grow(self) -> TrafficSettings:
        for kind in ("send", "transit"):
            if getattr(self, f"minute_{kind}_slack") < getattr(self, f"second_{kind}_slack"):
                raise ValueError(f"minute_{kind}_slack must not be less than second_{kind}_slack")
        return self


class AnsweringSettings(Frozen):
    """Answering one prompt now. All times in seconds; a deadline counts from when the prompt came."""

    renamed_keys: ClassVar = {"most_models": "max_models", "most_at_once": "max_concurrency"}

    # category -> its deadline; the others have default_deadline_seconds
    deadline_seconds: dict[str, float] = Field(default={})
    default_deadline_seconds: float = Field(default=30.0, gt=0, le=3600)
    permit_seconds: float = Field(default=2.0, gt=0, le=60)
    late_seconds: float = Field(default=120.0, ge=0, le=3600)
    max_models: int = Field(default=3, ge=1, le=20)
    max_concurrency: int = Field(default=500, ge=1, le=100_000)
    max_prompt_bytes: int = Field(default=1_048_576, ge=1, le=16_777_216)

    @field_validator("deadline_seconds")
    @classmethod
    def _deadlines_are_times(cls, deadlines: dict[str, float]) -> dict[str, float]:
        for category, seconds in deadlines.items():
            if not 0 < seconds <= 3600:  # noqa: PLR2004 - as default_deadline_seconds
                raise ValueError(f"{category}: {seconds:g} is not above 0 and at most 3600")
        return deadlines

    def deadline_of(self, category: str) -> float:
        """Seconds within which a prompt of this category is answered."""
        return self.deadline_seconds.get(category, self.default_deadline_seconds)


class FallbackSettings(Frozen):
    """Who answers beside the preferred model: knowledge, then one of `models` given what was found."""

    models: tuple[str, ...] = ()
    passages: int = Field(default=5, ge=1, le=50)
    passage_bytes: int = Field(default=6000, ge=100, le=1_000_000)
    max_tokens: int = Field(default=300, ge=1)
    before_deadline_seconds: float = Field(default=10.0, ge=0, le=3600)


class RouterConfig(Frozen):
    """`config/models.yaml`, whole, with the names of the categories."""

    renamed_keys: ClassVar = {"asking": "answering"}

    models: dict[str, ModelSettings]
    default_category: str = "general"  # this and the next come from categories.yaml
    categories: tuple[str, ...] = ("technical", "creative", "general")
    classification: ClassificationSettings | None = Field(default=None, exclude=True, repr=False)
    backend: BackendSettings = BackendSettings()
    worker: WorkerSettings = WorkerSettings()
    traffic: TrafficSettings = TrafficSettings()
    answering: AnsweringSettings = AnsweringSettings()
    fallback: FallbackSettings = FallbackSettings()
    discovered: dict[str, DiscoveredModel] = Field(default={})  # of discovered.yaml, less those of models
    discovered_problem: str | None = Field(default=None, exclude=True)  # why that could not be read

    @model_validator(mode="after")
    def _answering_names_agree(self) -> RouterConfig:
        for category in self.answering.deadline_seconds:
            if category not in self.categories:
                raise ValueError(
                    f"answering.deadline_seconds.{category}: no such category; known: {self.categories}"
                )
        for model in self.fallback.models:
            if model not in self.models:
                raise ValueError(f"fallback.models: {model!r} is not among the models")
        return self

    @model_validator(mode="after")
    def _names_agree(self) -> RouterConfig:
        for category in self.categories:
            if not re.fullmatch(CATEGORY_PATTERN, category):
                raise ValueError(f"categories: {category!r} is no category name ({CATEGORY_PATTERN})")
        if self.default_category not in self.categories:
            raise ValueError(f"default_category: {self.default_category!r} is not among the categories")
        for name, model in self.models.items():
            if not re.fullmatch(MODEL_NAME_PATTERN, name):
                raise ValueError(
                    f"models.{name[:120]!r}: no model name: letters, digits, '.', '_' and '-', at most 100"
                )
            unknown = sorted(set(model.ranks) - set(self.categories))
            if unknown:
                raise ValueError(
                    f"models.{name}.ranks.{unknown[0]}: no such category; known: {self.categories}"
                )
        return self


def load_config(folder: Path | None = None) -> RouterConfig:
    """Read and check `models.yaml` and `categories.yaml` in `folder`. ConfigError names file and key.

    After them `discovered.yaml`, where people's models win. If that is wrong nothing of it counts, and
    `discovered_problem` says why: what the search wrote must not keep the router from starting.
    """
    folder = folder or config_folder()
    path = folder / "models.yaml"
    data = read_yaml(path)
    classification = load_categories(folder)
    names = {
        "categories": tuple(classification.categories),
        "default_category": classification.default_category,
        "classification": classification,
    }
    if isinstance(data, dict):
        for key in names.keys() & data.keys():
            raise ConfigError(
                f"{path}: {key}: the categories are named in categories.yaml; take it out here."
            )
        if "discovered" in data or "discovered_problem" in data:
            raise ConfigError(f"{path}: discovered: what a search found stands in discovered.yaml.")
        found, problem = read_discovered(folder)
        ours = data["models"] if isinstance(data.get("models"), dict) else {}
        discovered = {name: model for name, model in found.items() if name not in ours}
        data = {**data, **names, "discovered": discovered, "discovered_problem": problem}
    return validated(RouterConfig, data, path)
