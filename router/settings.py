"""Everything that can be configured, read once into frozen values.

Two sources: the environment (where things are, and secrets) and `config/*.yaml` (how things behave). Both
are read only here and at the edges (`cli`, plugins); below, settings are passed as values. An unknown key is
refused with its file and path.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from router.errors import ConfigError
from router.traffic import TrafficTarget

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_CONFIG_FOLDER = ROOT / "config"
MODEL_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
CATEGORY_PATTERN = r"^[a-z][a-z0-9_-]{0,49}$"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(_Frozen):
    """One model of `config/models.yaml`. Prices in USD a million tokens, times in seconds."""

    endpoint: str | None = None  # the name the Models Backend knows; default: the model's own
    target: str  # the default of the Variable `traffic.<model>`
    ranks: dict[str, int]  # category -> starting rank, 1 is best
    context_tokens: int = Field(default=8192, ge=1)
    max_tokens: int = Field(default=512, ge=1)
    timeout_seconds: float = Field(default=180.0, gt=0)
    input_price: float = Field(default=0.0, ge=0)
    output_price: float = Field(default=0.0, ge=0)
    state: Literal["active", "paused"] = "active"

    @field_validator("target")
    @classmethod
    def _target_parses(cls, line: str) -> str:
        TrafficTarget.parse(line)
        return line


class BackendPaths(_Frozen):
    """Where the existing Models Backend serves what."""

    single: str = "/single"
    batch: str = "/batch"
    models: str = "/models"
    health: str = "/health"


class BackendFields(_Frozen):
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


class BackendSettings(_Frozen):
    """How to speak to the Models Backend. Its address comes from the environment."""

    paths: BackendPaths = BackendPaths()
    fields: BackendFields = BackendFields()
    connect_seconds: float = Field(default=5.0, gt=0)
    max_connections: int = Field(default=6000, ge=1)
    max_answer_bytes: int = Field(default=16 * 1024 * 1024, ge=1024)


class WorkerSettings(_Frozen):
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


class RouterConfig(_Frozen):
    """`config/models.yaml`, whole."""

    models: dict[str, ModelSettings]
    default_category: str = "general"
    categories: tuple[str, ...] = ("technical", "creative", "general")
    backend: BackendSettings = BackendSettings()
    worker: WorkerSettings = WorkerSettings()

    @model_validator(mode="after")
    def _names_agree(self) -> RouterConfig:
        import re  # noqa: PLC0415 - only here

        for category in self.categories:
            if not re.match(CATEGORY_PATTERN, category):
                raise ValueError(f"categories: {category!r} is no category name ({CATEGORY_PATTERN})")
        if self.default_category not in self.categories:
            raise ValueError(f"default_category: {self.default_category!r} is not among the categories")
        for name, model in self.models.items():
            if not re.match(MODEL_NAME_PATTERN, name):
                raise ValueError(f"models.{name!r}: no model name ({MODEL_NAME_PATTERN})")
            unknown = sorted(set(model.ranks) - set(self.categories))
            if unknown:
                raise ValueError(
                    f"models.{name}.ranks.{unknown[0]}: no such category; known: {self.categories}"
                )
        return self


class Addresses(_Frozen):
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


def load_config(folder: Path | None = None) -> RouterConfig:
    """Read and check `models.yaml` in `folder`. ConfigError names file and key."""
    path = (folder or config_folder()) / "models.yaml"
    return _validated(RouterConfig, _read_yaml(path), path)


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a key written twice, which YAML would silently let win."""


def _unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.MarkedYAMLError(
                problem=f"the key {key!r} stands twice", problem_mark=key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def _read_yaml(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist. Set ROUTER_CONFIG to the folder that holds it.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}") from error
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error


def _validated(kind: type[RouterConfig], data: Any, path: Path) -> RouterConfig:
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path} must hold keys and values at its top; see the comments of the shipped file."
        )
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "(top)"
        message = str(first["msg"]).removeprefix("Value error, ")
        raise ConfigError(f"{path}: {where}: {message}") from error
