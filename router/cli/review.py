"""The verbs `router review` and `router feedback`: let the log teach, and say what it cannot know."""

from __future__ import annotations

from typing import Annotated

import typer

from router.cli import terminal
from router.database import rows
from router.errors import InputError
from router.learning import run_review
from router.settings import load_config, load_learning

WORDS = {"good": 1.0, "bad": 0.0}

REVIEW_HELP = """
Review the log now: grade a sample of the answers, sum the evidence up, order the models anew.

Run again, it changes nothing more. One review runs at a time.

\b
Examples:
  router review --dry-run      what would move; nothing is kept
  router review
"""
FEEDBACK_HELP = """
Say how good a task's answer is: good, bad, or a number from 0 (bad) to 1.

It counts at the next review, for the model that gave the answer. Said again it replaces what was said before.

\b
Examples:
  router feedback 4711 good
  router feedback 4711 0.3
"""


def review(
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would move; keep nothing.")] = False,
    by: terminal.By = None,
    as_json: terminal.Json = False,
    database: terminal.Database = None,
    config: terminal.Config = terminal.DEFAULT_CONFIG,
) -> None:
    learning = load_learning(config, load_config(config).categories)
    with terminal.database(database):
        pass  # says so if the schema is not there
    done = run_review(terminal.database_url(database), learning, by=terminal.who(by), dry_run=dry_run)
    if as_json:
        terminal.print_json({
            "review": done.review, "calls_summed": done.calls_summed, "answers_graded": done.answers_graded,
            "moves": done.news, "notes": done.notes,
        })  # fmt: skip
        return
    name = "Dry run" if done.review is None else f"Review {done.review}"
    typer.echo(f"{name}: {done.calls_summed:,} calls summed, {done.answers_graded:,} answers graded.")
    for move in done.news:
        typer.echo(f"  {move}")
    for note in done.notes:
        typer.echo(f"  {note}")
    if not done.news:
        typer.echo("  nothing moved")


def feedback(
    task: Annotated[int, typer.Argument(metavar="TASK", help="The task's id.")],
    verdict: Annotated[str, typer.Argument(metavar="good|bad|0..1")],
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
        raise InputError(f"Task {task} has no answer of a model. See `router status`, or name another task.")
    if as_json:
        terminal.print_json({"task": task, "score": score, "model": model})
    else:
        typer.echo(f"Kept: {score:g} for {model}'s answer to task {task}.")


def _score(verdict: str) -> float:
    if verdict.lower() in WORDS:
        return WORDS[verdict.lower()]
    try:
        score = float(verdict)
    except ValueError:
        score = -1.0
    if not 0 <= score <= 1:
        raise InputError(f"{verdict!r} is no verdict; say good, bad, or a number from 0 to 1.")
    return score
