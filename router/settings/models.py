"""Models: settings in `config/models.yaml` and `config/discovered.yaml`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from router.errors import ConfigError
from router.request import CAPABILITIES
from router.settings.files import Frozen, read_yaml, validated
from router.traffic import TrafficTarget

MODEL_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
DISCOVERED = "discovered.yaml"
NO_PRICE = "set input_price and output_price in config/models.yaml, or remove the budget."


def _known_capability(name: str) -> str:
    if name not in CAPABILITIES:
        raise ValueError(f"{name!r} is not a capability; known: {', '.join(sorted(CAPABILITIES))}")
    return name


Capability = Annotated[str, AfterValidator(_known_capability)]


def _checked_target(line: str) -> str:
    TrafficTarget.parse(line)
    return line


TrafficTargetLine = Annotated[str, AfterValidator(_checked_target)]


class InteractiveShare(Frozen):
    """Share of sends `reserved` for interactive requests, and their `at_most` while batch waits."""

    reserved: float = Field(default=0.0, ge=0, le=0.9)
    at_most: float = Field(default=0.5, gt=0, le=1)


class _AnyModel(Frozen):
    endpoint: str | None = None  # name at the Models Backend; default: the model's own name
    target: TrafficTargetLine  # initial value of the Variable `traffic.<model>`
    ranks: dict[str, int]  # category -> initial rank, 1 is best
    context_tokens: int = Field(default=8192, ge=1)
    max_tokens: int = Field(default=512, ge=1)
    timeout_seconds: float = Field(default=180.0, gt=0)
    input_price: float = Field(default=0.0, ge=0)
    output_price: float = Field(default=0.0, ge=0)
    capabilities: frozenset[Capability] | None = None  # default: those of the backend

    @model_validator(mode="after")
    def _has_a_price(self) -> _AnyModel:
        if TrafficTarget.parse(self.target).money and not (self.input_price or self.output_price):
            raise ValueError(f"its target {self.target!r} limits money, but it has no price: {NO_PRICE}")
        return self


class ModelSettings(_AnyModel):
    """A model of `config/models.yaml`. Prices in USD per million tokens, times in seconds."""

    state: Literal["active", "paused"] = "active"
    interactive: InteractiveShare | None = None  # overrides `traffic.interactive`


class RosterChange(Frozen):
    """A change to a discovered model: what, when, by whom, and why."""

    what: Literal["taken", "promoted", "retired"]
    at: datetime
    by: str
    why: str


class DiscoveredModel(_AnyModel):
    """A model of `config/discovered.yaml`, which the discovery writes."""

    state: Literal["probation", "active", "retired"]
    history: tuple[RosterChange, ...] = Field(min_length=1)


class _Discovered(Frozen):
    models: dict[Annotated[str, Field(pattern=MODEL_NAME_PATTERN)], DiscoveredModel]


def read_discovered(folder: Path) -> tuple[dict[str, DiscoveredModel], str | None]:
    """Reads `discovered.yaml`; returns its models, and the error if the file is invalid."""
    path = folder / DISCOVERED
    if not path.exists():
        return {}, None
    try:
        return validated(_Discovered, read_yaml(path), path).models, None
    except ConfigError as error:
        return {}, f"{error} All of its models are ignored. Fix the file, or delete it to have it rewritten."
