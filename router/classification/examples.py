"""Training examples: JSON Lines of objects with `prompt`, `category` and `kind`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from router.errors import ConfigError, echoed
from router.files import json_lines
from router.settings import ClassificationSettings

MIN_EXAMPLES = 3  # per category
_KEYS = {"prompt", "category", "kind"}


@dataclass(frozen=True, slots=True)
class Example:
    """One labeled prompt; `kind` is its style or source."""

    prompt: str
    category: str
    kind: str


def example_files(settings: ClassificationSettings) -> list[Path]:
    """Lists the files of all patterns, in their order. Raises ConfigError if a pattern matches no file."""
    found: list[Path] = []
    for pattern in settings.examples:
        files = sorted(settings.folder.glob(pattern))
        if not files:
            file = settings.folder / "categories.yaml"
            raise ConfigError(f"{file}: examples: no file matches {echoed(pattern)}")
        found.extend(files)
    return found


def read_examples(settings: ClassificationSettings) -> list[Example]:
    """Reads all examples. Raises ConfigError for an invalid line, or a category with too few examples."""
    examples = [example for file in example_files(settings) for example in _read(file, settings)]
    counts = Counter(example.category for example in examples)
    for category in settings.categories:
        if counts[category] < MIN_EXAMPLES:
            raise ConfigError(
                f"{settings.folder / 'categories.yaml'}: categories.{category}: has {counts[category]}"
                f" examples and needs at least {MIN_EXAMPLES}; add them to a file that `examples` matches."
            )
    return examples


def _read(file: Path, settings: ClassificationSettings) -> Iterator[Example]:
    for place, row in json_lines(file):
        if row.keys() != _KEYS or not all(isinstance(value, str) for value in row.values()):
            raise ConfigError(f"{place}: must have exactly the strings prompt, category and kind")
        if row["category"] not in settings.categories:
            category = echoed(row["category"])
            raise ConfigError(f"{place}: category: {category} is not defined in categories.yaml")
        if not row["prompt"].strip():
            raise ConfigError(f"{place}: prompt: is empty")
        yield Example(**row)
