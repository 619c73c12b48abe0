"""The audit log: who changed what. Most entries are written by triggers; see `sql/functions/88_audit.sql`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from router.database import Connection, postgres_text, rows


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One change. `via` is the entrance: cli, console, dag, or sql for a session that names nobody."""

    at: datetime
    by: str
    via: str
    action: str
    object: str
    before: str | None
    after: str | None


def record_audit(
    connection: Connection, action: str, name: str, *, before: str | None = None, after: str | None = None
) -> int:
    """Adds an entry about the object `name`, by the session's actor, and returns its number.

    Never pass prompts, answers or secrets.
    """
    texts = [None if text is None else postgres_text(text) for text in (action, name, before, after)]
    found = rows(connection, "SELECT record_audit(%s, %s, %s, %s) AS entry", tuple(texts))
    return int(found[0]["entry"])


def read_audit(connection: Connection, *, since: datetime | None, limit: int) -> list[AuditEntry]:
    """Returns the newest entries, newest first."""
    found = rows(
        connection, "SELECT at, by, via, action, object, before, after FROM audit_entries(%s, %s)",
        (since, limit),
    )  # fmt: skip
    return [AuditEntry(**row) for row in found]
