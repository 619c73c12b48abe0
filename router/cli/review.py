"""The commands `router review` and `router feedback`."""

from __future__ import annotations

from typing import Annotated

import typer

from router.cli import terminal
from router.database import rows
from router.errors import InputError, echoed
from router.learning import run_review
from router.settings import load_config, load_learning

WORDS = {"good": 1.0, "bad": 0.0}

REVIEW_HELP = """
Grade answers and re-rank models now.

Does what the DAG nightly_review does every night: grades a sample of the answers in the call log, sums up the
evidence, and ranks the models. Running it again changes nothing more. Only one review runs at a time.

\b
Examples:
  router review --dry-run      show what would change; store nothing
  router review
"""
FEEDBACK_HELP = """
Rate an answer.

A rating is good, bad, or a number from 0 (bad) to 1 (good). The next review counts the rating for the model
that gave the answer. A new rating of yours replaces the previous one.

\b
Examples:
  router feedback 4711 good
  router feedback 4711 0.3
"""


def review(
    *,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would change; store nothing.")
    ] = False,
    by: terminal.By = None,
    as_json: terminal.Json = False,
    database: terminal.Database = None,
    config: terminal.Config = terminal.DEFAULT_CONFIG,
) -> None:
    learning = load_learning(config, load_config(config).categories)
    with terminal.database(database):
        pass  # checks the schema
    done = run_review(terminal.database_url(database), learning, by=terminal.who(by), dry_run=dry_run)
    if as_json:
        terminal.print_json({
            "review": done.review, "calls_summed": done.calls_summed, "answers_graded": done.answers_graded,
            "moves": done.changes, "notes": done.notes,
        })  # fmt: skip
        return
    name = "Dry run" if done.review is None else f"Review {done.review}"
    typer.echo(f"{name}: {done.calls_summed:,} calls summed up, {done.answers_graded:,} answers graded.")
    for line in (*done.changes, *done.notes):
        typer.echo(f"  {line}")
    if not done.changes:
        typer.echo("  no changes")


def feedback(
    task: Annotated[int, typer.Argument(metavar="TASK", help="ID of the task.")],
    verdict: Annotated[str, typer.Argument(metavar="RATING", help="good, bad, or a number from 0 to 1.")],
    *,
    by: terminal.By = None,
    as_json: terminal.Json = False,
    database: terminal.Database = None,
) -> None:
    score = _score(verdict)
    with terminal.database(database) as connection:
        model = rows(
            connection, "SELECT record_feedback(%s, %s::real, %s) AS model", (task, score, terminal.who(by))
        )[0]["model"]
    if model is None:
        raise InputError(f"Task {task} has no model's answer to rate. See `router status`.")
    if as_json:
        terminal.print_json({"task": task, "score": score, "model": model})
    else:
        typer.echo(f"Recorded {score:g} for the answer of {model} to task {task}.")


def _score(verdict: str) -> float:
    if verdict.lower() in WORDS:
        return WORDS[verdict.lower()]
    try:
        score = float(verdict)
    except ValueError:
        score = -1.0
    if not 0 <= score <= 1:
        raise InputError(f"Invalid verdict {echoed(verdict)}: use good, bad, or a number from 0 to 1.")
    return score
