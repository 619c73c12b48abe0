"""Measures how often a reworded prompt keeps its category.

    python bench/robustness.py PAIRS.jsonl... [--config FOLDER] [--json]

Each line is a JSON object with `id`, `prompt` and `reworded`: the same request in other words.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run by its path: bench/queue.py would hide the standard library's queue
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from router.classification.classifier import Classifier
from router.errors import InputError, RouterError
from router.files import json_lines
from router.settings import classifier_folder
from router.settings.classification import load_categories


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and the same request in other words."""

    id: str
    prompt: str
    reworded: str


@dataclass(frozen=True, slots=True)
class Robustness:
    """Share of pairs with one category, and the changes: category of the prompt -> of the reworded one."""

    pairs: int
    unchanged: float
    changes: dict[str, int]
    changed: list[dict[str, str]]


def read_pairs(file: Path) -> Iterator[Pair]:
    """Reads pairs of JSON Lines. Raises InputError with file and line."""
    for place, row in json_lines(file, error=InputError):
        if not all(isinstance(row.get(key), str) for key in ("prompt", "reworded")):
            raise InputError(f"{place}: must have the strings prompt and reworded")
        yield Pair(str(row.get("id", "")), row["prompt"], row["reworded"])


def measure(classifier: Classifier, pairs: Sequence[Pair]) -> Robustness:
    """Classifies both prompts of each pair. Raises InputError without pairs."""
    if not pairs:
        raise InputError("The files contain no pairs.")
    before = classifier.classify_many([pair.prompt for pair in pairs])
    after = classifier.classify_many([pair.reworded for pair in pairs])
    changed = [
        {**asdict(pair), "from": first.category, "to": second.category}
        for pair, first, second in zip(pairs, before, after, strict=True)
        if first.category != second.category
    ]
    changes = Counter(f"{change['from']} -> {change['to']}" for change in changed)
    return Robustness(
        len(pairs), round(1 - len(changed) / len(pairs), 4), dict(changes.most_common()), changed
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the share of unchanged pairs, the changes, and each pair that changed."""
    options = _arguments(arguments)
    try:
        classifier = Classifier.build(load_categories(options.config), classifier_folder())
        found = measure(classifier, [pair for file in options.files for pair in read_pairs(file)])
    except RouterError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(asdict(found), ensure_ascii=False) if options.json else _report(found))
    return 0


def _arguments(arguments: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="PAIRS.jsonl")
    parser.add_argument("--config", type=Path, default=None, help="folder of categories.yaml")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def _report(found: Robustness) -> str:
    lines = [f"{found.unchanged:.1%} of {found.pairs} pairs keep their category"]
    lines += [f"  {change}: {number}" for change, number in found.changes.items()]
    lines += [
        f"{row['id']}  {row['from']} -> {row['to']}: {row['prompt'][:60]!r} / {row['reworded'][:60]!r}"
        for row in found.changed
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
