"""Checks a database against the schema of this version, for `router doctor` and for running processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import asyncpg
import psycopg2.errors

from router.database import Connection, connect, rows, transaction
from router.migrations.apply import LOCK_SECONDS, stored_defaults
from router.migrations.facts import SchemaFacts, fetch_facts, read_facts
from router.migrations.problems import (
    REPAIRED_BY_MIGRATE,
    STOP_WORK,
    ProblemKind,
    SchemaProblem,
    schema_problems,
)
from router.migrations.scripts import FUNCTIONS, SQL_FOLDER, ExpectedSchema, expected_schema, new_migrations
from router.migrations.trial import try_writes

_VERSIONS = frozenset({ProblemKind.OUTDATED, ProblemKind.MIGRATIONS_PENDING, ProblemKind.NOT_MIGRATED})
_UNKNOWN_STATUSES = """
SELECT string_agg(format('%s (%s rows)', coalesce(quote_literal(status), 'NULL'), n), ', ') AS found
  FROM (SELECT status::text, count(*) AS n FROM tasks
         WHERE status IS NULL OR status::text NOT IN ('unsolved', 'solved', 'failed')
         GROUP BY 1 LIMIT 5) AS odd""".replace("%", "%%")


@dataclass(frozen=True, slots=True)
class Examination:
    """Result of `examine`: all problems, and what `router migrate` would do.

    `refused`: it would refuse, and change nothing. `pending`: migrations that it would apply.
    """

    problems: tuple[SchemaProblem, ...]
    refused: bool
    pending: tuple[str, ...]
    functions_changed: bool
    restores: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether there is nothing to do."""
        return not self.problems and not self.pending and not self.functions_changed


def examine(
    url: str, folder: Path = SQL_FOLDER, *, task_defaults: Mapping[str, str] | None = None
) -> Examination:
    """Finds what is wrong with a database, and changes nothing.

    It writes two tasks and rolls back (see `trial`), if nothing else is wrong.
    """
    expected = expected_schema(folder)
    with connect(url, autocommit=True) as connection, transaction(connection):
        rows(connection, f"SET LOCAL lock_timeout = '{LOCK_SECONDS:g}s'")
        facts = read_facts(connection)
        defaults = stored_defaults(connection, facts) if task_defaults is None else task_defaults
        problems = schema_problems(facts, expected, defaults)
        if facts.kind == "r" and not facts.applied and "status" in facts.columns:
            problems += _unknown_statuses(connection)
        if facts.kind == "r" and all(problem.kind in REPAIRED_BY_MIGRATE for problem in problems):
            problems += _tried(connection, facts, defaults)
        applied = facts.applied or {}
        lasting = [problem.kind for problem in problems if problem.kind not in REPAIRED_BY_MIGRATE]
        tolerated = {ProblemKind.INSERTS, ProblemKind.WRITES} if facts.applied else set()
        return Examination(
            problems=tuple(problems),
            refused=any(kind not in tolerated for kind in lasting),
            pending=tuple(script.name for script in new_migrations(folder, applied)),
            functions_changed=applied.get(FUNCTIONS) != expected.checksums[FUNCTIONS],
            restores=tuple(
                problem.text
                for problem in problems
                if problem.kind in (ProblemKind.TRIGGERS, ProblemKind.REPAIRABLE)
            ),
        )


def _unknown_statuses(connection: Connection) -> list[SchemaProblem]:
    found = rows(connection, _UNKNOWN_STATUSES)[0]["found"]
    if found is None:
        return []
    return [
        SchemaProblem(
            ProblemKind.TABLE,
            f"tasks.status may hold unsolved, solved and failed, but holds {found}.",
            "Set these rows first, with an UPDATE.",
        )
    ]


def _tried(connection: Connection, facts: SchemaFacts, defaults: Mapping[str, str]) -> list[SchemaProblem]:
    try:
        return try_writes(connection, facts, defaults)
    except (psycopg2.errors.LockNotAvailable, psycopg2.errors.DeadlockDetected):
        return [
            SchemaProblem(
                ProblemKind.WRITES,
                f"tasks was locked by another transaction for {LOCK_SECONDS:g} s, so no write was tried.",
                "End that transaction (see pg_stat_activity), or try again.",
            )
        ]


@cache
def _expected() -> ExpectedSchema:
    """Returns the schema of the program that this process runs.

    It is read once: an upgrade replaces the scripts on disk while older processes run.
    """
    return expected_schema()


def schema_problem(connection: Connection) -> SchemaProblem | None:
    """Returns the most severe problem that the catalogs show; None if there is none. Takes about 2 ms."""
    facts = read_facts(connection)
    return next(iter(schema_problems(facts, _expected(), stored_defaults(connection, facts))), None)


def blocking_problem(connection: Connection) -> SchemaProblem | None:
    """Returns the most severe problem that stops work, like `SchemaMonitor`."""
    found = schema_problems(read_facts(connection), _expected(), defaults=None)
    return next((problem for problem in found if problem.kind in STOP_WORK), None)


class SchemaMonitor:
    """Compares a database with the schema of this process, every few seconds."""

    def __init__(self, expected: ExpectedSchema | None = None) -> None:
        self._expected = expected or _expected()
        self._matched = False

    async def problem(self, pool: asyncpg.Pool) -> SchemaProblem | None:
        """Returns the most severe problem that stops work; None if there is none. Raises DatabaseError."""
        found = schema_problems(await fetch_facts(pool), self._expected, defaults=None)
        found = [problem for problem in found if problem.kind in STOP_WORK]
        if any(problem.kind is ProblemKind.NOT_MIGRATED for problem in found):
            await pool.expire_connections()  # the migration changes the search path of new ones
        if not any(problem.kind in _VERSIONS for problem in found):
            self._matched = True
        elif self._matched:
            return SchemaProblem(
                ProblemKind.OUTDATED,
                "The database was migrated after this process had started.",
                "Restart this process.",
            )
        return next(iter(found), None)
