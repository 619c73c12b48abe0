"""The verb `router log`: the calls that were made, the newest first."""

from __future__ import annotations

import re
from typing import Annotated, Optional

import typer

from router.cli import terminal
from router.errors import InputError
from router.queue import MAX_ROWS, LoggedCall, category_names, read_calls

LOG_HELP = """
Show the calls that were made to models, the newest first.

One line a call: why it was made (batch; asked, next, fallback or passages when one prompt was asked), what it
came to, what became of its answer, and whether it came late.

\b
Examples:
  router log
  router log --task 17
  router log --model phi-4 --since 2h
  router log --category technical --since 30min --limit 1000 --json
"""
_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86_400}
_SINCE = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)")
LONGEST_ERROR = 60
MODEL_COLUMN = 2


def log(
    *,
    task: Annotated[
        Optional[int],  # noqa: UP045 - typer evaluates it at run time, also on 3.10
        typer.Option(metavar="ID", help="Calls for this task."),
    ] = None,
    model: Annotated[
        Optional[str],  # noqa: UP045 - as above
        typer.Option(help="Calls to this model."),
    ] = None,
    category: Annotated[
        Optional[str],  # noqa: UP045 - as above
        typer.Option(help="Calls for prompts of this category."),
    ] = None,
    since: Annotated[
        Optional[str],  # noqa: UP045 - as above
        typer.Option(metavar="AGE", help="Not older than, e.g. 90s, 30min, 2h, 7d."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=MAX_ROWS, help="At most so many calls.")] = 50,
    as_json: terminal.Json = False,
    database: terminal.Database = None,
) -> None:
    seconds = None if since is None else _seconds(since)
    if task is not None and abs(task) >= 2**63:
        raise InputError("A task's number is at most 9223372036854775807.")
    with terminal.database(database) as connection:
        if category is not None:
            terminal.known(category, category_names(connection), "category")
        calls = read_calls(
            connection, task_id=task, model=model, category=category, since_seconds=seconds, limit=limit
        )
    if as_json:
        terminal.print_json({"calls": calls})
    elif calls:
        _show(calls)
    else:
        typer.echo("no such call is in the log")


def _seconds(since: str) -> float:
    found = _SINCE.fullmatch(since.strip())
    if found is None:
        raise InputError(f"--since {since!r} is no age. Write a number and a unit: 90s, 30min, 2h or 7d.")
    return float(found[1]) * _UNITS[found[2]]


def _show(calls: list[LoggedCall]) -> None:
    table = terminal.quiet_table(
        "started", "task", "model", "category", "sure", "role", "outcome", "became", "seconds", "USD",
        "error",
        right=("task", "sure", "seconds", "USD"),
    )  # fmt: skip
    table.columns[MODEL_COLUMN].no_wrap = True
    for call in calls:
        outcome = call.outcome or "under way"
        table.add_row(
            f"{call.started_at:%m-%d %H:%M:%S}",
            str(call.task_id or ""),
            call.model,
            call.category or "",
            "" if call.confidence is None else f"{call.confidence:.2f}",
            call.role,
            f"{outcome}, late" if call.late else outcome,
            call.settlement or "",
            "" if call.latency_seconds is None else f"{call.latency_seconds:.2f}",
            "" if call.cost_usd is None else f"{call.cost_usd:.6f}",
            (call.error or "")[:LONGEST_ERROR],
        )
    terminal.out().print(table)
