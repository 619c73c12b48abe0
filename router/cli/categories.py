"""The verbs `router categories`: how well prompts are told apart, and why one is of its category."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from router.cli import terminal
from router.errors import InputError
from router.settings import ClassificationSettings, classifier_folder, load_categories

if TYPE_CHECKING:
    from router.classification import Classification, Classifier, Explanation

BINS = 10

CATEGORIES_HELP = """
Tell what kind of prompt a prompt is, and how well that is done.

Categories, rules and examples are in config/categories.yaml and config/examples/.
"""
EVALUATE_HELP = """
Measure the categories on files of prompts whose category is known.

Each line is a JSON object with source, prompt, category and, where the category is open to doubt,
"ambiguous": true. Printed for each source: accuracy and macro-F1 with all rows and without the ambiguous
ones, how far confidence is from being right (expected calibration error), and what was taken for what.

\b
Examples:
  router categories evaluate prompts/*.jsonl
  router categories evaluate prompts.jsonl --json | jq .mean
"""
EXPLAIN_HELP = """
Show a prompt's category and why: the rules that match, and the words that speak for it or against it.

\b
Examples:
  router categories explain "Write a haiku about a compiler"
  router categories explain - <prompt.txt
"""

categories = terminal.verbs(help=CATEGORIES_HELP)


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt whose category is known."""

    source: str
    prompt: str
    category: str
    ambiguous: bool


@dataclass(frozen=True, slots=True)
class Score:
    """How well the categories of some rows were told. `confusion`: true category -> told one -> rows."""

    rows: int
    accuracy: float | None
    macro_f1: float | None
    calibration_error: float | None
    confusion: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@categories.command(help=EVALUATE_HELP)
def evaluate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="JSONL files.")],
    *,
    as_json: terminal.Json = False,
    config: terminal.Config = terminal.DEFAULT_CONFIG,
) -> None:
    settings = load_categories(config)
    rows = [row for file in files for row in read_rows(file, tuple(settings.categories))]
    if not rows:
        raise InputError("The files hold no rows.")
    categoriser = _built(settings)
    started = time.process_time()
    told = categoriser.classify_many([row.prompt for row in rows])
    seconds = time.process_time() - started
    report = assess(rows, told)
    report["prompts_per_second"] = round(len(rows) / seconds) if seconds else None
    if as_json:
        terminal.print_json(report)
    else:
        _print(report)


@categories.command(help=EXPLAIN_HELP)
def explain(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt; - reads standard input.")],
    *,
    as_json: terminal.Json = False,
    config: terminal.Config = terminal.DEFAULT_CONFIG,
) -> None:
    if prompt == "-":
        prompt = typer.get_binary_stream("stdin").read().decode("utf-8", "replace")
    explained = _built(load_categories(config)).explain(prompt)
    if as_json:
        terminal.print_json(explained)
    else:
        _print_explanation(explained)


def read_rows(file: Path, names: Sequence[str]) -> Iterator[Row]:
    """The rows of one file; InputError names the line that is none."""
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _row(line, f"{file}, line {number}", names)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text: {error}") from error


def _row(line: str, where: str, names: Sequence[str]) -> Row:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not a line of JSON: {error}") from error
    if not isinstance(fields, dict) or not all(
        isinstance(fields.get(key), str) for key in ("prompt", "category")
    ):
        raise InputError(f"{where}: must be an object with the texts prompt and category")
    if fields["category"] not in names:
        raise InputError(
            f"{where}: category: {fields['category']!r} is unknown; known are {', '.join(names)}"
        )
    source = str(fields.get("source") or "unnamed")
    return Row(source, fields["prompt"], fields["category"], bool(fields.get("ambiguous")))


def _built(settings: ClassificationSettings) -> Classifier:
    # Not at the top: it brings numpy and scipy, and every other verb would wait for them.
    from router.classification import Classifier  # noqa: PLC0415

    return Classifier.build(settings, classifier_folder())


def assess(rows: Sequence[Row], told: Sequence[Classification]) -> dict[str, Any]:
    """Scores for each source, over all rows, and the mean of the sources."""
    pairs = list(zip(rows, told, strict=True))
    by_source: dict[str, Any] = {}
    for source in dict.fromkeys(row.source for row in rows):
        by_source[source] = _both_ways([pair for pair in pairs if pair[0].source == source])
    mean = {
        way: _mean([scores[way].accuracy for scores in by_source.values()])
        for way in ("all", "without_ambiguous")
    }
    return {"sources": by_source, "together": _both_ways(pairs), "mean": mean}


def _both_ways(pairs: Sequence[tuple[Row, Classification]]) -> dict[str, Score]:
    return {
        "all": _score(pairs),
        "without_ambiguous": _score([pair for pair in pairs if not pair[0].ambiguous]),
    }


def _score(pairs: Sequence[tuple[Row, Classification]]) -> Score:
    if not pairs:
        return Score(0, None, None, None)
    counts = Counter((row.category, one.category) for row, one in pairs)
    true = dict.fromkeys(row.category for row, _ in pairs)
    confusion = {
        name: {other: n for (own, other), n in sorted(counts.items()) if own == name} for name in true
    }
    right = [row.category == one.category for row, one in pairs]
    return Score(
        len(pairs),
        round(sum(right) / len(pairs), 4),
        round(sum(_f1(counts, name) for name in true) / len(true), 4),
        round(_calibration_error([one.confidence for _, one in pairs], right), 4),
        confusion,
    )


def _f1(counts: Mapping[tuple[str, str], int], name: str) -> float:
    hits = counts.get((name, name), 0)
    told = sum(n for (_, other), n in counts.items() if other == name)
    there = sum(n for (own, _), n in counts.items() if own == name)
    return 2 * hits / (told + there)


def _calibration_error(confidences: Sequence[float], right: Sequence[bool]) -> float:
    """How far confidence is from the share that is right, on average over ten bins."""
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for confidence, hit in zip(confidences, right, strict=True):
        bins[min(BINS - 1, int(confidence * BINS))].append((confidence, hit))
    gaps = (abs(sum(confidence - hit for confidence, hit in held)) for held in bins)
    return sum(gaps) / len(right)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 4) if known else None


def _print(report: Mapping[str, Any]) -> None:
    table = terminal.quiet_table(
        "source", "rows", "accuracy", "macro-F1", "clear rows", "accuracy", "macro-F1", "calibration error",
        "taken for another (clear rows)",
        right=("rows", "accuracy", "macro-F1", "clear rows", "calibration error"),
    )  # fmt: skip
    for source, scores in {**report["sources"], "together": report["together"]}.items():
        every, clear = scores["all"], scores["without_ambiguous"]
        table.add_row(
            source, f"{every.rows:,}", _number(every.accuracy), _number(every.macro_f1), f"{clear.rows:,}",
            _number(clear.accuracy), _number(clear.macro_f1), _number(clear.calibration_error),
            _mistaken(clear),
        )  # fmt: skip
    mean = report["mean"]
    table.add_row(
        "mean of sources", "", _number(mean["all"]), "", "", _number(mean["without_ambiguous"]), "", "", ""
    )
    terminal.out().print(table)
    typer.echo(f"{report['prompts_per_second']:,} prompts a second of processor time")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _mistaken(score: Score) -> str:
    wrong = [
        (n, own, other) for own, row in score.confusion.items() for other, n in row.items() if own != other
    ]
    return ", ".join(f"{own} as {other} {n:,}" for n, own, other in sorted(wrong, reverse=True)) or "none"


def _print_explanation(explained: Explanation) -> None:
    found = explained.categorised
    typer.echo(f"{found.category}  {found.confidence:.2f}  ({found.reason})")
    chances = ", ".join(f"{name} {chance:.2f}" for name, chance in explained.probabilities.items())
    typer.echo(f"classifier  {chances}")
    for category, weight, match in explained.rules:
        typer.echo(f"rule        {category} {weight:g}: {match!r}")
    for word, value in explained.words:
        typer.echo(f"word        {value:+.2f}  {word!r}")
    if explained.shape:
        typer.echo(f"shape       {', '.join(explained.shape)}")
