"""`config/categories.yaml`: the categories and how prompts are classified."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

from pydantic import Field, field_validator, model_validator

from router.errors import ConfigError
from router.settings.environment import DEFAULT_CONFIG_FOLDER, config_folder
from router.settings.files import Frozen, read_yaml, validated

CATEGORY_PATTERN = r"^[a-z][a-z0-9_-]{0,49}$"


class RuleSettings(Frozen):
    """One rule of `config/categories.yaml`: a pattern or words, looked for in the lower-case prompt."""

    category: str
    pattern: str | None = Field(default=None, min_length=1)
    words: str | None = Field(default=None, min_length=1)  # separated by spaces
    weight: float = Field(default=1.0, gt=0, le=10)

    @model_validator(mode="after")
    def _one_of_both(self) -> RuleSettings:
        if (self.pattern is None) == (self.words is None):
            raise ValueError("a rule has either a pattern or words")
        return self

    @field_validator("pattern")
    @classmethod
    def _pattern_compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return pattern


class ClassificationSettings(Frozen):
    """`config/categories.yaml`, whole, and the folder that it stands in. Times in seconds."""

    renamed_keys: ClassVar = {"categorise_tasks": "classify_tasks", "patience_seconds": "timeout_seconds"}

    categories: dict[str, str]  # name -> what belongs there, in words
    default_category: str
    examples: tuple[str, ...] = Field(min_length=1)  # patterns of file names, from `folder`
    rules: tuple[RuleSettings, ...] = ()
    rules_decide_at: float = Field(default=3.0, gt=0)
    threshold: float = Field(default=0.45, ge=0, le=1)
    temperature: float = Field(default=1.0, gt=0, le=10)
    classify_tasks: bool = True
    timeout_seconds: float = Field(default=1.0, gt=0, le=60)
    folder: Path = DEFAULT_CONFIG_FOLDER

    @model_validator(mode="after")
    def _names_agree(self) -> ClassificationSettings:
        for category in self.categories:
            if not re.fullmatch(CATEGORY_PATTERN, category):
                raise ValueError(f"categories: {category!r} is no category name ({CATEGORY_PATTERN})")
        if self.default_category not in self.categories:
            raise ValueError(f"default_category: {self.default_category!r} is not among the categories")
        for place, rule in enumerate(self.rules):
            if rule.category not in self.categories:
                raise ValueError(f"rules.{place}.category: {rule.category!r} is not among the categories")
        return self


def load_categories(folder: Path | None = None) -> ClassificationSettings:
    """Read and check `categories.yaml` in `folder`, or the shipped one where that has none."""
    folder = folder or config_folder()
    path = folder / "categories.yaml"
    if not path.exists():
        folder = DEFAULT_CONFIG_FOLDER
        path = folder / "categories.yaml"
    data = read_yaml(path)
    if isinstance(data, dict):
        if "folder" in data:
            raise ConfigError(f"{path}: folder: no such key; examples are looked for beside the file.")
        data = {**data, "folder": folder}
    return validated(ClassificationSettings, data, path)
