"""The table `tasks` as people fill it and read it: new tasks in, finished ones out, failed ones back.

Synchronous, in batches that are each a transaction of their own: stopping half-way keeps what is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import psycopg2.extras

from router.database import Connection, rows
from router.errors import DatabaseError
from router.queue.ingest import NewTask

RETRY_BATCH = 1000
READ_BATCH = 500

_INTAKE = """
CREATE TEMP TABLE router_intake (
    line bigint, prompt text, category text, priority integer, external_id text, own_id boolean,
    max_tokens integer, deadline_at timestamptz) ON COMMIT DROP"""
_ADD = """
INSERT INTO tasks (prompt, category, priority, external_id, max_tokens, deadline_at)
SELECT i.prompt, i.category, i.priority, i.external_id, i.max_tokens, i.deadline_at
  FROM router_intake i ORDER BY i.line
ON CONFLICT (external_id) WHERE external_id IS NOT NULL DO NOTHING"""
_CLASHES = """
SELECT i.line, i.external_id, t.id AS task_id
  FROM router_intake i JOIN tasks t ON t.external_id = i.external_id
 WHERE i.own_id AND t.prompt <> i.prompt ORDER BY i.line"""
_FINISHED = """
SELECT t.id, t.external_id, t.status, t.answer, t.answered_by, t.answer_call_id, t.failure,
       coalesce(t.solved_at, t.created_at) AS finished_at, c.prompt_tokens, c.completion_tokens
  FROM tasks t LEFT JOIN model_calls c ON c.call_id = t.answer_call_id
 WHERE t.status = ANY (%s) ORDER BY t.id"""
_RETRY = """
UPDATE tasks SET status = 'unsolved'
 WHERE id IN (SELECT id FROM tasks
               WHERE status = 'failed' AND id > %s AND id <= %s
                 AND (%s::text IS NULL OR resolve_category(category) = %s)
                 AND (%s::bigint[] IS NULL OR id = ANY (%s))
               ORDER BY id LIMIT %s FOR UPDATE SKIP LOCKED)
RETURNING id, status"""
_COPY_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


@dataclass(frozen=True, slots=True)
class IdConflict:
    """A row whose own id already belongs to a task with another prompt."""

    line: int
    external_id: str
    task_id: int


@dataclass(frozen=True, slots=True)
class Added:
    """What became of a batch: tasks that are new, rows that were there already, and rows that clash."""

    added: int
    known: int
    clashes: tuple[IdConflict, ...]


@dataclass(frozen=True, slots=True)
class Retried:
    """Tasks that are unsolved again, and tasks that cannot be: no model can be sent their prompt."""

    unsolved: int
    still_failed: int


def longest_prompt_bytes(connection: Connection) -> int:
    """The longest prompt that is sent to a model."""
    return int(rows(connection, "SELECT max_prompt_bytes FROM queue_settings")[0]["max_prompt_bytes"])


def category_names(connection: Connection) -> list[str]:
    """The categories that the router knows, the default last."""
    return [row["name"] for row in rows(connection, "SELECT name FROM categories ORDER BY is_default, name")]


def enqueue(connection: Connection, batch: Sequence[NewTask]) -> Added:
    """Insert and commit the tasks whose external_id is new; the same batch again adds nothing."""
    copied = StringIO("".join(map(_copy_line, batch)))
    with connection.cursor() as cursor:
        cursor.execute(_INTAKE)
        cursor.copy_expert("COPY router_intake FROM STDIN", copied)
        # Two loads of the same ids in different orders would deadlock: one batch after the other.
        cursor.execute("SELECT pg_advisory_xact_lock(hashtext('router_load'), 0)")
        cursor.execute(_ADD)
        added = cursor.rowcount
    clashes = rows(connection, _CLASHES) if added < len(batch) else []
    connection.commit()
    return Added(added, len(batch) - added - len(clashes), tuple(IdConflict(**row) for row in clashes))


def _copy_line(task: NewTask) -> str:
    values = (
        task.line, task.prompt, task.category, task.priority, task.external_id, task.own_id, task.max_tokens,
        task.deadline_at,
    )  # fmt: skip
    return (
        "\t".join("\\N" if value is None else str(value).translate(_COPY_ESCAPES) for value in values) + "\n"
    )


def finished_tasks(connection: Connection, statuses: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Every task of these statuses, by id, as of one moment; read through a cursor, a few at a time."""
    with connection.cursor("router_export", cursor_factory=psycopg2.extras.RealDictCursor) as cursor:
        cursor.itersize = READ_BATCH
        cursor.execute(_FINISHED, (list(statuses),))
        for row in cursor:
            yield dict(row)


def failed_tasks(connection: Connection, category: str | None = None) -> int:
    """How many tasks have failed, from the counters."""
    found = rows(
        connection,
        "SELECT coalesce(sum(failed), 0)::bigint AS failed FROM task_counts_now"
        " WHERE %s::text IS NULL OR category = %s",
        (category, category),
    )
    return int(found[0]["failed"])


def statuses(connection: Connection, task_ids: Sequence[int]) -> dict[int, str]:
    """The status of each of these tasks; one that is not there is left out."""
    found = rows(connection, "SELECT id, status FROM tasks WHERE id = ANY (%s)", (list(task_ids),))
    return {row["id"]: row["status"] for row in found}


def retry_failed(
    connection: Connection, *, category: str | None = None, task_ids: Sequence[int] | None = None
) -> Iterator[Retried]:
    """Set failed tasks back to unsolved, in committed batches; what was done so far is told after each.

    Tasks that fail again meanwhile are not taken a second time.
    """
    last = rows(connection, "SELECT coalesce(max(id), 0) AS id FROM tasks")[0]["id"]
    ids = None if task_ids is None else list(task_ids)
    after, unsolved, still_failed = -(2**62), 0, 0
    while True:
        done = rows(connection, _RETRY, (after, last, category, category, ids, ids, RETRY_BATCH))
        connection.commit()
        unsolved += sum(row["status"] == "unsolved" for row in done)
        still_failed += sum(row["status"] != "unsolved" for row in done)
        yield Retried(unsolved, still_failed)
        if len(done) < RETRY_BATCH:
            return
        after = max(row["id"] for row in done)


def require_schema(connection: Connection) -> None:
    """DatabaseError with the next step if `router migrate` has never run here."""
    there = rows(connection, "SELECT to_regclass('queue_settings') IS NOT NULL AS there")[0]["there"]
    if not there:
        raise DatabaseError("This database holds no tables of the router yet. Run `router migrate` first.")
