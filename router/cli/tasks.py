"""`router export` and `router retry`: writes finished tasks, requeues failed ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from router.cli import terminal
from router.database import Connection
from router.errors import InputError
from router.queue import (
    Retried,
    Selection,
    category_names,
    failed_tasks,
    finished_tasks,
    output_line,
    retry_failed,
    statuses,
    write_lines,
)
from router.task import TaskStatus

EXPORT_HELP = """
Write answers in the output format of OpenAI's Batch API.

One JSON object per line. For a solved task "response" contains a chat completion; for a failed one it is null
and "error" gives the reasons. custom_id is the id the task was loaded with, or else its number. The file is
replaced only after all lines were written.

The options restrict the export together. TIME is ISO 8601, in UTC without an offset, or an age such as 2h.

\b
Examples:
  router export answers.jsonl
  router export failed.jsonl --failed
  router export team.jsonl --id-prefix team-7/ --since 2026-01-31
  router export alice.jsonl --client alice
  router export today.jsonl --status solved --category technical --since 24h
  router export - --solved | jq -r .response.body.choices[0].message.content
"""
RETRY_HELP = """
Requeue failed tasks.

They start again at their first attempt, with the models of the current ranking.

\b
Examples:
  router retry 17 23
  router retry --category technical
  router retry --all --yes
"""


def export(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Output file; - writes to standard output.")],
    *,
    everything: Annotated[
        bool, typer.Option("--all", help="Export solved and failed tasks (default).")
    ] = False,
    solved: Annotated[bool, typer.Option("--solved", help="Export solved tasks only.")] = False,
    failed: Annotated[bool, typer.Option("--failed", help="Export failed tasks only.")] = False,
    status: Annotated[
        str | None,
        typer.Option(metavar="solved|failed|all", help="Export tasks of this status. Default: all."),
    ] = None,
    category: Annotated[
        str | None, typer.Option(metavar="CATEGORY", help="Export tasks of this category only.")
    ] = None,
    client: Annotated[
        str | None,
        typer.Option(metavar="NAME", help='Export tasks of this client only; "" is a client, too.'),
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="Export tasks that were finished at TIME or later.")
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="TIME", help="Export tasks that were finished before TIME.")
    ] = None,
    id_prefix: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Export tasks whose id starts with TEXT.")
    ] = None,
    as_json: terminal.Json = False,
    database: terminal.Database = None,
) -> None:
    flags = {"all": everything, TaskStatus.SOLVED.value: solved, TaskStatus.FAILED.value: failed}
    named = [name for name, given in flags.items() if given] + ([] if status is None else [status])
    if len(named) > 1:
        raise typer.BadParameter("use only one of --status, --all, --solved and --failed")
    chosen = terminal.known(named[0] if named else "all", flags, "status to export")
    wanted = [TaskStatus.SOLVED.value, TaskStatus.FAILED.value] if chosen == "all" else [chosen]
    selection = Selection(
        category=category,
        client=client,
        since=None if since is None else terminal.time_of(since, "--since"),
        until=None if until is None else terminal.time_of(until, "--until"),
        id_prefix=id_prefix,
    )
    path = None if file == "-" else Path(file)
    with terminal.database(database) as connection:
        if category is not None:
            terminal.known(category, category_names(connection), "category")
        found = finished_tasks(connection, wanted, selection)
        written = write_lines(path, map(output_line, found))
    if path is None:
        return
    if as_json:
        terminal.print_json({"file": file, "written": written})
    else:
        typer.echo(f"{written:,} {' and '.join(wanted)} tasks written to {file}")


def retry(
    task_ids: Annotated[list[int] | None, typer.Argument(metavar="TASK", help="Ids of failed tasks.")] = None,
    *,
    category: Annotated[
        str | None, typer.Option(metavar="CATEGORY", help="Retry all failed tasks of this category.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Retry all failed tasks.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
    as_json: terminal.Json = False,
    database: terminal.Database = None,
) -> None:
    if sum((bool(task_ids), category is not None, everything)) != 1:
        raise typer.BadParameter("give either task ids, --category or --all")
    with terminal.database(database) as connection:
        if category is not None:
            terminal.known(category, category_names(connection), "category")
        rejected = _not_retryable(connection, task_ids or [])
        for task_id, why in rejected.items():
            terminal.complain(f"Task {task_id} {why}")
        count = len(set(task_ids)) - len(rejected) if task_ids else failed_tasks(connection, category)
        connection.commit()
        if count and not yes:
            _confirm(count)
        done = _retry(connection, category, task_ids)
    _print(done, as_json=as_json)
    if rejected or done.still_failed:
        raise typer.Exit(terminal.EXIT_SOME_BAD)


def _not_retryable(connection: Connection, task_ids: Sequence[int]) -> dict[int, str]:
    """Returns the tasks that cannot be retried, each with the reason."""
    if any(abs(task_id) >= 2**63 for task_id in task_ids):
        raise InputError("A task id is out of range; ids end at 9223372036854775807.")
    found = statuses(connection, task_ids)
    return {
        task_id: f"is {found[task_id]}, not failed." if task_id in found else "does not exist."
        for task_id in task_ids
        if found.get(task_id) != TaskStatus.FAILED.value
    }


def _confirm(count: int) -> None:
    question = f"Retry {count:,} failed task{'s' if count > 1 else ''}?"
    if not typer.confirm(question, err=True):
        raise typer.Exit(terminal.EXIT_FAILED)


def _retry(connection: Connection, category: str | None, task_ids: list[int] | None) -> Retried:
    done = Retried(0, 0)
    for done in retry_failed(connection, category=category, task_ids=task_ids or None):  # noqa: B007 - only the last is used
        pass
    return done


def _print(done: Retried, *, as_json: bool) -> None:
    if as_json:
        terminal.print_json(done)
        return
    typer.echo(f"{done.unsolved:,} tasks requeued")
    if done.still_failed:
        terminal.complain(
            f"{done.still_failed:,} failed again immediately: no model can be sent their prompts."
        )
