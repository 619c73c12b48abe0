"""Everything that can be configured, read once into frozen values.

Two sources: the environment (where things are, and secrets) and `config/*.yaml` (how things behave). Both
are read only here and at the edges (`cli`, plugins); below, settings are passed as values. An unknown key is
refused with its file and path.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Collection, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from router.errors import ConfigError
from router.settings.files import Frozen, read_yaml, validated
from router.traffic import TrafficTarget

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_CONFIG_FOLDER = ROOT / "config"
MODEL_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
CATEGORY_PATTERN = r"^[a-z][a-z0-9_-]{0,49}$"
DISCOVERED = "discovered.yaml"
GRADE_SOURCES = ("check", "reference", "judge", "feedback")  # where the score of an answer comes from


class _AnyModel(Frozen):
    endpoint: str | None = None  # the name the Models Backend knows; default: the model's own
    target: str  # the default of the Variable `traffic.<model>`
    ranks: dict[str, int]  # category -> starting rank, 1 is best
    context_tokens: int = Field(default=8192, ge=1)
    max_tokens: int = Field(default=512, ge=1)
    timeout_seconds: float = Field(default=180.0, gt=0)
    input_price: float = Field(default=0.0, ge=0)
    output_price: float = Field(default=0.0, ge=0)

    @field_validator("target")
    @classmethod
    def _target_parses(cls, line: str) -> str:
        TrafficTarget.parse(line)
        return line


class ModelSettings(_AnyModel):
    """One model of `config/models.yaml`. Prices in USD a million tokens, times in seconds."""

    state: Literal["active", "paused"] = "active"


class RosterChange(Frozen):
    """What became of a model that the search found: when, whose doing, and why."""

    what: Literal["taken", "promoted", "retired"]
    at: datetime
    by: str
    why: str


class DiscoveredModel(_AnyModel):
    """One model of `config/discovered.yaml`, which the search writes."""

    state: Literal["probation", "active", "retired"]
    history: tuple[RosterChange, ...] = Field(min_length=1)


class _Discovered(Frozen):
    models: dict[Annotated[str, Field(pattern=MODEL_NAME_PATTERN)], DiscoveredModel]


class BackendPaths(Frozen):
    """Where the existing Models Backend serves what."""

    single: str = "/single"
    batch: str = "/batch"
    models: str = "/models"
    health: str = "/health"


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

    second_send_slack: float = Field(default=0.025, gt=0, le=0.5)
    second_transit_slack: float = Field(default=0.035, ge=0, le=5)
    minute_send_slack: float = Field(default=0.100, gt=0, le=5)
    minute_transit_slack: float = Field(default=0.150, ge=0, le=30)
    failures_borne: int = Field(default=5, ge=1, le=1000)
    first_rest_seconds: float = Field(default=1.0, gt=0, le=3600)
    longest_rest_seconds: float = Field(default=60.0, gt=0, le=86_400)

    @model_validator(mode="after")
    def _slacks_grow(self) -> TrafficSettings:
        for kind in ("send", "transit"):
            if getattr(self, f"minute_{kind}_slack") < getattr(self, f"second_{kind}_slack"):
                raise ValueError(f"minute_{kind}_slack must not be less than second_{kind}_slack")
        return self


class AskingSettings(Frozen):
    """Answering one prompt now. All times in seconds; a deadline counts from when the prompt came."""

    # category -> its deadline; the others have default_deadline_seconds
    deadline_seconds: dict[str, float] = Field(default={})
    default_deadline_seconds: float = Field(default=30.0, gt=0, le=3600)
    permit_seconds: float = Field(default=2.0, gt=0, le=60)
    late_seconds: float = Field(default=120.0, ge=0, le=3600)
    most_models: int = Field(default=3, ge=1, le=20)
    most_at_once: int = Field(default=500, ge=1, le=100_000)
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


class RuleSettings(Frozen):
    """One rule of `config/categories.yaml`: a pattern or words, looked for in the lower-case prompt."""

    category: str
    pattern: str | None = Field(default=None, min_length=1)
    words: str | None = Field(default=None, min_length=1)  # separated by spaces
    weight: float = Field(default=1.0, gt=0, le=10)

    @model_validator(mode="after")
    def _one_of_both(self) -> RuleSettings:
        if (self.pattern is None) == (self.words is None):
            raise ValueError("a rule has either a pattern or words")
        return self

    @field_validator("pattern")
    @classmethod
    def _pattern_compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return pattern


class CategorySettings(Frozen):
    """`config/categories.yaml`, whole, and the folder that it stands in. Times in seconds."""

    categories: dict[str, str]  # name -> what belongs there, in words
    default_category: str
    examples: tuple[str, ...] = Field(min_length=1)  # patterns of file names, from `folder`
    rules: tuple[RuleSettings, ...] = ()
    rules_decide_at: float = Field(default=3.0, gt=0)
    threshold: float = Field(default=0.45, ge=0, le=1)
    temperature: float = Field(default=1.0, gt=0, le=10)
    categorise_tasks: bool = True
    patience_seconds: float = Field(default=1.0, gt=0, le=60)
    folder: Path = DEFAULT_CONFIG_FOLDER

    @model_validator(mode="after")
    def _names_agree(self) -> CategorySettings:
        for category in self.categories:
            if not re.fullmatch(CATEGORY_PATTERN, category):
                raise ValueError(f"categories: {category!r} is no category name ({CATEGORY_PATTERN})")
        if self.default_category not in self.categories:
            raise ValueError(f"default_category: {self.default_category!r} is not among the categories")
        for place, rule in enumerate(self.rules):
            if rule.category not in self.categories:
                raise ValueError(f"rules.{place}.category: {rule.category!r} is not among the categories")
        return self


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


class RouterConfig(Frozen):
    """`config/models.yaml`, whole, with the names of the categories."""

    models: dict[str, ModelSettings]
    default_category: str = "general"  # this and the next come from categories.yaml
    categories: tuple[str, ...] = ("technical", "creative", "general")
    categorising: CategorySettings | None = Field(default=None, exclude=True, repr=False)
    backend: BackendSettings = BackendSettings()
    worker: WorkerSettings = WorkerSettings()
    traffic: TrafficSettings = TrafficSettings()
    asking: AskingSettings = AskingSettings()
    fallback: FallbackSettings = FallbackSettings()
    discovered: dict[str, DiscoveredModel] = Field(default={})  # of discovered.yaml, less those of models
    discovered_problem: str | None = Field(default=None, exclude=True)  # why that could not be read

    @model_validator(mode="after")
    def _asking_names_agree(self) -> RouterConfig:
        for category in self.asking.deadline_seconds:
            if category not in self.categories:
                raise ValueError(
                    f"asking.deadline_seconds.{category}: no such category; known: {self.categories}"
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


class Addresses(Frozen):
    """Where Postgres, Redis and the Models Backend are. Never logged: they may hold passwords."""

    database_url: str = Field(repr=False)
    redis_url: str = Field(repr=False)
    backend_url: str = Field(repr=False)


def addresses_from_environment(environment: Mapping[str, str] | None = None) -> Addresses:
    """Read the three addresses from the environment; ConfigError names the one that is missing."""
    environment = os.environ if environment is None else environment
    return Addresses(
        database_url=_required(environment, "ROUTER_DATABASE_URL", "postgresql://user@host/database"),
        redis_url=_required(environment, "ROUTER_REDIS_URL", "redis://host:6379/0"),
        backend_url=_required(environment, "MODELS_BACKEND_URL", "http://host:8100"),
    )


def _required(environment: Mapping[str, str], name: str, example: str) -> str:
    value = environment.get(name, "").strip()
    if not value:
        raise ConfigError(
            f"{name} is not set. Set it, e.g. {name}={example}, or source the demo's router.env."
        )
    return value


def config_folder(environment: Mapping[str, str] | None = None) -> Path:
    """The folder of the YAML files: `ROUTER_CONFIG`, or the `config/` that ships with the project."""
    environment = os.environ if environment is None else environment
    return Path(environment.get("ROUTER_CONFIG") or DEFAULT_CONFIG_FOLDER)


def data_folder(environment: Mapping[str, str] | None = None) -> Path:
    """Where this host keeps what can be made anew: `ROUTER_DATA`, or `router` in the user's cache."""
    environment = os.environ if environment is None else environment
    if environment.get("ROUTER_DATA"):
        return Path(environment["ROUTER_DATA"])
    cache = environment.get("XDG_CACHE_HOME") or Path(
        environment.get("HOME") or tempfile.gettempdir(), ".cache"
    )
    return Path(cache) / "router"


def learned_folder() -> Path:
    """Where this host keeps what its categorisers learned."""
    return data_folder() / "categories"


def load_config(folder: Path | None = None) -> RouterConfig:
    """Read and check `models.yaml` and `categories.yaml` in `folder`. ConfigError names file and key.

    After them `discovered.yaml`, where people's models win. If that is wrong nothing of it counts, and
    `discovered_problem` says why: what the search wrote must not keep the router from starting.
    """
    folder = folder or config_folder()
    path = folder / "models.yaml"
    data = read_yaml(path)
    categorising = load_categories(folder)
    names = {
        "categories": tuple(categorising.categories),
        "default_category": categorising.default_category,
        "categorising": categorising,
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


def read_discovered(folder: Path) -> tuple[dict[str, DiscoveredModel], str | None]:
    """The models of `discovered.yaml`, if there is one; else, or if it is wrong, none and what is wrong."""
    path = folder / DISCOVERED
    if not path.exists():
        return {}, None
    try:
        return validated(_Discovered, read_yaml(path), path).models, None
    except ConfigError as error:
        return {}, f"{error} None of its models is read; mend it, or delete it: the search writes it anew."


def load_categories(folder: Path | None = None) -> CategorySettings:
    """Read and check `categories.yaml` in `folder`, or the shipped one where that has none."""
    folder = folder or config_folder()
    path = folder / "categories.yaml"
    if not path.exists():
        folder = DEFAULT_CONFIG_FOLDER
        path = folder / "categories.yaml"
    data = read_yaml(path)
    if isinstance(data, dict):
        if "folder" in data:
            raise ConfigError(f"{path}: folder: no such key; examples are looked for beside the file.")
        data = {**data, "folder": folder}
    return validated(CategorySettings, data, path)


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
