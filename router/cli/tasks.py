"""The verbs `router export` and `router retry`: finished tasks out, failed ones back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Optional

import typer

from router.cli import terminal
from router.database import Connection
from router.errors import InputError
from router.queue import (
    Retried,
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
Write the answers as an output file of OpenAI's Batch API.

One JSON object a line. A solved task has its answer as a chat completion in "response"; a failed one has null
there, and its reasons in "error". custom_id is the id under which the task was loaded, else its number. The
file appears, or is replaced, only when it is whole.

\b
Examples:
  router export answers.jsonl
  router export failed.jsonl --failed
  router export - --solved | jq -r .response.body.choices[0].message.content
"""
RETRY_HELP = """
Set failed tasks back to unsolved.

They are tried again from their first attempt, by the models that are right for them now.

\b
Examples:
  router retry 17 23
  router retry --category technical
  router retry --all --yes
"""


def export(
    file: Annotated[str, typer.Argument(help="Where to; - is standard output.")],
    *,
    everything: Annotated[bool, typer.Option("--all", help="Solved and failed tasks (the default).")] = False,
    solved: Annotated[bool, typer.Option("--solved", help="Solved tasks only.")] = False,
    failed: Annotated[bool, typer.Option("--failed", help="Failed tasks only.")] = False,
    as_json: terminal.Json = False,
    database: terminal.Database = None,
) -> None:
    if sum((everything, solved, failed)) > 1:
        raise typer.BadParameter("give one of --all, --solved and --failed")
    wanted = [
        status.value
        for status, left_out in ((TaskStatus.SOLVED, failed), (TaskStatus.FAILED, solved))
        if not left_out
    ]
    path = None if file == "-" else Path(file)
    with terminal.database(database) as connection:
        written = write_lines(path, map(output_line, finished_tasks(connection, wanted)))
    if path is None:
        return  # standard output holds the lines, and nothing else
    if as_json:
        terminal.print_json({"file": file, "written": written})
    else:
        typer.echo(f"{written:,} {' and '.join(wanted)} tasks written to {file}")


def retry(
    task_ids: Annotated[
        Optional[list[int]],  # noqa: UP045 - typer evaluates it at run time, also on 3.10
        typer.Argument(metavar="TASK", help="Numbers of failed tasks."),
    ] = None,
    *,
    category: Annotated[
        Optional[str],  # noqa: UP045 - as above
        typer.Option(help="All failed tasks of this category."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All failed tasks.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask first.")] = False,
    as_json: terminal.Json = False,
    database: terminal.Database = None,
) -> None:
    if sum((bool(task_ids), category is not None, everything)) != 1:
        raise typer.BadParameter("name tasks, or give --category or --all; one of the three")
    with terminal.database(database) as connection:
        if category is not None:
            terminal.known(category, category_names(connection), "category")
        not_failed = _not_failed(connection, task_ids or [])
        for task_id, why in not_failed.items():
            terminal.complain(f"Task {task_id} {why}")
        count = len(set(task_ids)) - len(not_failed) if task_ids else failed_tasks(connection, category)
        connection.commit()
        if count and not yes:
            _ask(count)
        done = _retry(connection, category, task_ids)
    _tell(done, as_json=as_json)
    if not_failed or done.still_failed:
        raise typer.Exit(terminal.EXIT_SOME_BAD)


def _not_failed(connection: Connection, task_ids: Sequence[int]) -> dict[int, str]:
    """Those of the tasks that cannot be retried, and why."""
    if any(abs(task_id) >= 2**63 for task_id in task_ids):
        raise InputError("A task's number is at most 9223372036854775807.")
    found = statuses(connection, task_ids)
    return {
        task_id: f"is {found[task_id]}, not failed." if task_id in found else "does not exist."
        for task_id in task_ids
        if found.get(task_id) != TaskStatus.FAILED.value
    }


def _ask(count: int) -> None:
    question = f"Set {count:,} failed task{'s' if count > 1 else ''} back to unsolved?"
    if not typer.confirm(question, err=True):
        raise typer.Exit(terminal.EXIT_FAILED)


def _retry(connection: Connection, category: str | None, task_ids: list[int] | None) -> Retried:
    done = Retried(0, 0)
    for done in retry_failed(connection, category=category, task_ids=task_ids or None):  # noqa: B007 - the last counts
        pass
    return done


def _tell(done: Retried, *, as_json: bool) -> None:
    if as_json:
        terminal.print_json(done)
        return
    typer.echo(f"{done.unsolved:,} tasks are unsolved again")
    if done.still_failed:
        terminal.complain(
            f"{done.still_failed:,} failed again at once: their prompts cannot be sent to any model."
        )
