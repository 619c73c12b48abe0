"""The command `router audit`: who changed what."""

from __future__ import annotations

from typing import Annotated

import typer

from router.cli import terminal
from router.status import AuditEntry, read_audit

DEFAULT_LIMIT = 100
MAX_LIMIT = 100_000

AUDIT_HELP = """
Show who changed what, newest first.

Entries name the user (user@host of the command line, or the Airflow user), the entrance (cli, console, dag,
sql), the action, and the object with its old and new value. Edits in Airflow's own forms, such as those of
Variables, are in Airflow's audit log.

\b
Examples:
  router audit
  router audit --since 7d --json
"""


def audit(
    *,
    since: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Show entries since TIME: ISO 8601, or an age such as 2h."),
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", "-n", metavar="N", min=1, max=MAX_LIMIT, help="Show at most N entries.")
    ] = DEFAULT_LIMIT,
    as_json: terminal.Json = False,
    database: terminal.Database = None,
) -> None:
    from_time = None if since is None else terminal.time_of(since, "--since")
    with terminal.database(database) as connection:
        entries = read_audit(connection, since=from_time, limit=limit)
    if as_json:
        terminal.print_json(entries)
        return
    table = terminal.quiet_table("at", "by", "via", "action", "object", "before", "after")
    for entry in entries:
        table.add_row(*_cells(entry))
    terminal.out().print(table)


def _cells(entry: AuditEntry) -> list[str]:
    texts = (entry.by, entry.via, entry.action, entry.object, entry.before or "", entry.after or "")
    return [f"{entry.at:%Y-%m-%d %H:%M:%S}", *texts]
