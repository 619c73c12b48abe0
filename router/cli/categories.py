"""The commands `router categories ...`: explain and evaluate the classification of prompts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from router.cli import terminal
from router.errors import InputError
from router.settings import ClassificationSettings, classifier_folder, load_categories

if TYPE_CHECKING:
    from router.classification import Classifier, Explanation, Scores

CATEGORIES_HELP = """
Explain and evaluate how prompts are classified.

Categories, rules and examples are in config/categories.yaml and config/examples/.
"""
EVALUATE_HELP = """
Measure classification quality on labeled prompts.

Each line is a JSON object with source, prompt, category and, where the category is debatable,
"ambiguous": true. Prints for each source accuracy and macro-F1, of all rows and of those that are not
ambiguous, the expected calibration error of the confidence, and the confused categories.

\b
Examples:
  router categories evaluate prompts/*.jsonl
  router categories evaluate prompts.jsonl --json | jq .mean
"""
EXPLAIN_HELP = """
Show a prompt's category and the reasons.

Reasons are matching rules, and words that speak for or against the category.

\b
Examples:
  router categories explain "Write a haiku about a compiler"
  router categories explain - <prompt.txt
"""

categories = terminal.verbs(help=CATEGORIES_HELP)


@categories.command(help=EVALUATE_HELP)
def evaluate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="JSONL files.")],
    *,
    as_json: terminal.Json = False,
    config: terminal.Config = terminal.DEFAULT_CONFIG,
) -> None:
    # Not at the top: it imports numpy, scipy and scikit-learn, which would delay every other command.
    from router.classification import evaluate_classification, read_labeled  # noqa: PLC0415

    settings = load_categories(config)
    prompts = [prompt for file in files for prompt in read_labeled(file, tuple(settings.categories))]
    if not prompts:
        raise InputError("The files contain no rows.")
    classifier = _build(settings)
    started = time.process_time()
    predicted = classifier.classify_many([prompt.prompt for prompt in prompts])
    seconds = time.process_time() - started
    report = evaluate_classification(prompts, predicted)
    report["prompts_per_second"] = round(len(prompts) / seconds) if seconds else None
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
    explanation = _build(load_categories(config)).explain(prompt)
    if as_json:
        terminal.print_json({
            "categorised": explanation.classification, "probabilities": explanation.probabilities,
            "rules": explanation.rules, "words": explanation.words, "shape": explanation.shape,
        })  # fmt: skip
    else:
        _print_explanation(explanation)


def _build(settings: ClassificationSettings) -> Classifier:
    from router.classification import Classifier  # noqa: PLC0415 - as above

    return Classifier.build(settings, classifier_folder())


def _print(report: Mapping[str, Any]) -> None:
    table = terminal.quiet_table(
        "source", "rows", "accuracy", "macro-F1", "clear rows", "accuracy", "macro-F1", "calibration error",
        "confused (clear rows)",
        right=("rows", "accuracy", "macro-F1", "clear rows", "calibration error"),
    )  # fmt: skip
    for source, scores in {**report["sources"], "together": report["together"]}.items():
        every, clear = scores["all"], scores["without_ambiguous"]
        table.add_row(
            source, f"{every.rows:,}", _number(every.accuracy), _number(every.macro_f1), f"{clear.rows:,}",
            _number(clear.accuracy), _number(clear.macro_f1), _number(clear.calibration_error),
            _confused(clear),
        )  # fmt: skip
    mean = report["mean"]
    table.add_row(
        "mean of sources", "", _number(mean["all"]), "", "", _number(mean["without_ambiguous"]), "", "", ""
    )
    terminal.out().print(table)
    typer.echo(f"{report['prompts_per_second']:,} prompts per second of processor time")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _confused(scores: Scores) -> str:
    wrong = [
        (count, true, predicted)
        for true, row in scores.confusion.items()
        for predicted, count in row.items()
        if true != predicted
    ]
    ordered = sorted(wrong, reverse=True)
    return ", ".join(f"{true} as {predicted} {count:,}" for count, true, predicted in ordered) or "none"


def _print_explanation(explanation: Explanation) -> None:
    found = explanation.classification
    typer.echo(f"{found.category}  {found.confidence:.2f}  ({found.reason})")
    probabilities = ", ".join(f"{name} {value:.2f}" for name, value in explanation.probabilities.items())
    typer.echo(f"classifier  {probabilities}")
    for category, weight, match in explanation.rules:
        typer.echo(f"rule        {category} {weight:g}: {match!r}")
    for word, value in explanation.words:
        typer.echo(f"word        {value:+.2f}  {word!r}")
    if explanation.shape:
        typer.echo(f"shape       {', '.join(explanation.shape)}")
