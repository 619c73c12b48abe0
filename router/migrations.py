"""Migrations of the Postgres schema: numbered files once each, functions whenever they change."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg2
import psycopg2.errors
import psycopg2.extensions
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from router.database import Connection, _first_line, connect, rows
from router.errors import SchemaError
from router.settings.environment import ROOT

SQL_FOLDER = ROOT / "sql"


LOCK_SECONDS = 2.0


LOCK_PATIENCE_SECONDS = 120.0


MIGRATION_LOCK = 7_205_759_403  # any number that no other program uses as an advisory lock


@dataclass(frozen=True, slots=True)
class MigrationReport:
    """What `migrate` did: migrations by file name, whether functions were renewed, tasks that were queued."""

    applied: tuple[str, ...]
    functions_renewed: bool
    tasks_queued: int


def migrate(url: str, folder: Path = SQL_FOLDER) -> MigrationReport:
    """Bring the schema up to date: new migrations in order, the functions, and tasks that have no queue row.

    Safe to run at any time and from many machines at once; each migration is one transaction. Raises
    SchemaError if an existing table `tasks` cannot be upgraded, and then has changed nothing.
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
        applied = tuple(_apply_new_migrations(connection, folder / "migrations", done))
        renewed = _renew_functions(connection, folder / "functions", done)
        rows(connection, "SELECT make_call_partitions()")
        queued = _queue_existing_tasks(connection)
        if applied:
            rows(connection, "SELECT recount_tasks()")
        return MigrationReport(applied, renewed, queued)


def _apply_new_migrations(connection: Connection, folder: Path, done: dict[str, str]) -> Iterator[str]:
    for path in sorted(folder.glob("*.sql")):
        text = path.read_text(encoding="utf-8")
        checksum = hashlib.sha256(text.encode()).hexdigest()
        if path.name in done:
            if done[path.name] != checksum:
                raise SchemaError(
                    f"{path.name} was changed after it was applied. Write a new migration instead."
                )
            continue
        _run_script(connection, path.name, text, checksum)
        yield path.name


def _renew_functions(connection: Connection, folder: Path, done: dict[str, str]) -> bool:
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.sql")))
    checksum = hashlib.sha256(text.encode()).hexdigest()
    if done.get("functions") == checksum:
        return False
    _run_script(connection, "functions", text, checksum)
    return True


def _run_script(connection: Connection, name: str, text: str, checksum: str) -> None:
    # Whoever reads or fills tasks meanwhile waits behind us for at most LOCK_SECONDS, then goes first.
    waiting = Retrying(
        retry=retry_if_exception_type((psycopg2.errors.LockNotAvailable, psycopg2.errors.DeadlockDetected)),
        wait=wait_random_exponential(multiplier=0.2, max=5),
        stop=stop_after_delay(LOCK_PATIENCE_SECONDS),
        reraise=True,
    )
    try:
        waiting(_run_script_once, connection, name, text, checksum)
    except psycopg2.errors.LockNotAvailable as error:
        raise SchemaError(
            f"{name}: others kept the tables locked for {LOCK_PATIENCE_SECONDS:g} s. Nothing was changed;"
            " end what holds them (see pg_stat_activity), and run it again."
        ) from error
    except psycopg2.Error as error:
        raise SchemaError(f"{name}: {_first_line(error)}") from error


def _run_script_once(connection: Connection, name: str, text: str, checksum: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute("BEGIN")
        try:
            cursor.execute(f"SET LOCAL lock_timeout = '{LOCK_SECONDS:g}s'")
            # Functions may call those that are defined after them.
            cursor.execute("SET LOCAL check_function_bodies = off")
            cursor.execute(text)
            cursor.execute(
                "INSERT INTO router_migrations (name, checksum) VALUES (%s, %s)"
                " ON CONFLICT (name) DO UPDATE SET checksum = EXCLUDED.checksum, applied_at = now()",
                (name, checksum),
            )
            cursor.execute("COMMIT")
        except psycopg2.Error:
            cursor.execute("ROLLBACK")
            raise


def _queue_existing_tasks(connection: Connection) -> int:
    queued: int = 0
    after = -(2**62)
    while True:
        step = rows(connection, "SELECT * FROM reconcile(%s)", (after,))[0]
        queued += step["added"]
        if step["next_after"] is None:
            return queued
        after = step["next_after"]
