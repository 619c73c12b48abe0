"""Applies migrations and functions, restores what `tasks` lost, and queues existing tasks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psycopg2
import psycopg2.errors
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from router.database import Connection, connect, rows
from router.errors import SchemaError, first_line
from router.migrations.facts import SchemaFacts, read_facts
from router.migrations.problems import REPAIRED_BY_MIGRATE, ProblemKind, SchemaProblem, schema_problems
from router.migrations.schema import (
    apply_roles,
    move_functions,
    roles_applied,
    secure_functions,
    set_default_path,
    set_script_path,
)
from router.migrations.scripts import (
    FUNCTIONS,
    SCHEMA_MIGRATION,
    SQL_FOLDER,
    ExpectedSchema,
    Script,
    expected_schema,
    functions_script,
    new_migrations,
)
from router.migrations.trial import try_writes

LOCK_SECONDS = 2.0
LOCK_PATIENCE_SECONDS = 120.0
RECOUNT_PATIENCE_SECONDS = 5.0
IDLE_HOLDER_SECONDS = 10.0
MIGRATION_LOCK = 7_205_759_403  # unique among the advisory locks of this database
_LOCKED = (psycopg2.errors.LockNotAvailable, psycopg2.errors.DeadlockDetected)
_HOLDER = """
SELECT l.pid, a.usename, a.application_name, a.state,
       extract(epoch FROM clock_timestamp() - a.state_change)::float8 AS seconds
  FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid
 WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
   AND (l.classid::bigint << 32 | l.objid::bigint) = %s
   AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())"""
_FAILURES = """
INSERT INTO router.task_failures (task_id, failed_at)
SELECT id, coalesce(router.readable_time(created_at), 'epoch') FROM tasks
 WHERE status = 'failed' AND router.is_failed(status::text, interactive) ON CONFLICT DO NOTHING"""


@dataclass(frozen=True, slots=True)
class MigrationReport:
    """Result of `migrate`: names of applied migrations, whether functions changed, number of queued tasks.

    `restored`: problems that are repaired. `problems`: those that remain.
    """

    applied: tuple[str, ...]
    functions_renewed: bool
    tasks_queued: int
    restored: tuple[SchemaProblem, ...] = ()
    problems: tuple[SchemaProblem, ...] = ()


class _Busy(Exception):  # noqa: N818 - names a state
    """Another session holds the migration lock."""


def migrate(
    url: str,
    folder: Path = SQL_FOLDER,
    *,
    task_defaults: Mapping[str, str] | None = None,
    roles: bool = False,
    progress: Callable[[str], None] = lambda _message: None,
) -> MigrationReport:
    """Upgrades the schema: applies new migrations, replaces changed functions, queues existing tasks.

    Safe to run at any time and on several machines at once. Migrations and functions are one transaction,
    which also holds the lock against other migrations: a pooler in transaction mode cannot leave it behind.
    `task_defaults` are the values of `tasks.defaults` in the config; None leaves the stored ones. `roles`:
    also runs roles.sql, as every migration does once it was run.
    Raises SchemaError, with nothing changed, if the table `tasks` cannot be used.
    """
    with connect(url, autocommit=True) as connection:
        done = _Migration(connection, folder, task_defaults, roles, progress).run()
        rows(connection, "SELECT router.make_call_partitions()")
        queued = _queue_existing_tasks(connection)
        if done.applied or done.restored:
            rows(connection, _FAILURES)
            rows(connection, "SELECT router.recount_tasks()")
        recount_if_due(connection)
        return MigrationReport(done.applied, done.functions_renewed, queued, done.restored, done.problems)


class _Migration:
    """One run of the migration transaction, repeated while locks are held."""

    def __init__(
        self,
        connection: Connection,
        folder: Path,
        task_defaults: Mapping[str, str] | None,
        roles: bool,  # noqa: FBT001 - private
        progress: Callable[[str], None],
    ) -> None:
        self._connection = connection
        self._folder = folder
        self._defaults = task_defaults
        self._roles = roles
        self._progress = progress
        self._told: int | None = None

    def run(self) -> MigrationReport:
        """Each attempt waits at most LOCK_SECONDS for a lock and then rolls back.

        Readers and producers are never blocked for longer.
        """
        attempts = Retrying(
            retry=retry_if_exception_type((*_LOCKED, _Busy)),
            wait=wait_random_exponential(multiplier=0.2, max=5),
            stop=stop_after_delay(LOCK_PATIENCE_SECONDS),
            reraise=True,
        )
        try:
            return attempts(self._attempt)
        except _LOCKED as error:
            raise SchemaError(
                f"Other transactions kept the tables locked for {LOCK_PATIENCE_SECONDS:g} s. Nothing was"
                " changed. End them (see pg_stat_activity) and run the migration again."
            ) from error
        except _Busy as error:
            raise SchemaError(
                f"{error} It did not end within {LOCK_PATIENCE_SECONDS:g} s. Nothing was changed."
            ) from error

    def _attempt(self) -> MigrationReport:
        with self._connection.cursor() as cursor:
            cursor.execute("BEGIN")
            try:
                cursor.execute(f"SET LOCAL lock_timeout = '{LOCK_SECONDS:g}s'")
                # A function may call one that is defined after it.
                cursor.execute("SET LOCAL check_function_bodies = off")
                self._lock()
                set_script_path(self._connection)
                report = self._upgrade()
                cursor.execute("COMMIT")
            except BaseException as error:
                cursor.execute("ROLLBACK")
                if isinstance(error, psycopg2.Error) and not isinstance(error, _LOCKED):
                    raise SchemaError(first_line(error)) from error
                raise
        return report

    def _lock(self) -> None:
        """Takes the lock of this transaction, or raises _Busy with its holder."""
        statement = "SELECT pg_try_advisory_xact_lock(%s) AS acquired"
        if rows(self._connection, statement, (MIGRATION_LOCK,))[0]["acquired"]:
            return
        holder = next(iter(rows(self._connection, _HOLDER, (MIGRATION_LOCK,))), None)
        if holder is None:
            raise _Busy("Another migration just ended.")
        who = f"pid {holder['pid']}" + (f", user {holder['usename']}" if holder["usename"] else "")
        if holder["state"] == "idle" and (holder["seconds"] or 0) > IDLE_HOLDER_SECONDS:
            raise SchemaError(
                f"An idle session ({who}) holds the lock of migrations. A migration that ran through a"
                " connection pooler left it behind. Nothing was changed. Run"
                f" `SELECT pg_terminate_backend({holder['pid']})`, then the migration again."
            )
        if self._told != holder["pid"]:
            self._told = holder["pid"]
            self._progress(f"Another migration is running ({who}); waiting for it.")
        raise _Busy(f"Another migration is running ({who}).")

    def _upgrade(self) -> MigrationReport:
        connection, expected = self._connection, expected_schema(self._folder)
        before = replace(read_facts(connection), may_work=False)  # only the owner can migrate
        defaults = self._task_defaults(before)
        found = schema_problems(before, expected, defaults)
        lasting = [problem for problem in found if problem.kind not in REPAIRED_BY_MIGRATE]
        if severe := [problem for problem in lasting if problem.kind is not ProblemKind.INSERTS]:
            _raise(severe)
        rows(
            connection,
            "CREATE TABLE IF NOT EXISTS router_migrations ("
            " name text PRIMARY KEY, checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())",
        )
        applied = dict(before.applied or {})
        migrations = list(new_migrations(self._folder, applied))
        functions = functions_script(self._folder)
        restored = [
            problem for problem in found if problem.kind in (ProblemKind.TRIGGERS, ProblemKind.REPAIRABLE)
        ]
        renewed = applied.get(FUNCTIONS) != functions.checksum
        if restored:
            _make_room(connection, before, expected)
        self._apply(migrations)
        if before.applied and any(script.name == SCHEMA_MIGRATION for script in migrations):
            move_functions(connection, functions)
        if renewed or restored:
            self._apply([functions])
        if migrations or renewed or restored:
            secure_functions(connection)
            self._roles = self._roles or roles_applied(connection)
        if self._roles:
            set_script_path(connection)
            apply_roles(connection, SQL_FOLDER)
        if restored:
            _enable_triggers(connection, expected)
        self._store_defaults()
        set_default_path(connection)
        set_script_path(connection)
        problems = lasting
        if before.kind is not None and not lasting:
            problems = try_writes(connection, read_facts(connection), defaults)
        if problems and not before.applied:
            _raise(problems)
        return MigrationReport(
            tuple(script.name for script in migrations), renewed, 0, tuple(restored), tuple(problems)
        )

    def _apply(self, scripts: Sequence[Script]) -> None:
        for name, text, checksum in scripts:
            set_script_path(self._connection)
            try:
                with self._connection.cursor() as cursor:
                    cursor.execute(text)  # without arguments, so that percent signs stay
            except _LOCKED:
                raise
            except psycopg2.Error as error:
                raise SchemaError(f"{name}: {first_line(error)}") from error
            rows(
                self._connection,
                "INSERT INTO router_migrations (name, checksum) VALUES (%s, %s)"
                " ON CONFLICT (name) DO UPDATE SET checksum = EXCLUDED.checksum, applied_at = now()",
                (name, checksum),
            )

    def _task_defaults(self, before: SchemaFacts) -> Mapping[str, str]:
        return stored_defaults(self._connection, before) if self._defaults is None else self._defaults

    def _store_defaults(self) -> None:
        if self._defaults is not None:
            statement = "UPDATE queue_settings SET task_defaults = %s::jsonb WHERE task_defaults <> %s::jsonb"
            rows(self._connection, statement, (json.dumps(self._defaults),) * 2)


def stored_defaults(connection: Connection, facts: SchemaFacts) -> Mapping[str, str]:
    """Returns the values of `tasks.defaults` that the database knows."""
    if not facts.applied:
        return {}
    # Through to_jsonb, because a database of an older version does not have the column.
    statement = "SELECT to_jsonb(s) -> 'task_defaults' AS defaults FROM queue_settings s"
    return rows(connection, statement)[0]["defaults"] or {}


def _raise(problems: Sequence[SchemaProblem]) -> None:
    listed = "".join(f"\n  - {problem}" for problem in problems)
    raise SchemaError(
        f"{problems[0]} Nothing was changed." if len(problems) == 1 else f"Nothing was changed:{listed}"
    )


def _make_room(connection: Connection, facts: SchemaFacts, expected: ExpectedSchema) -> None:
    """Drops views that read a former table `tasks`: CREATE OR REPLACE keeps the types of their columns."""
    for name in sorted(expected.task_views - facts.views):
        rows(connection, f"DROP VIEW IF EXISTS {name}")


def _enable_triggers(connection: Connection, expected: ExpectedSchema) -> None:
    found = read_facts(connection).triggers
    for name in sorted(expected.triggers):
        if not found[name].enabled:
            rows(connection, f"ALTER TABLE tasks ENABLE TRIGGER {name}")


def recount_if_due(connection: Connection) -> bool:
    """Corrects the counters if the categories changed. Returns False while an older transaction is open."""
    until = time.monotonic() + RECOUNT_PATIENCE_SECONDS
    while True:
        due = rows(connection, "SELECT router.recount_if_due() AS done")[0]["done"]
        if due or time.monotonic() > until:
            return bool(due)
        time.sleep(0.1)


def _queue_existing_tasks(connection: Connection) -> int:
    queued: int = 0
    after = -(2**62)
    patiently = Retrying(
        retry=retry_if_exception_type(_LOCKED),
        wait=wait_random_exponential(multiplier=0.2, max=2),
        stop=stop_after_delay(LOCK_PATIENCE_SECONDS),
        reraise=True,
    )
    while True:
        step = patiently(rows, connection, "SELECT * FROM router.reconcile(%s)", (after,))[0]
        queued += step["added"]
        if step["next_after"] is None:
            return queued
        after = step["next_after"]
