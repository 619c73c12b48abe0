"""`config/models.yaml`: the models, and how the router works with them.

Settings are read once, here and at the edges (`cli`, plugins); other code gets them as values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from router.errors import ConfigError, echoed
from router.request import TEXT_CAPABILITIES, Parameters, Unsupported
from router.settings.classification import ClassificationSettings, check_category_names, load_categories
from router.settings.clients import ClientName, ClientSettings, settings_of
from router.settings.environment import config_folder
from router.settings.files import Frozen, read_yaml, validated
from router.settings.knowledge import KnowledgeSettings
from router.settings.models import (
    MODEL_NAME_PATTERN,
    Capability,
    DiscoveredModel,
    InteractiveShare,
    ModelSettings,
    read_discovered,
)

Deadline = Annotated[float, Field(gt=0, le=3600)]


def _known_parameter(name: str) -> str:
    if name not in Parameters.model_fields:
        raise ValueError(f"{name!r} is not a parameter; known: {', '.join(sorted(Parameters.model_fields))}")
    return name


ParameterName = Annotated[str, AfterValidator(_known_parameter)]


class BackendPaths(Frozen):
    """Paths of the Models Backend's endpoints."""

    renamed_keys: ClassVar[Mapping[str, str | None]] = {"batch": None, "health": None}

    single: str = "/single"
    models: str = "/models"


class BackendFields(Frozen):
    """Names of the Models Backend's fields: dotted paths into its requests and into its responses.

    A parameter of a request has its own name, unless `parameters` has another path for it. Without
    `messages`, a chat is sent as one prompt.
    """

    model: str = "model"
    prompt: str = "prompt"
    messages: str | None = "messages"
    parameters: dict[ParameterName, str] = Field(default={})
    max_tokens: str = "max_tokens"
    request_id: str = "request_id"
    tokens_reserved: str = "tokens_reserved"
    answer: str = "answer"
    prompt_tokens: str = "usage.prompt_tokens"
    completion_tokens: str = "usage.completion_tokens"
    cost_usd: str = "cost_usd"
    finish_reason: str = "finish_reason"
    tool_calls: str = "tool_calls"
    refusal: str = "refusal"
    cached_tokens: str = "usage.cached_tokens"


OPENAI_FIELDS = BackendFields(
    max_tokens="max_tokens", answer="choices.0.message.content", finish_reason="choices.0.finish_reason",
    tool_calls="choices.0.message.tool_calls", refusal="choices.0.message.refusal",
    cached_tokens="usage.prompt_tokens_details.cached_tokens",
)  # fmt: skip


class BackendSettings(Frozen):
    """Client of the Models Backend. Its address comes from the environment.

    `body`: `fields` sends a bare prompt as such; `openai` sends messages always, and reads a chat completion.
    `capabilities` are those that requests may need; `on_unsupported` is for sampling parameters.
    """

    paths: BackendPaths = BackendPaths()
    body: Literal["fields", "openai"] = "fields"
    fields: BackendFields = BackendFields()
    capabilities: frozenset[Capability] = TEXT_CAPABILITIES
    on_unsupported: Unsupported = Unsupported.REFUSE
    connect_seconds: float = Field(default=5.0, gt=0)
    max_connections: int = Field(default=6000, ge=1)
    max_answer_bytes: int = Field(default=16 * 1024 * 1024, ge=1024)

    @model_validator(mode="before")
    @classmethod
    def _fields_fit_the_body(cls, data: Any) -> Any:
        if (
            not isinstance(data, dict)
            or data.get("body") != "openai"
            or not isinstance(data.get("fields", {}), dict)
        ):
            return data
        return {**data, "fields": {**OPENAI_FIELDS.model_dump(), **data.get("fields", {})}}


class WorkerSettings(Frozen):
    """Workers and their engine. Times in seconds."""

    lease_seconds: float = Field(default=10.0, ge=1)
    heartbeat_seconds: float = Field(default=2.5, gt=0)
    look_ahead_seconds: float = Field(default=0.25, gt=0, le=0.25)
    max_attempts: int = Field(default=5, ge=1, le=100)
    retry_base_seconds: float = Field(default=1.0, gt=0)
    retry_cap_seconds: float = Field(default=60.0, gt=0)
    another_model_seconds: float = Field(default=15.0, ge=0)
    idle_leave_seconds: float = Field(default=600.0, gt=0)
    poll_seconds: float = Field(default=2.0, gt=0)
    pool_connections: int = Field(default=8, ge=2, le=100)
    max_in_flight: int = Field(default=5000, ge=1)
    alarm_failure_rate: float = Field(default=0.1, gt=0, le=1)
    alarm_min_failures: int = Field(default=5, ge=1)
    alarm_seconds: float = Field(default=300.0, gt=0, le=86_400)


class TrafficSettings(Frozen):
    """Slacks of the rate limiter and its circuit breaker; see docs/limiter.md. Times in seconds."""

    renamed_keys: ClassVar[Mapping[str, str | None]] = {
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
    free_broken_slots: bool = False
    interactive: InteractiveShare = InteractiveShare()

    @model_validator(mode="after")
    def _slacks_grow(self) -> TrafficSettings:
        for kind in ("send", "transit"):
            if getattr(self, f"minute_{kind}_slack") < getattr(self, f"second_{kind}_slack"):
                raise ValueError(f"minute_{kind}_slack must not be less than second_{kind}_slack")
        return self


class AnsweringSettings(Frozen):
    """Interactive requests. Times in seconds; a deadline counts from the arrival of the prompt."""

    renamed_keys: ClassVar[Mapping[str, str | None]] = {
        "most_models": "max_models",
        "most_at_once": "max_concurrency",
    }

    deadline_seconds: dict[str, Deadline] = Field(default={})  # category -> deadline
    default_deadline_seconds: Deadline = 30.0
    permit_seconds: float = Field(default=2.0, gt=0, le=60)
    late_seconds: float = Field(default=120.0, ge=0, le=3600)
    max_models: int = Field(default=3, ge=1, le=20)
    max_concurrency: int = Field(default=500, ge=1, le=100_000)
    max_prompt_bytes: int = Field(default=1_048_576, ge=1, le=16_777_216)

    def deadline_of(self, category: str) -> float:
        """Returns the deadline of a category in seconds."""
        return self.deadline_seconds.get(category, self.default_deadline_seconds)


class FallbackSettings(Frozen):
    """The fallback: retrieved passages, and one of `models`, which answers with them."""

    models: tuple[str, ...] = ()
    passages: int = Field(default=5, ge=1, le=50)
    passage_bytes: int = Field(default=6000, ge=100, le=1_000_000)
    max_tokens: int = Field(default=300, ge=1)
    before_deadline_seconds: float = Field(default=10.0, ge=0, le=3600)


class TaskSettings(Frozen):
    """The table `tasks`. `defaults`: values of further columns for tasks that load, ask and serve insert."""

    defaults: dict[str, bool | int | float | str] = Field(default={})

    def as_text(self) -> dict[str, str]:
        """Returns the defaults as Postgres reads them."""
        return {
            name: str(value).lower() if isinstance(value, bool) else str(value)
            for name, value in self.defaults.items()
        }


class RouterConfig(Frozen):
    """Contents of `config/models.yaml`, the categories, and the discovered models."""

    renamed_keys: ClassVar[Mapping[str, str | None]] = {"asking": "answering"}

    models: dict[str, ModelSettings]
    clients: dict[ClientName, ClientSettings] = Field(default={})
    knowledge: KnowledgeSettings = KnowledgeSettings()
    default_category: str = "general"  # from categories.yaml
    categories: tuple[str, ...] = ("technical", "creative", "general")  # from categories.yaml
    classification: ClassificationSettings | None = Field(default=None, exclude=True, repr=False)
    backend: BackendSettings = BackendSettings()
    worker: WorkerSettings = WorkerSettings()
    traffic: TrafficSettings = TrafficSettings()
    answering: AnsweringSettings = AnsweringSettings()
    fallback: FallbackSettings = FallbackSettings()
    tasks: TaskSettings = TaskSettings()
    discovered: dict[str, DiscoveredModel] = Field(default={})  # without those that `models` overrides
    discovered_problem: str | None = Field(default=None, exclude=True)  # why discovered.yaml is ignored

    @model_validator(mode="after")
    def _answering_names_agree(self) -> RouterConfig:
        for category in self.answering.deadline_seconds:
            if category not in self.categories:
                raise ValueError(
                    f"answering.deadline_seconds.{category}: no such category; known: {self.categories}"
                )
        for model in self.fallback.models:
            if model not in self.models:
                raise ValueError(f"fallback.models: {echoed(model)} is not among the models")
        return self

    def client(self, name: str) -> ClientSettings:
        """Returns the settings of a client; what its entry does not set is that of `default`."""
        return settings_of(self.clients, name)

    @model_validator(mode="after")
    def _names_agree(self) -> RouterConfig:
        check_category_names(self.categories, self.default_category)
        for name, model in self.models.items():
            if not re.fullmatch(MODEL_NAME_PATTERN, name):
                raise ValueError(
                    f"models.{echoed(name, 120)}: not a model name: letters, digits, '.', '_' and '-',"
                    " at most 100"
                )
            unknown = sorted(set(model.ranks) - set(self.categories))
            if unknown:
                raise ValueError(
                    f"models.{name}.ranks.{unknown[0]}: no such category; known: {self.categories}"
                )
        return self


def load_config(folder: Path | None = None) -> RouterConfig:
    """Loads `models.yaml`, `categories.yaml` and `discovered.yaml` from `folder`.

    Raises ConfigError with file and key. Models of `models.yaml` override discovered ones. An invalid
    `discovered.yaml` is ignored as a whole and `discovered_problem` has the reason: a file that a nightly job
    writes must not keep the router from starting.
    """
    folder = folder or config_folder()
    path = folder / "models.yaml"
    data = read_yaml(path)
    classification = load_categories(folder)
    added = {
        "categories": tuple(classification.categories),
        "default_category": classification.default_category,
        "classification": classification,
    }
    if isinstance(data, dict):
        for key in added.keys() & data.keys():
            raise ConfigError(f"{path}: {key}: categories are defined in categories.yaml; remove this key.")
        if "discovered" in data or "discovered_problem" in data:
            raise ConfigError(f"{path}: discovered: discovered models are stored in discovered.yaml.")
        found, problem = read_discovered(folder)
        ours = data["models"] if isinstance(data.get("models"), dict) else {}
        discovered = {name: model for name, model in found.items() if name not in ours}
        data = {**data, **added, "discovered": discovered, "discovered_problem": problem}
    return validated(RouterConfig, data, path)
