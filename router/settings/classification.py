"""`config/categories.yaml`: the categories, and how prompts are classified."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import Field, field_validator, model_validator

from router.errors import ConfigError, echoed
from router.settings.environment import DEFAULT_CONFIG_FOLDER, config_folder, own_or_shipped
from router.settings.files import Frozen, read_yaml, validated

CATEGORY_PATTERN = r"^[a-z][a-z0-9_-]{0,49}$"


class RuleSettings(Frozen):
    """A classification rule: a regular expression, or words, matched against the lower-case prompt."""

    category: str
    pattern: str | None = Field(default=None, min_length=1)
    words: str | None = Field(default=None, min_length=1)  # separated by spaces
    weight: float = Field(default=1.0, gt=0, le=10)

    @model_validator(mode="after")
    def _has_pattern_or_words(self) -> RuleSettings:
        if (self.pattern is None) == (self.words is None):
            raise ValueError("a rule has either a pattern or words")
        return self

    @field_validator("pattern")
    @classmethod
    def _pattern_compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"{echoed(pattern)} is not a regular expression: {error}") from error
        return pattern


class ClassificationSettings(Frozen):
    """Contents of `config/categories.yaml`, and the folder of the file. Times in seconds."""

    renamed_keys: ClassVar[Mapping[str, str | None]] = {
        "categorise_tasks": "classify_tasks",
        "patience_seconds": "timeout_seconds",
    }

    categories: dict[str, str]  # name -> description
    default_category: str
    examples: tuple[str, ...] = Field(min_length=1)  # glob patterns, relative to `folder`
    rules: tuple[RuleSettings, ...] = ()
    rules_decide_at: float = Field(default=3.0, gt=0)
    threshold: float = Field(default=0.45, ge=0, le=1)
    temperature: float = Field(default=1.0, gt=0, le=10)
    classify_tasks: bool = True
    timeout_seconds: float = Field(default=1.0, gt=0, le=60)
    folder: Path = DEFAULT_CONFIG_FOLDER

    @model_validator(mode="after")
    def _names_agree(self) -> ClassificationSettings:
        check_category_names(self.categories, self.default_category)
        for number, rule in enumerate(self.rules):
            if rule.category not in self.categories:
                raise ValueError(
                    f"rules.{number}.category: {echoed(rule.category)} is not among the categories"
                )
        return self


def check_category_names(categories: Collection[str], default_category: str) -> None:
    """Raises ValueError if a name is invalid, or the default is not among the categories."""
    for category in categories:
        if not re.fullmatch(CATEGORY_PATTERN, category):
            raise ValueError(f"categories: {echoed(category)} is not a category name ({CATEGORY_PATTERN})")
    if default_category not in categories:
        raise ValueError(f"default_category: {echoed(default_category)} is not among the categories")


def load_categories(folder: Path | None = None) -> ClassificationSettings:
    """Loads `categories.yaml` from `folder`, or the shipped file. Raises ConfigError with file and key."""
    path = own_or_shipped(folder or config_folder(), "categories.yaml")
    data = read_yaml(path)
    if isinstance(data, dict):
        if "folder" in data:
            raise ConfigError(f"{path}: folder: unknown key; examples are read from the folder of this file.")
        data = {**data, "folder": path.parent}
    return validated(ClassificationSettings, data, path)
