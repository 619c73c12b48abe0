"""Synchronous access to the table `tasks`: inserts new tasks, reads finished ones, retries failed ones.

Each batch is committed separately, so that an interrupted run keeps its progress.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from io import StringIO
from typing import Any

import psycopg2.errors
import psycopg2.extras

from router.database import Connection, rows
from router.errors import DatabaseError, first_line
from router.queue.ingest import NewTask

RETRY_BATCH = 1000
READ_BATCH = 500

_STAGING = """
CREATE TEMP TABLE router_staging (
    line bigint, prompt text, category text, priority integer, external_id text, own_id boolean,
    max_tokens integer, deadline_at timestamptz, client text,
    request jsonb) ON COMMIT DROP"""
_MORE = "SELECT names, literals FROM task_default_columns()"
_INSERT = """
INSERT INTO tasks (prompt, category, priority, external_id, max_tokens, deadline_at, client, request{names})
SELECT i.prompt, i.category, i.priority, i.external_id, i.max_tokens, i.deadline_at, i.client,
       i.request{literals}
  FROM router_staging i ORDER BY i.line
ON CONFLICT (external_id) WHERE external_id IS NOT NULL DO NOTHING"""
_CONFLICTS = """
SELECT i.line, i.external_id, t.id AS task_id
  FROM router_staging i JOIN tasks t ON t.external_id = i.external_id
 WHERE i.own_id AND (t.prompt <> i.prompt OR t.request IS DISTINCT FROM i.request) ORDER BY i.line"""
_FINISHED = """
SELECT t.id, t.external_id, t.status, t.answer, t.answered_by, t.answer_call_id, t.failure,
       readable_time(coalesce(t.solved_at, f.failed_at, t.created_at)) AS finished_at, c.prompt_tokens,
       c.completion_tokens
  FROM tasks t
  LEFT JOIN model_calls c ON c.call_id = t.answer_call_id
  LEFT JOIN task_failures f ON f.task_id = t.id AND t.status = 'failed'
 WHERE t.status = ANY (%s) AND (t.status <> 'failed' OR is_failed(t.status::text, t.interactive))"""
_SELECTIONS = {  # by field of Selection
    "category": "resolve_category(t.category) = %s",
    "client": "coalesce(t.client, '') = %s",
    "since": "coalesce(t.solved_at, f.failed_at, t.created_at) >= %s",
    "until": "coalesce(t.solved_at, f.failed_at, t.created_at) < %s",
    "id_prefix": "starts_with(t.external_id, %s)",
}
_RETRY = """
UPDATE tasks SET status = 'unsolved'
 WHERE id IN (SELECT id FROM tasks
               WHERE status = 'failed' AND id > %s AND id <= %s
                 AND (%s::text IS NULL OR resolve_category(category) = %s)
                 AND CASE WHEN %s::bigint[] IS NULL THEN is_failed(status::text, interactive)
                          ELSE id = ANY (%s) END
               ORDER BY id LIMIT %s FOR UPDATE SKIP LOCKED)
RETURNING id, status"""
_COPY_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


@dataclass(frozen=True, slots=True)
class Selection:
    """Selects finished tasks; a field that is None selects all. `until` is excluded."""

    category: str | None = None
    client: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    id_prefix: str | None = None


@dataclass(frozen=True, slots=True)
class IdConflict:
    """A row whose own id belongs to a task with a different prompt."""

    line: int
    external_id: str
    task_id: int


@dataclass(frozen=True, slots=True)
class Added:
    """Result of a batch: number of new tasks, number of rows loaded before, and conflicting rows."""

    added: int
    known: int
    conflicts: tuple[IdConflict, ...]


@dataclass(frozen=True, slots=True)
class Retried:
    """Number of tasks that are unsolved again, and of tasks whose prompt cannot be sent to any model."""

    unsolved: int
    still_failed: int


def max_prompt_bytes(connection: Connection) -> int:
    """Returns the size of the longest prompt that can be sent."""
    return int(rows(connection, "SELECT max_prompt_bytes FROM queue_settings")[0]["max_prompt_bytes"])


def category_names(connection: Connection) -> list[str]:
    """Returns the configured categories, the default one last."""
    return [row["name"] for row in rows(connection, "SELECT name FROM categories ORDER BY is_default, name")]


def enqueue(connection: Connection, batch: Sequence[NewTask]) -> Added:
    """Inserts and commits the tasks whose external_id is new."""
    more = rows(connection, _MORE)[0]
    copied = StringIO("".join(map(_copy_line, batch)))
    with connection.cursor() as cursor:
        cursor.execute(_STAGING)
        cursor.copy_expert("COPY router_staging FROM STDIN", copied)
        # Serialized, because two batches with the same ids in different order would deadlock.
        cursor.execute("SELECT pg_advisory_xact_lock(hashtext('router_load'), 0)")
        try:
            cursor.execute(_INSERT.format(**more))
        except psycopg2.errors.NotNullViolation as error:
            raise DatabaseError(
                f"{first_line(error)}. Set a value in config/models.yaml (`tasks: {{defaults:"
                f" {{{error.diag.column_name}: ...}}}}`) and run `router models sync`, or give the column a"
                " default."
            ) from error
        added = cursor.rowcount
    found = rows(connection, _CONFLICTS) if added < len(batch) else []
    connection.commit()
    return Added(added, len(batch) - added - len(found), tuple(IdConflict(**row) for row in found))


def _copy_line(task: NewTask) -> str:
    values = (
        task.line, task.prompt, task.category, task.priority, task.external_id, task.own_id, task.max_tokens,
        task.deadline_at, task.client, task.request,
    )  # fmt: skip
    return (
        "\t".join("\\N" if value is None else str(value).translate(_COPY_ESCAPES) for value in values) + "\n"
    )


def finished_tasks(
    connection: Connection, statuses: Sequence[str], selection: Selection | None = None
) -> Iterator[dict[str, Any]]:
    """Yields the selected tasks of these statuses by id, from one snapshot; reads READ_BATCH rows at a time.

    Requests that no model answered are left out.
    """
    chosen = {name: value for name in _SELECTIONS if (value := getattr(selection, name, None)) is not None}
    with connection.cursor("router_export", cursor_factory=psycopg2.extras.RealDictCursor) as cursor:
        cursor.itersize = READ_BATCH
        cursor.execute(
            " AND ".join([_FINISHED, *(_SELECTIONS[name] for name in chosen)]) + " ORDER BY t.id",
            (list(statuses), *chosen.values()),
        )
        for row in cursor:
            yield dict(row)


def failed_tasks(connection: Connection, category: str | None = None) -> int:
    """Returns the number of failed tasks, from the counters."""
    found = rows(
        connection,
        "SELECT coalesce(sum(failed), 0)::bigint AS failed FROM task_counts_now"
        " WHERE %s::text IS NULL OR category = %s",
        (category, category),
    )
    return int(found[0]["failed"])


def statuses(connection: Connection, task_ids: Sequence[int]) -> dict[int, str]:
    """Returns the status of each of these tasks that exists."""
    found = rows(connection, "SELECT id, status FROM tasks WHERE id = ANY (%s)", (list(task_ids),))
    return {row["id"]: row["status"] for row in found}


def retry_failed(
    connection: Connection, *, category: str | None = None, task_ids: Sequence[int] | None = None
) -> Iterator[Retried]:
    """Resets failed tasks to unsolved in committed batches; yields the totals after each.

    A request that no model answered is reset only by its id: nobody waits for it any more.
    A task that fails again meanwhile is not reset twice.
    """
    last = rows(connection, "SELECT coalesce(max(id), 0) AS id FROM tasks")[0]["id"]
    ids = None if task_ids is None else list(task_ids)
    after, unsolved, still_failed = -(2**62), 0, 0
    entry: int | None = None
    while True:
        done = rows(connection, _RETRY, (after, last, category, category, ids, ids, RETRY_BATCH))
        unsolved += sum(row["status"] == "unsolved" for row in done)
        still_failed += sum(row["status"] != "unsolved" for row in done)
        if done:
            entry = _audit_retry(connection, entry, _retried(category, ids), f"{unsolved} requeued")
        connection.commit()
        yield Retried(unsolved, still_failed)
        if len(done) < RETRY_BATCH:
            return
        after = max(row["id"] for row in done)


def _retried(category: str | None, ids: Sequence[int] | None) -> str:
    if ids is not None:
        return f"tasks {', '.join(map(str, ids))}"
    return "all failed tasks" if category is None else f"failed tasks of {category}"


def _audit_retry(connection: Connection, entry: int | None, name: str, after: str) -> int:
    """Adds an entry to the audit log, or brings that of the earlier batches up to date."""
    if entry is None:
        added = rows(connection, "SELECT record_audit('retry', %s, NULL, %s) AS entry", (name, after))
        return int(added[0]["entry"])
    rows(connection, "UPDATE audit_log SET after = %s WHERE entry = %s", (after, entry))
    return entry


def require_schema(connection: Connection) -> None:
    """Raises DatabaseError if `router migrate` has never run on this database."""
    found = rows(connection, "SELECT to_regclass('queue_settings') IS NOT NULL AS found")[0]["found"]
    if not found:
        raise DatabaseError(
            "This database does not have the router's tables yet. Run `router migrate` first."
        )
