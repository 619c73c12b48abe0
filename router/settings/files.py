"""Reads the YAML files of `config/` strictly: duplicate keys, unknown keys and invalid values are errors."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, model_validator

from router.errors import ConfigError, echoed, printable

log = logging.getLogger("router.settings")

SHOWN_CHARACTERS = 60
MAX_KEY_CHARACTERS = 120
_CHOICES = re.compile(r"\^\(([\w|-]+)\)\$")  # a pattern of fixed names


class Frozen(BaseModel):
    """Immutable settings that reject unknown keys.

    `renamed_keys` maps a key of the previous release to its new name, or to None if it was removed. Such a
    key is accepted with a warning.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    renamed_keys: ClassVar[Mapping[str, str | None]] = {}

    @model_validator(mode="before")
    @classmethod
    def _accept_renamed_keys(cls, data: Any, info: ValidationInfo) -> Any:
        return with_new_names(data, cls.renamed_keys, info)


Settings = TypeVar("Settings", bound=Frozen)


def with_new_names(data: Any, renamed_keys: Mapping[str, str | None], info: ValidationInfo) -> Any:
    """Renames former keys of a mapping and logs a warning for each; raises ValueError if both names occur."""
    if not isinstance(data, dict) or not renamed_keys.keys() & data.keys():
        return data
    renamed = {}
    for key, value in data.items():
        new = renamed_keys.get(key, key)
        if new is None:
            log.warning("%s: %s is no longer used; remove it before the next release", info.context, key)
            continue
        if new != key:
            if new in data:
                raise ValueError(f"{key} is the former name of {new}: keep only {new}")
            log.warning("%s: %s is now called %s; rename it before the next release", info.context, key, new)
        renamed[new] = value
    return renamed


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe loader that rejects duplicate keys, of which YAML silently keeps the last."""


def _unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, Hashable):
            raise yaml.MarkedYAMLError(problem="a key must be a scalar", problem_mark=key_node.start_mark)
        if key in seen:
            raise yaml.MarkedYAMLError(
                problem=f"duplicate key {echoed(key)}", problem_mark=key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def read_yaml(path: Path) -> Any:
    """Parses a file. Raises ConfigError if it is missing, unreadable or not valid YAML."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist. Set ROUTER_CONFIG to the folder of that file.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}") from error
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error


def validated(kind: type[Settings], data: Any, path: Path) -> Settings:
    """Validates the data of a file. Raises ConfigError with the file and the key of the first error."""
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must be a mapping of keys to values; see the shipped file.")
    try:
        return kind.model_validate(data, context=path)
    except ValidationError as error:
        key, message = first_problem(error, kind)
        raise ConfigError(f"{path}: {key + ': ' if key else ''}{message}") from error


def first_problem(error: ValidationError, kind: type[Frozen]) -> tuple[str, str]:
    """Returns the dotted key and the message of the first error; no key if it concerns the whole."""
    first = error.errors()[0]
    location, problem = first["loc"], first["type"]
    message = str(first["msg"]).removeprefix("Value error, ")
    if problem == "extra_forbidden":
        message = _unknown_key(str(location[-1]), _keys(kind, location[:-1]))
    elif problem == "missing":
        message = "this key is required; add it"
    elif location[-1:] == ("[key]",):
        location = location[:-1]
        choices = _CHOICES.fullmatch(first.get("ctx", {}).get("pattern", ""))
        if choices:
            message = _unknown_key(str(location[-1]), choices[1].split("|"))
        else:
            message = f"this key {_plain(message)}"
    elif problem != "value_error":
        message = f"{_plain(message)}, got {_shown(first['input'])}"
    return ".".join(printable(key, MAX_KEY_CHARACTERS) for key in location), message


def _unknown_key(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    if near:
        return f"unknown key; did you mean `{near[0]}`?"
    return f"unknown key; the keys here are {', '.join(known)}" if known else "unknown key; remove it"


def _keys(kind: Any, location: Sequence[int | str]) -> list[str]:
    """Returns the keys that the settings class `kind` accepts at a location."""
    for key in location:
        fields = getattr(kind, "model_fields", {})
        if fields:
            kind = fields[key].annotation if key in fields else None
        else:  # an element of a container
            kind = next((one for one in reversed(get_args(kind)) if one is not ...), None)
        if NoneType in get_args(kind):  # X | None
            kind = next(one for one in get_args(kind) if one is not NoneType)
    return list(getattr(kind, "model_fields", {}))


def _plain(message: str) -> str:
    """Rewrites a message of pydantic, e.g. "Input should be a valid integer" as "must be an integer"."""
    text = re.sub(r"^\w+ should ", "must ", message)
    text = re.sub(r", (unable to|got) .*", "", text)
    text = re.sub(r"a valid (?=[aeiou])", "an ", text).replace("a valid ", "a ")
    text = re.sub(r"a dictionary( or .*)?$", "a mapping of keys to values", text)
    return text.replace(" after validation, not", ", not").replace("a tuple", "a list")


def _shown(value: Any) -> str:
    """Shows a value of a file, cut to SHOWN_CHARACTERS."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
