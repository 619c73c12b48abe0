"""The prompts that the categoriser learns from: lines of JSON with prompt, category and kind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from router.errors import ConfigError
from router.settings import ClassificationSettings

FEWEST_EXAMPLES = 3  # of each category


@dataclass(frozen=True, slots=True)
class Example:
    """One line of an example file."""

    prompt: str
    category: str
    kind: str


def example_files(settings: ClassificationSettings) -> list[Path]:
    """The files that `settings` names, in their order; ConfigError if a pattern matches none."""
    found: list[Path] = []
    for pattern in settings.examples:
        files = sorted(settings.folder.glob(pattern))
        if not files:
            raise ConfigError(f"{settings.folder / 'categories.yaml'}: examples: no file matches {pattern!r}")
        found.extend(files)
    return found


def read_examples(settings: ClassificationSettings) -> list[Example]:
    """All examples that `settings` names; ConfigError names file and line, or who has too few."""
    examples: list[Example] = []
    for file in example_files(settings):
        examples.extend(_examples_of(file, settings))
    for category in settings.categories:
        number = sum(example.category == category for example in examples)
        if number < FEWEST_EXAMPLES:
            raise ConfigError(
                f"{settings.folder / 'categories.yaml'}: categories.{category}: has {number} examples, and"
                f" needs at least {FEWEST_EXAMPLES}; write them into a file that `examples` names."
            )
    return examples


def _examples_of(file: Path, settings: ClassificationSettings) -> list[Example]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read as UTF-8 text: {error}") from error
    return [
        _example(line, f"{file}, line {number}", settings)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _example(line: str, where: str, settings: ClassificationSettings) -> Example:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not a line of JSON: {error}") from error
    wanted = {"prompt", "category", "kind"}
    if (
        not isinstance(fields, dict)
        or set(fields) != wanted
        or not all(isinstance(v, str) for v in fields.values())
    ):
        raise ConfigError(
            f"{where}: must be an object with the texts prompt, category and kind, and nothing else"
        )
    if fields["category"] not in settings.categories:
        raise ConfigError(f"{where}: category: {fields['category']!r} is not named in categories.yaml")
    if not fields["prompt"].strip():
        raise ConfigError(f"{where}: prompt: is empty")
    return Example(fields["prompt"], fields["category"], fields["kind"])
