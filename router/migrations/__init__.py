"""Migrates the Postgres schema in place, and checks that a database has it."""

from router.migrations.apply import MigrationReport, migrate, recount_if_due
from router.migrations.check import Examination, SchemaMonitor, blocking_problem, examine, schema_problem
from router.migrations.problems import ProblemKind, SchemaProblem
from router.migrations.scripts import SQL_FOLDER, expected_schema

__all__ = [
    "SQL_FOLDER",
    "Examination",
    "MigrationReport",
    "ProblemKind",
    "SchemaMonitor",
    "SchemaProblem",
    "blocking_problem",
    "examine",
    "expected_schema",
    "migrate",
    "recount_if_due",
    "schema_problem",
]
