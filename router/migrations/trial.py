"""Trial of the router's writes to `tasks`: inserts, answers, fails and retries two tasks, and rolls back.

It finds what the catalogs do not show: constraints that reject an answer or a status, and triggers of others
that raise, discard or change rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psycopg2
import psycopg2.errors
from psycopg2 import sql

from router.database import Connection, rows
from router.errors import first_line
from router.migrations.facts import SchemaFacts
from router.migrations.problems import ProblemKind, SchemaProblem

LONG_ANSWER_CHARACTERS = 20_000
_LOCKED = (psycopg2.errors.LockNotAvailable, psycopg2.errors.DeadlockDetected)
_INTEGER_MAX = 2**31 - 1
_ROWS = 2
_ID_GAP = 1_000_000  # above the ids that producers insert at the same time

# Values of each write. A column that the table does not have yet is left out.
_NEW: Mapping[str, str] = {
    "prompt": "'Trial of router migrate'", "status": "'unsolved'", "category": "NULL", "priority": "0",
    "max_tokens": "NULL", "deadline_at": "now()", "client": "''",
}  # fmt: skip
_KEPT = {
    "answer": "'An answer'", "answered_by": "'trial'", "answer_rank": "1",
    "answer_call_id": "gen_random_uuid()",
}  # fmt: skip
_SOLVED = {
    **_KEPT, "answer": f"repeat('answer ', {LONG_ANSWER_CHARACTERS // 7})", "answer_rank": "3",
    "status": "'solved'", "category": "'general'", "solved_at": "now()", "failure": "NULL",
}  # fmt: skip
_FAILED = {"status": "'failed'", "failure": "'a trial'", "answer_rank": "NULL", "answer_call_id": "NULL"}
_RETRIED = {"status": "'unsolved'", "answer_rank": "NULL", "solved_at": "NULL", "failure": "NULL"}
_UPDATES = (
    ("store a provisional answer", _KEPT, "unsolved"),
    (f"store an answer of {LONG_ANSWER_CHARACTERS:,} characters", _SOLVED, "solved"),
    ("record a failure", _FAILED, "failed"),
    ("retry", _RETRIED, "unsolved"),
)


class _Rejected(Exception):  # noqa: N818 - names an event
    """A write did not have its effect; the text says which."""


def try_writes(
    connection: Connection, facts: SchemaFacts, defaults: Mapping[str, str]
) -> list[SchemaProblem]:
    """Returns the first write that fails, if any. Call it in a transaction; it changes nothing.

    Lock timeouts are raised.
    """
    step = "insert a task"
    try:
        with _rolled_back(connection):
            rows(connection, "SET CONSTRAINTS ALL IMMEDIATE")
            ids = _insert(connection, facts.columns.keys(), defaults)
            for step, values, status in _UPDATES:  # noqa: B007 - named in the problem
                if values is _SOLVED and not facts.applied and _is_short(facts, "answer"):
                    continue  # `router migrate` widens the column first
                _update(connection, facts.columns.keys(), ids, values, status)
    except _LOCKED:
        raise
    except psycopg2.Error as error:
        return [_problem(step, error, facts, defaults)]
    except _Rejected as rejected:
        return [
            SchemaProblem(
                ProblemKind.WRITES, f"The router cannot {step}: {rejected}.", _about_triggers(facts)
            )
        ]
    return []


def _is_short(facts: SchemaFacts, name: str) -> bool:
    return name in facts.columns and "(" in facts.columns[name].type


@contextmanager
def _rolled_back(connection: Connection) -> Iterator[None]:
    rows(connection, "SAVEPOINT router_trial")
    try:
        yield
    finally:
        rows(connection, "ROLLBACK TO SAVEPOINT router_trial")


def _insert(connection: Connection, columns: Collection[str], defaults: Mapping[str, str]) -> list[int]:
    """Inserts two tasks with the same prompt, with ids that take nothing from a sequence."""
    newest = rows(
        connection, "SELECT coalesce(max(id), 0) AS newest, coalesce(min(id), 0) AS oldest FROM tasks"
    )[0]
    first = newest["newest"] + _ID_GAP
    if first >= _INTEGER_MAX - 1:
        first = min(newest["oldest"], 0) - _ROWS
    values: dict[str, sql.Composable] = {
        name: sql.SQL(value) for name, value in _NEW.items() if name in columns
    }
    values |= {name: sql.Literal(value) for name, value in defaults.items()}
    names = sql.SQL(", ").join(map(sql.Identifier, ["id", *values]))
    row = sql.SQL("({})")
    listed = sql.SQL(", ").join(
        row.format(sql.SQL(", ").join([sql.Literal(first + number), *values.values()]))
        for number in range(_ROWS)
    )
    statement = sql.SQL(
        "INSERT INTO tasks ({names}) OVERRIDING SYSTEM VALUE VALUES {listed} RETURNING id, status::text"
    ).format(names=names, listed=listed)
    with connection.cursor() as cursor:
        cursor.execute(statement)
        found = [{"id": task_id, "status": status} for task_id, status in cursor.fetchall()]
    if len(found) != _ROWS:
        raise _Rejected("an inserted row was discarded")
    _require(found, "unsolved")
    return [row["id"] for row in found]


def _update(
    connection: Connection, columns: Collection[str], ids: list[int], values: Mapping[str, str], status: str
) -> None:
    assigned = ", ".join(f"{name} = {value}" for name, value in values.items() if name in columns)
    if not assigned:
        return
    found = rows(
        connection,
        f"UPDATE tasks SET {assigned} WHERE id = ANY (%s) RETURNING id, status::text",  # noqa: S608 - constants
        (ids,),
    )
    if len(found) != len(ids):
        raise _Rejected("the update of a row was discarded")
    _require(found, status)


def _require(found: list[dict[str, Any]], status: str) -> None:
    wrong = {row["status"] for row in found} - {status}
    if wrong:
        raise _Rejected(f"the row has the status {wrong.pop()!r} instead of {status!r}")


def _problem(
    step: str, error: psycopg2.Error, facts: SchemaFacts, defaults: Mapping[str, str]
) -> SchemaProblem:
    """Describes an error without its DETAIL, which contains the row."""
    named = error.diag.constraint_name
    text = f"The router cannot {step}: {first_line(error)}."
    if isinstance(error, psycopg2.errors.ReadOnlySqlTransaction):
        return SchemaProblem(ProblemKind.WRITES, text, "Connect to the primary server.")
    if isinstance(error, psycopg2.errors.InsufficientPrivilege):
        return SchemaProblem(
            ProblemKind.PRIVILEGES,
            text,
            "Grant the role INSERT, SELECT and UPDATE on the table that is named.",
        )
    if isinstance(error, psycopg2.errors.ForeignKeyViolation):
        remedy = "Let tasks.defaults in config/models.yaml name an existing row."
    elif isinstance(error, psycopg2.errors.CheckViolation) and named and error.diag.table_name == "tasks":
        remedy = f'Run `ALTER TABLE tasks DROP CONSTRAINT "{named}"`, or widen the constraint.'
    elif isinstance(error, psycopg2.errors.UniqueViolation) and named:
        remedy = f"Drop the unique constraint or index {named}: several tasks may have the same values."
    elif isinstance(error, psycopg2.errors.StringDataRightTruncation):
        remedy = "Change the column that is too short to text."
    elif isinstance(error, psycopg2.DataError) and defaults:
        remedy = "Check the values of tasks.defaults in config/models.yaml."
    else:
        remedy = _about_triggers(facts)
    return SchemaProblem(ProblemKind.WRITES, text, remedy)


def _about_triggers(facts: SchemaFacts) -> str:
    others = sorted(name for name in facts.triggers if not name.startswith("router_"))
    if not others:
        return "Change the table so that it accepts this."
    return f"Change or drop the trigger that does this; tasks has {', '.join(others)}."
