"""`router log`: the call log, newest first."""

from __future__ import annotations

from typing import Annotated

import typer

from router.cli import terminal
from router.errors import InputError, echoed
from router.queue import MAX_ROWS, LoggedCall, category_names, read_calls

LOG_HELP = """
Show calls to models, newest first.

The column role is batch for queued tasks, and asked, named, next, fallback or passages for interactive
requests. The column settlement shows how the call's result was recorded.

\b
Examples:
  router log
  router log --task 17
  router log --model phi-4 --since 2h
  router log --client alice
  router log --category technical --since 30min --limit 1000 --json
"""
MAX_ERROR_CHARACTERS = 60
MODEL_COLUMN = 2


def log(
    *,
    task: Annotated[int | None, typer.Option(metavar="ID", help="Show calls of this task.")] = None,
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="Show calls to this model.")] = None,
    category: Annotated[
        str | None, typer.Option(metavar="CATEGORY", help="Show calls for prompts of this category.")
    ] = None,
    client: Annotated[
        str | None, typer.Option(metavar="NAME", help='Show calls for this client; "" is a client, too.')
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="AGE", help="Show calls of the last AGE, e.g. 90s, 30min, 2h, 7d.")
    ] = None,
    limit: Annotated[
        int, typer.Option(metavar="N", min=1, max=MAX_ROWS, help="Maximum number of calls.")
    ] = 50,
    as_json: terminal.Json = False,
    database: terminal.Database = None,
) -> None:
    seconds = None if since is None else _age(since)
    if task is not None and abs(task) >= 2**63:
        raise InputError(f"Task {task} is out of range; ids end at 9223372036854775807.")
    with terminal.database(database) as connection:
        if category is not None:
            terminal.known(category, category_names(connection), "category")
        calls = read_calls(
            connection, task_id=task, model=model, category=category, client=client, since_seconds=seconds,
            limit=limit,
        )  # fmt: skip
    if as_json:
        terminal.print_json({"calls": calls})
    elif calls:
        _print(calls)
    else:
        typer.echo("no matching calls")


def _age(since: str) -> float:
    seconds = terminal.age_seconds(since)
    if seconds is None:
        raise InputError(
            f"--since {echoed(since)} is not an age. Give a number and a unit, e.g. 90s, 30min, 2h or 7d."
        )
    return seconds


def _print(calls: list[LoggedCall]) -> None:
    table = terminal.quiet_table(
        "started", "task", "model", "client", "category", "confidence", "role", "outcome", "settlement",
        "seconds", "USD", "error",
        right=("task", "confidence", "seconds", "USD"),
    )  # fmt: skip
    table.columns[MODEL_COLUMN].no_wrap = True
    for call in calls:
        outcome = call.outcome or "in flight"
        table.add_row(
            f"{call.started_at:%m-%d %H:%M:%S}",
            str(call.task_id or ""),
            call.model,
            call.client,
            call.category or "",
            "" if call.confidence is None else f"{call.confidence:.2f}",
            call.role,
            f"{outcome}, late" if call.late else outcome,
            call.settlement or "",
            "" if call.latency_seconds is None else f"{call.latency_seconds:.2f}",
            "" if call.cost_usd is None else f"{call.cost_usd:.6f}",
            (call.error or "")[:MAX_ERROR_CHARACTERS],
        )
    terminal.out().print(table)
