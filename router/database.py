"""Postgres: connections, migrations, and SQL functions called by name.

Two drivers, one a purpose: asyncpg where calls overlap (workers, asking), psycopg2 for short synchronous work
(migrations, the command line, Airflow tasks). Driver errors are wrapped here, at the edge.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import psycopg2
import psycopg2.errors
import psycopg2.extensions
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from router.errors import ConfigError, DatabaseError, SchemaError
from router.settings import ROOT

SQL_FOLDER = ROOT / "sql"
LOCK_SECONDS = 2.0
LOCK_PATIENCE_SECONDS = 120.0
MIGRATION_LOCK = 7_205_759_403  # any number that no other program uses as an advisory lock

Connection = psycopg2.extensions.connection
# What asyncpg raises when the server is away or the connection broke in the middle.
AWAY_ERRORS = (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError, asyncio.TimeoutError)


@dataclass(frozen=True, slots=True)
class MigrationReport:
    """What `migrate` did: migrations by file name, whether functions were renewed, tasks that were queued."""

    applied: tuple[str, ...]
    functions_renewed: bool
    tasks_queued: int


@contextmanager
def connect(url: str, *, autocommit: bool = False) -> Iterator[Connection]:
    """A synchronous connection, committed at the end and rolled back on an error. Raises DatabaseError.

    With `autocommit` each statement is its own transaction.
    """
    try:
        connection = psycopg2.connect(url, connect_timeout=10)
    except psycopg2.ProgrammingError:  # its words hold the URL, and with it the password
        raise ConfigError(
            "The database's address is no postgresql:// URL, or a special character of its password is not"
            " percent-encoded. Check ROUTER_DATABASE_URL."
        ) from None
    except psycopg2.OperationalError as error:
        raise DatabaseError(
            f"Postgres cannot be reached: {_first_line(error)} Check ROUTER_DATABASE_URL."
        ) from error
    try:
        if autocommit:
            connection.autocommit = True
            yield connection
        else:
            with connection:
                yield connection
    except psycopg2.Error as error:
        raise DatabaseError(_first_line(error)) from error
    finally:
        connection.close()


def rows(connection: Connection, statement: str, arguments: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
    """Run one statement and return its rows as dictionaries; an empty list if it returns none."""
    with connection.cursor() as cursor:
        cursor.execute(statement, arguments)
        if cursor.description is None:
            return []
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


@contextmanager
def transaction(connection: Connection) -> Iterator[None]:
    """All or nothing, on a connection that commits each statement otherwise."""
    rows(connection, "BEGIN")
    try:
        yield
    except BaseException:
        rows(connection, "ROLLBACK")
        raise
    rows(connection, "COMMIT")


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


async def open_pool(url: str, *, connections: int, at_first: int = 1) -> asyncpg.Pool:
    """A pool of at most `connections`, for statements that each take milliseconds. Raises DatabaseError.

    With `at_first` 0 it opens also while Postgres is away.

    Works through a session-mode pooler; through a transaction-mode one asyncpg's prepared statements do not.
    """
    try:
        return await asyncpg.create_pool(
            url, min_size=at_first, max_size=connections, command_timeout=30, timeout=10,
            reset=_nothing_to_reset, server_settings={"application_name": "router", "jit": "off"},
        )  # fmt: skip
    except (OSError, asyncpg.PostgresError) as error:
        raise DatabaseError(
            f"Postgres cannot be reached: {_first_line(error)} Check ROUTER_DATABASE_URL."
        ) from error


async def _nothing_to_reset(_connection: Any) -> None:
    """Each statement is its own transaction and sets nothing beyond it; a reset is one more round trip."""


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
