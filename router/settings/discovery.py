"""What the search for better models looks for: `config/search.yaml`, read once into frozen values."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from router.errors import ConfigError
from router.settings.environment import DEFAULT_CONFIG_FOLDER, config_folder
from router.settings.files import Frozen, read_yaml, validated
from router.traffic import TrafficTarget

CATALOG_NAME = r"^[a-z][a-z0-9_-]{0,49}$"
VARIABLE_NAME = r"^[A-Za-z_][A-Za-z0-9_]{0,99}$"
MEGABYTE = 1024 * 1024

Fact = Literal["license", "parameters", "context", "price", "score", "age"]


class FileCatalogSettings(Frozen):
    """A file of models, YAML or JSON; `path` counts from the folder of the config."""

    kind: Literal["file"]
    name: str = Field(pattern=CATALOG_NAME)
    path: str = Field(min_length=1)
    max_megabytes: float = Field(default=4, gt=0, le=100)
    max_models: int = Field(default=10_000, ge=1, le=100_000)


class ProviderCatalogSettings(Frozen):
    """An OpenAI-compatible provider's list of models. Address and key are in the environment."""

    kind: Literal["provider"]
    name: str = Field(pattern=CATALOG_NAME)
    url_variable: str = Field(default="LLAMA_API_BASE", pattern=VARIABLE_NAME)
    key_variable: str = Field(default="LLAMA_API_KEY", pattern=VARIABLE_NAME)
    timeout_seconds: float = Field(default=20.0, gt=0, le=300)
    max_megabytes: float = Field(default=4, gt=0, le=100)
    max_models: int = Field(default=10_000, ge=1, le=100_000)


CatalogSettings = Annotated[FileCatalogSettings | ProviderCatalogSettings, Field(discriminator="kind")]


class CriteriaSettings(Frozen):
    """What a model must be, by what a catalogue says, to be tried for a category.

    Parameters in thousand millions, prices in USD a million tokens, scores between 0 and 1.
    """

    renamed_keys: ClassVar = {"licences": "licenses"}

    licenses: tuple[str, ...] | None = None  # None: any
    parameters_min: float = Field(default=0.0, ge=0)
    parameters_max: float | None = Field(default=None, gt=0)
    context_min: int = Field(default=1, ge=1)
    input_price_max: float | None = Field(default=None, ge=0)
    output_price_max: float | None = Field(default=None, ge=0)
    benchmarks: dict[str, float] = Field(default={})  # benchmark -> what it weighs
    benchmarks_share: float = Field(default=0.5, gt=0, le=1)
    score_min: float = Field(default=0.0, ge=0, le=1)
    age_days_max: int | None = Field(default=None, ge=1)
    merges: bool = False
    may_be_unknown: tuple[Fact, ...] = ()
    candidates: int = Field(default=2, ge=0, le=100)

    @field_validator("may_be_unknown", mode="before")
    @classmethod
    def _accept_former_spelling(cls, facts: Any) -> Any:
        return (
            ["license" if fact == "licence" else fact for fact in facts] if isinstance(facts, list) else facts
        )

    @field_validator("benchmarks")
    @classmethod
    def _weights_are_weights(cls, benchmarks: dict[str, float]) -> dict[str, float]:
        for benchmark, weight in benchmarks.items():
            if not 0 < weight <= 1000:  # noqa: PLR2004 - a bound that catches a typing error
                raise ValueError(f"{benchmark}: {weight:g} is not above 0 and at most 1000")
        return benchmarks

    @model_validator(mode="after")
    def _bounds_leave_room(self) -> CriteriaSettings:
        if self.parameters_max is not None and self.parameters_max < self.parameters_min:
            raise ValueError("parameters_max is less than parameters_min: no model could pass")
        if self.score_min > 0 and not self.benchmarks:
            raise ValueError("score_min needs benchmarks that count")
        return self


class TrialSettings(Frozen):
    """How a candidate is tried against the model that it would have to beat. Times in seconds."""

    renamed_keys: ClassVar = {
        "patience_seconds": "timeout_seconds",
        "at_once": "max_concurrency",
        "least_answers": "min_answers",
        "again_after_nights": "retry_after_days",
    }

    prompts: int = Field(default=30, ge=1, le=1000)  # a category
    max_tokens: int = Field(default=400, ge=1)
    timeout_seconds: float = Field(default=120.0, gt=0, le=3600)  # for a permit
    max_concurrency: int = Field(default=4, ge=1, le=100)
    min_answers: int = Field(default=12, ge=1)
    judged: int = Field(default=10, ge=0, le=1000)  # pairs of answers
    margin: float = Field(default=0.01, ge=0, lt=1)
    margin_errors: float = Field(default=1.6, ge=0)
    retry_after_days: int = Field(default=14, ge=0, le=1000)
    budget_usd: float = Field(default=2.0, ge=0)

    @model_validator(mode="after")
    def _enough_prompts(self) -> TrialSettings:
        if self.min_answers > self.prompts:
            raise ValueError("min_answers is more than prompts: no candidate could win")
        return self


class ProbationSettings(Frozen):
    """What a model that won its trial is sent, and when its log decides. Times in seconds."""

    renamed_keys: ClassVar = {"least_calls": "min_calls", "most_nights": "max_days"}

    target: str = "6/min"
    max_tokens: int = Field(default=512, ge=1)
    timeout_seconds: float = Field(default=180.0, gt=0)
    min_calls: int = Field(default=60, ge=1)
    max_days: int = Field(default=14, ge=1, le=400)
    margin: float = Field(default=0.0, ge=0, lt=1)

    @field_validator("target")
    @classmethod
    def _target_parses(cls, line: str) -> str:
        TrafficTarget.parse(line)
        return line


class DiscoverySettings(Frozen):
    """`config/search.yaml`, whole."""

    renamed_keys: ClassVar = {"catalogues": "catalogs"}

    catalogs: tuple[CatalogSettings, ...] = ()
    criteria: CriteriaSettings = CriteriaSettings()
    categories: dict[str, dict[str, Any]] = Field(default={})
    trials: TrialSettings = TrialSettings()
    probation: ProbationSettings = ProbationSettings()

    @model_validator(mode="after")
    def _names_differ(self) -> DiscoverySettings:
        names = [catalogue.name for catalogue in self.catalogs]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"catalogues: the name {name!r} stands twice")
        return self

    @model_validator(mode="after")
    def _categories_are_criteria(self) -> DiscoverySettings:
        category = ""
        try:
            for category in self.categories:
                self.criteria_of(category)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in ("categories", category, *first["loc"]))
            raise ValueError(f"{key}: {str(first['msg']).removeprefix('Value error, ')}") from error
        return self

    def criteria_of(self, category: str) -> CriteriaSettings:
        """What a model must be for this category: the usual criteria, with what is different there."""
        renamed = CriteriaSettings.renamed_keys
        own = {renamed.get(key, key): value for key, value in self.categories.get(category, {}).items()}
        return CriteriaSettings.model_validate({**self.criteria.model_dump(), **own})


def load_discovery(folder: Path | None, categories: Collection[str]) -> DiscoverySettings:
    """Read and check `search.yaml` in `folder`, or the shipped one where that has none.

    ConfigError names file and key, also of a category that is not among `categories`.
    """
    path = (folder or config_folder()) / "search.yaml"
    own = path.exists()
    path = path if own else DEFAULT_CONFIG_FOLDER / "search.yaml"
    settings = validated(DiscoverySettings, read_yaml(path), path)
    for category in settings.categories:
        if own and category not in categories:
            raise ConfigError(f"{path}: categories.{category}: no such category; known: {sorted(categories)}")
    return settings
