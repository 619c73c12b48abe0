"""`config/search.yaml`: which models the discovery looks for, and how it tries them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from router.errors import echoed
from router.settings.files import Frozen, with_new_names
from router.settings.models import TrafficTargetLine
from router.settings.overrides import WithOverrides, check_overrides, load_with_overrides, overridden

CATALOG_NAME = r"^[a-z][a-z0-9_-]{0,49}$"
VARIABLE_NAME = r"^[A-Za-z_][A-Za-z0-9_]{0,99}$"
MEGABYTE = 1024 * 1024

Fact = Literal["license", "parameters", "context", "price", "score", "age"]


class FileCatalogSettings(Frozen):
    """A catalog file, YAML or JSON; `path` is relative to the config folder."""

    kind: Literal["file"]
    name: str = Field(pattern=CATALOG_NAME)
    path: str = Field(min_length=1)
    max_megabytes: float = Field(default=4, gt=0, le=100)
    max_models: int = Field(default=10_000, ge=1, le=100_000)


class ProviderCatalogSettings(Frozen):
    """The model list of an OpenAI-compatible provider; environment variables hold its address and key."""

    kind: Literal["provider"]
    name: str = Field(pattern=CATALOG_NAME)
    url_variable: str = Field(default="LLAMA_API_BASE", pattern=VARIABLE_NAME)
    key_variable: str = Field(default="LLAMA_API_KEY", pattern=VARIABLE_NAME)
    timeout_seconds: float = Field(default=20.0, gt=0, le=300)
    max_megabytes: float = Field(default=4, gt=0, le=100)
    max_models: int = Field(default=10_000, ge=1, le=100_000)


CatalogSettings = Annotated[FileCatalogSettings | ProviderCatalogSettings, Field(discriminator="kind")]


class CriteriaSettings(Frozen):
    """Requirements on a candidate, checked against its catalog entry.

    Parameters in billions, prices in USD per million tokens, scores from 0 to 1. None: not required.
    """

    renamed_keys: ClassVar[Mapping[str, str | None]] = {"licences": "licenses"}

    licenses: tuple[str, ...] | None = None
    parameters_min: float = Field(default=0.0, ge=0)
    parameters_max: float | None = Field(default=None, gt=0)
    context_min: int = Field(default=1, ge=1)
    input_price_max: float | None = Field(default=None, ge=0)
    output_price_max: float | None = Field(default=None, ge=0)
    benchmarks: dict[str, Annotated[float, Field(gt=0, le=1000)]] = Field(default={})  # weights
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

    @model_validator(mode="after")
    def _bounds_are_consistent(self) -> CriteriaSettings:
        if self.parameters_max is not None and self.parameters_max < self.parameters_min:
            raise ValueError("parameters_max is less than parameters_min: no model could pass")
        if self.score_min > 0 and not self.benchmarks:
            raise ValueError("score_min needs benchmarks with a weight")
        return self


class TrialSettings(Frozen):
    """Trial of a candidate against the incumbent model of a category. Times in seconds."""

    renamed_keys: ClassVar[Mapping[str, str | None]] = {
        "patience_seconds": "timeout_seconds",
        "at_once": "max_concurrency",
        "least_answers": "min_answers",
        "again_after_nights": "retry_after_days",
    }

    prompts: int = Field(default=30, ge=1, le=1000)  # per category
    target: TrafficTargetLine = "120/min, 4 at once"  # of a candidate, in all categories together
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
    """Traffic of a model on probation, and the evidence for promoting or retiring it. Times in seconds."""

    renamed_keys: ClassVar[Mapping[str, str | None]] = {"least_calls": "min_calls", "most_nights": "max_days"}

    target: TrafficTargetLine = "6/min"
    max_tokens: int = Field(default=512, ge=1)
    timeout_seconds: float = Field(default=180.0, gt=0)
    min_calls: int = Field(default=40, ge=1)
    max_days: int = Field(default=14, ge=1, le=400)
    margin: float = Field(default=0.0, ge=0, lt=1)


class DiscoverySettings(WithOverrides):
    """Contents of `config/search.yaml`; categories override `criteria`."""

    renamed_keys: ClassVar[Mapping[str, str | None]] = {"catalogues": "catalogs"}

    catalogs: tuple[CatalogSettings, ...] = ()
    criteria: CriteriaSettings = CriteriaSettings()
    trials: TrialSettings = TrialSettings()
    probation: ProbationSettings = ProbationSettings()

    @field_validator("categories", mode="before")
    @classmethod
    def _accept_renamed_criteria(cls, categories: Any, info: ValidationInfo) -> Any:
        if not isinstance(categories, dict):
            return categories
        renamed = CriteriaSettings.renamed_keys
        return {category: with_new_names(own, renamed, info) for category, own in categories.items()}

    @model_validator(mode="after")
    def _names_differ(self) -> DiscoverySettings:
        names = [catalog.name for catalog in self.catalogs]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"catalogs: duplicate name {echoed(name)}")
        return self

    @model_validator(mode="after")
    def _overrides_are_valid(self) -> DiscoverySettings:
        check_overrides(self.criteria, self.categories)
        return self

    def criteria_of(self, category: str) -> CriteriaSettings:
        """Returns the criteria of a category: the usual ones with its overrides."""
        return overridden(self.criteria, self.categories.get(category, {}))


def load_discovery(folder: Path | None, categories: Collection[str]) -> DiscoverySettings:
    """Loads `search.yaml`; see `load_with_overrides`."""
    return load_with_overrides(DiscoverySettings, "search.yaml", folder, categories)
