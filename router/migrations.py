"""Migrates the Postgres schema: applies each numbered file once, and the functions whenever they change."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psycopg2
import psycopg2.errors
import psycopg2.extensions
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from router.database import Connection, connect, rows
from router.errors import SchemaError, first_line
from router.settings import ROOT

SQL_FOLDER = ROOT / "sql"
LOCK_SECONDS = 2.0
LOCK_PATIENCE_SECONDS = 120.0
MIGRATION_LOCK = 7_205_759_403  # unique among the advisory locks of this database
_LOCKED = (psycopg2.errors.LockNotAvailable, psycopg2.errors.DeadlockDetected)


@dataclass(frozen=True, slots=True)
class MigrationReport:
    """Result of `migrate`: names of applied migrations, whether functions changed, number of queued tasks."""

    applied: tuple[str, ...]
    functions_renewed: bool
    tasks_queued: int


class _Script(NamedTuple):
    name: str
    text: str
    checksum: str


def migrate(url: str, folder: Path = SQL_FOLDER) -> MigrationReport:
    """Upgrades the schema: applies new migrations, replaces changed functions, queues existing tasks.

    Safe to run at any time and on several machines at once. Migrations and functions are one transaction.
    Raises SchemaError, with nothing changed, if an existing table `tasks` cannot be upgraded.
    """
    with connect(url, autocommit=True) as connection:
        rows(connection, "SELECT pg_advisory_lock(%s)", (MIGRATION_LOCK,))
        rows(
            connection,
            "CREATE TABLE IF NOT EXISTS router_migrations ("
            " name text PRIMARY KEY, checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())",
        )
        done = {
            row["name"]: row["checksum"]
            for row in rows(connection, "SELECT name, checksum FROM router_migrations")
        }
        migrations = list(_new_migrations(folder / "migrations", done))
        functions = list(_changed_functions(folder / "functions", done))
        _run(connection, [*migrations, *functions])
        rows(connection, "SELECT make_call_partitions()")
        queued = _queue_existing_tasks(connection)
        if migrations:
            rows(connection, "SELECT recount_tasks()")
        return MigrationReport(tuple(script.name for script in migrations), bool(functions), queued)


def _new_migrations(folder: Path, done: Mapping[str, str]) -> Iterator[_Script]:
    for path in sorted(folder.glob("*.sql")):
        script = _script(path.name, path.read_text(encoding="utf-8"))
        if path.name not in done:
            yield script
        elif done[path.name] != script.checksum:
            raise SchemaError(f"{path.name} was changed after it was applied. Write a new migration instead.")


def _changed_functions(folder: Path, done: Mapping[str, str]) -> Iterator[_Script]:
    files = sorted(folder.glob("*.sql"))
    script = _script("functions", "\n".join(path.read_text(encoding="utf-8") for path in files))
    if done.get(script.name) != script.checksum:
        yield script


def _script(name: str, text: str) -> _Script:
    return _Script(name, text, hashlib.sha256(text.encode()).hexdigest())


def _run(connection: Connection, scripts: Sequence[_Script]) -> None:
    """Runs the scripts in one transaction, so that no client meets new tables with old functions.

    Each attempt waits at most LOCK_SECONDS for a lock and then rolls back: readers and producers are never
    blocked for longer.
    """
    attempts = Retrying(
        retry=retry_if_exception_type(_LOCKED),
        wait=wait_random_exponential(multiplier=0.2, max=5),
        stop=stop_after_delay(LOCK_PATIENCE_SECONDS),
        reraise=True,
    )
    try:
        attempts(_run_once, connection, scripts)
    except _LOCKED as error:
        raise SchemaError(
            f"Other transactions kept the tables locked for {LOCK_PATIENCE_SECONDS:g} s. Nothing was changed."
            " End them (see pg_stat_activity) and run the migration again."
        ) from error


def _run_once(connection: Connection, scripts: Sequence[_Script]) -> None:
    with connection.cursor() as cursor:
        cursor.execute("BEGIN")
        name = "migrations"
        try:
            cursor.execute(f"SET LOCAL lock_timeout = '{LOCK_SECONDS:g}s'")
            # A function may call one that is defined after it.
            cursor.execute("SET LOCAL check_function_bodies = off")
            for name, text, checksum in scripts:
                cursor.execute(text)
                cursor.execute(
                    "INSERT INTO router_migrations (name, checksum) VALUES (%s, %s)"
                    " ON CONFLICT (name) DO UPDATE SET checksum = EXCLUDED.checksum, applied_at = now()",
                    (name, checksum),
                )
            cursor.execute("COMMIT")
        except psycopg2.Error as error:
            cursor.execute("ROLLBACK")
            if isinstance(error, _LOCKED):
                raise
            raise SchemaError(f"{name}: {first_line(error)}") from error


def _queue_existing_tasks(connection: Connection) -> int:
    queued: int = 0
    after = -(2**62)
    while True:
        step = rows(connection, "SELECT * FROM reconcile(%s)", (after,))[0]
        queued += step["added"]
        if step["next_after"] is None:
            return queued
        after = step["next_after"]
