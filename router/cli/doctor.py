"""`router migrate` and `router doctor`: upgrades the schema, checks a database."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from router.cli import terminal
from router.database import connect
from router.migrations import (
    Examination,
    MigrationReport,
    ProblemKind,
    SchemaProblem,
    examine,
    recount_if_due,
)
from router.migrations import migrate as migrate_schema
from router.models import sync_roster
from router.settings import load_config

MIGRATE_HELP = """
Upgrade the schema and sync models.

Upgrades the database schema in place, restores triggers that the table tasks has lost, and applies
config/models.yaml to the roster, as `router models sync` does. Safe to run at any time, also concurrently
from several machines. Changes nothing if the table tasks cannot be used, and lists the reasons.

With --roles it also runs sql/roles.sql: roles for the router, producers and readers, and their rights. Once
they are in use, every migration grants them what is new.

\b
Examples:
  router migrate
  router migrate --roles
  router migrate --check
"""
DOCTOR_HELP = """
Check a database and list its problems.

Compares encoding, privileges, row level security, and the columns and triggers of the table tasks with those
that this version needs. Tries the router's writes on two rows, and rolls back. Shows what `router migrate`
would do. Changes nothing. The exit code is 3 if there is anything to do.

\b
Examples:
  router doctor
  router doctor --json
"""


def migrate(
    *,
    check: Annotated[bool, typer.Option("--check", help="Change nothing: same as `router doctor`.")] = False,
    roles: Annotated[
        bool, typer.Option("--roles", help="Also create the roles of sql/roles.sql, with their rights.")
    ] = False,
    as_json: terminal.Json = False,
    database: terminal.Database = None,
    config: terminal.Config = terminal.DEFAULT_CONFIG,
) -> None:
    if check:
        doctor(as_json=as_json, database=database, config=config)
        return
    settings = load_config(config)
    url = terminal.database_url(database)
    report = migrate_schema(url, task_defaults=settings.tasks.as_text(), roles=roles, progress=terminal.note)
    if report.applied or report.functions_renewed:
        terminal.audit(url, "migrate", "schema", after=", ".join(report.applied) or "functions replaced")
    with connect(url) as connection:
        sync_roster(connection, settings)
        connection.commit()
        recount_if_due(connection)
    if as_json:
        terminal.print_json(report)
    else:
        _print_report(report, len(settings.models))
    if any(problem.kind is not ProblemKind.INSERTS for problem in report.problems):
        raise typer.Exit(terminal.EXIT_SOME_BAD)


def _print_report(report: MigrationReport, models: int) -> None:
    for problem in report.restored:
        terminal.note(f"Restored: {problem.text}")
    _complain(report.problems)
    applied = ", ".join(report.applied) or "none"
    typer.echo(f"migrations applied: {applied}; tasks queued: {report.tasks_queued:,}; models: {models}")


def doctor(
    *,
    as_json: terminal.Json = False,
    database: terminal.Database = None,
    config: terminal.Config = terminal.DEFAULT_CONFIG,
) -> None:
    settings = load_config(config)
    found = examine(terminal.database_url(database), task_defaults=settings.tasks.as_text())
    if as_json:
        terminal.print_json({"ok": found.ok, **terminal.plain(found)})
    else:
        _print_examination(found)
    if not found.ok:
        raise typer.Exit(terminal.EXIT_SOME_BAD)


def _print_examination(found: Examination) -> None:
    _complain(found.problems)
    if found.ok:
        typer.echo("No problem found; `router migrate` has nothing to do.")
    elif found.refused:
        typer.echo("`router migrate` would change nothing until this is solved.")
    else:
        would = [f"apply {name}" for name in found.pending]
        would += ["replace the functions"] * found.functions_changed
        would += [f"restore: {text}" for text in found.restores]
        typer.echo(f"`router migrate` would: {'; '.join(would) or 'do nothing'}")


def _complain(problems: Sequence[SchemaProblem]) -> None:
    for problem in problems:
        terminal.complain(f"{problem.kind.value}: {problem}")
