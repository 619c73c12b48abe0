"""Models: those of `config/models.yaml` and of `config/discovered.yaml`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from router.errors import ConfigError
from router.settings.files import Frozen, read_yaml, validated
from router.traffic import TrafficTarget

MODEL_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
DISCOVERED = "discovered.yaml"


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


def read_discovered(folder: Path) -> tuple[dict[str, DiscoveredModel], str | None]:
    """The models of `discovered.yaml`, if there is one; else, or if it is wrong, none and what is wrong."""
    path = folder / DISCOVERED
    if not path.exists():
        return {}, None
    try:
        return validated(_Discovered, read_yaml(path), path).models, None
    except ConfigError as error:
        return {}, f"{error} None of its models is read; mend it, or delete it: the search writes it anew."
