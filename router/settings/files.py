"""How a file of `config/` is read: strictly, into a frozen value, or refused with its file and key."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, model_validator

from router.errors import ConfigError

log = logging.getLogger("router.settings")

Settings = TypeVar("Settings", bound=BaseModel)


class Frozen(BaseModel):
    """Settings that never change and refuse unknown keys.

    `renamed_keys` maps a key of the previous release to its new name, or to None if it was removed. Such a
    key is accepted with a warning.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    renamed_keys: ClassVar[Mapping[str, str | None]] = {}

    @model_validator(mode="before")
    @classmethod
    def _accept_renamed_keys(cls, data: Any, info: ValidationInfo) -> Any:
        if not isinstance(data, dict) or not cls.renamed_keys.keys() & data.keys():
            return data
        renamed = {}
        for key, value in data.items():
            new = cls.renamed_keys.get(key, key)
            if new is None:
                log.warning("%s: %s is no longer used; remove it before the next release", info.context, key)
                continue
            if new != key:
                if new in data:
                    raise ValueError(f"{key} is the former name of {new}: keep only {new}")
                log.warning(
                    "%s: %s is now called %s; rename it before the next release", info.context, key, new
                )
            renamed[new] = value
        return renamed


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a key written twice, which YAML would silently let win."""


def _unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, Hashable):
            raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key_node.start_mark)
        if key in seen:
            raise yaml.MarkedYAMLError(
                problem=f"the key {key!r} stands twice", problem_mark=key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def read_yaml(path: Path) -> Any:
    """What the file holds; ConfigError names it if it is not there, no text or no YAML."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist. Set ROUTER_CONFIG to the folder that holds it.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}") from error
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error


def validated(kind: type[Settings], data: Any, path: Path) -> Settings:
    """The settings that the file's data hold; ConfigError names file and key of the first that is wrong."""
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path} must hold keys and values at its top; see the comments of the shipped file."
        )
    try:
        return kind.model_validate(data, context=path)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "(top)"
        message = str(first["msg"]).removeprefix("Value error, ")
        raise ConfigError(f"{path}: {where}: {message}") from error
