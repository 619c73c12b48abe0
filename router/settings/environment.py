"""Environment variables: addresses of Postgres, Redis and the Models Backend, and folders."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import Field, ValidationInfo, field_validator

from router.errors import ConfigError
from router.settings.files import Frozen
from router.settings.http import backend_address
from router.settings.postgres import PostgresAddress
from router.settings.redis import RedisAddress

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_CONFIG_FOLDER = ROOT / "config"
TOKEN_VARIABLE = "MODELS_BACKEND_TOKEN"  # noqa: S105 - its name
EXAMPLES = {
    "ROUTER_DATABASE_URL": "postgresql://user@host/database",
    "ROUTER_REDIS_URL": "redis://host:6379/0",
    "MODELS_BACKEND_URL": "http://host:8100",
}


_PARSERS: dict[str, Callable[[str], object]] = {
    "database_url": PostgresAddress.parse,
    "redis_url": RedisAddress.parse,
    "backend_url": backend_address,
}


class Addresses(Frozen):
    """URLs of Postgres, Redis and the Models Backend, and a token for the last. Never logged: secrets.

    Raises ConfigError for a URL that is not supported.
    """

    database_url: str = Field(repr=False)
    redis_url: str = Field(repr=False)
    backend_url: str = Field(repr=False)
    backend_token: str | None = Field(default=None, repr=False)

    @field_validator("database_url", "redis_url", "backend_url")
    @classmethod
    def _supported(cls, url: str, field: ValidationInfo) -> str:
        _PARSERS[field.field_name or ""](url)
        return url

    @field_validator("backend_token")
    @classmethod
    def _fits_a_header(cls, token: str | None) -> str | None:
        if token and not (token.isascii() and token.isprintable() and " " not in token):
            raise ConfigError(f"{TOKEN_VARIABLE} must be printable ASCII without spaces.")
        return token or None


def addresses_from_environment(environment: Mapping[str, str] | None = None) -> Addresses:
    """Reads the three addresses. Raises ConfigError with the name of a variable that is not set."""
    environment = os.environ if environment is None else environment
    return Addresses(
        database_url=_required(environment, "ROUTER_DATABASE_URL"),
        redis_url=_required(environment, "ROUTER_REDIS_URL"),
        backend_url=_required(environment, "MODELS_BACKEND_URL"),
        backend_token=environment.get(TOKEN_VARIABLE, "").strip() or None,
    )


def _required(environment: Mapping[str, str], name: str) -> str:
    value = environment.get(name, "").strip()
    if not value:
        raise missing_address(name)
    return value


def missing_address(name: str) -> ConfigError:
    """Returns the error for an address whose environment variable `name` is not set."""
    example = EXAMPLES[name]
    return ConfigError(f"{name} is not set. Set it, e.g. {name}={example}, or source .stack/router.env.")


def config_folder(environment: Mapping[str, str] | None = None) -> Path:
    """Folder of the YAML files: `ROUTER_CONFIG`, or the shipped `config/`."""
    environment = os.environ if environment is None else environment
    return Path(environment.get("ROUTER_CONFIG") or DEFAULT_CONFIG_FOLDER)


def own_or_shipped(folder: Path, name: str) -> Path:
    """Returns the file `name` (a relative path) in `folder`, or the shipped one if only that exists."""
    own, shipped = folder / name, DEFAULT_CONFIG_FOLDER / name
    return shipped if not own.exists() and shipped.exists() else own


def data_folder(environment: Mapping[str, str] | None = None) -> Path:
    """Folder of this host's caches: `ROUTER_DATA`, or `router` in the user's cache folder."""
    environment = os.environ if environment is None else environment
    if environment.get("ROUTER_DATA"):
        return Path(environment["ROUTER_DATA"])
    home = environment.get("HOME") or tempfile.gettempdir()
    return Path(environment.get("XDG_CACHE_HOME") or Path(home, ".cache")) / "router"


def classifier_folder() -> Path:
    """Folder of this host's trained classifiers."""
    return data_folder() / "categories"
