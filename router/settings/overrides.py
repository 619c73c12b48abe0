"""Settings that can be overridden for a category, in files that a config folder need not have."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from router.errors import ConfigError
from router.settings.environment import config_folder, own_or_shipped
from router.settings.files import Frozen, Settings, first_problem, read_yaml, validated


class WithOverrides(Frozen):
    """Settings of a file with a section `categories`: category -> overrides."""

    categories: dict[str, dict[str, Any]] = Field(default={})


Loaded = TypeVar("Loaded", bound=WithOverrides)


def overridden(usual: Settings, overrides: Mapping[str, Any]) -> Settings:
    """Returns `usual` with some values replaced. Raises ValidationError."""
    return type(usual).model_validate({**usual.model_dump(), **overrides})


def check_overrides(usual: Frozen, categories: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises ValueError with the key of the first override of a category that is invalid."""
    category = ""
    try:
        for category, overrides in categories.items():  # noqa: B007 - named in the error
            overridden(usual, overrides)
    except ValidationError as error:
        key, message = first_problem(error, type(usual))
        raise ValueError(f"categories.{category}{'.' + key if key else ''}: {message}") from error


def load_with_overrides(
    kind: type[Loaded], name: str, folder: Path | None, categories: Collection[str]
) -> Loaded:
    """Loads the file `name` from `folder`, or the shipped file.

    Raises ConfigError with file and key, also for overrides of a category that is not among `categories`.
    """
    folder = folder or config_folder()
    path = own_or_shipped(folder, name)
    settings = validated(kind, read_yaml(path), path)
    for category in settings.categories if path.parent == folder else ():  # the shipped file may have others
        if category not in categories:
            raise ConfigError(f"{path}: categories.{category}: no such category; known: {sorted(categories)}")
    return settings
