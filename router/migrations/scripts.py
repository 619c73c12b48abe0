"""SQL scripts of this version: the numbered migrations, and all functions as one script.

A migration runs once and never changes. The functions run again whenever their text changes, or when the
database lacks a trigger or view that they create.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from router.errors import SchemaError
from router.settings import ROOT

SQL_FOLDER = ROOT / "sql"
FUNCTIONS = "functions"
SCHEMA_MIGRATION = "026_schema.sql"  # creates the schema `router`
_TRIGGER = re.compile(
    r"^CREATE OR REPLACE TRIGGER (\w+)[^;]*? ON tasks\b[^;]*?EXECUTE FUNCTION (\w+)\(\)", re.MULTILINE
)
_VIEW = re.compile(r"^CREATE OR REPLACE VIEW (\w+) AS([^;]*);", re.MULTILINE)
_ALTER_TASKS = re.compile(r"^ALTER TABLE tasks\b([^;]*);", re.MULTILINE)
_ADD_COLUMN = re.compile(r"ADD COLUMN IF NOT EXISTS (\w+) (\w+)")
_READS_TASKS = re.compile(r"\b(?:FROM|JOIN) tasks\b")


class Script(NamedTuple):
    """One SQL script; `router_migrations` stores its name and checksum once it was applied."""

    name: str
    text: str
    checksum: str


@dataclass(frozen=True, slots=True)
class AddedColumn:
    """Column that a migration adds to `tasks`."""

    type: str
    migration: str


@dataclass(frozen=True, slots=True)
class ExpectedSchema:
    """Schema of this version: checksums by script, columns, functions by trigger, and views of `tasks`."""

    checksums: Mapping[str, str]
    columns: Mapping[str, AddedColumn]
    triggers: Mapping[str, str]
    task_views: frozenset[str]


def expected_schema(folder: Path = SQL_FOLDER) -> ExpectedSchema:
    """Reads the schema that the scripts in `folder` create."""
    functions = functions_script(folder)
    migrations = migration_scripts(folder)
    scripts = [*migrations, functions]
    return ExpectedSchema(
        checksums={script.name: script.checksum for script in scripts},
        columns={
            name: AddedColumn(type_name, script.name)
            for script in migrations
            for statement in _ALTER_TASKS.findall(re.sub("--.*", "", script.text))
            for name, type_name in _ADD_COLUMN.findall(statement)
        },
        triggers=dict(_TRIGGER.findall(functions.text)),
        task_views=frozenset(
            name for name, text in _VIEW.findall(functions.text) if _READS_TASKS.search(text)
        ),
    )


def migration_scripts(folder: Path) -> list[Script]:
    """Returns all migrations in the order of their numbers."""
    paths = sorted((folder / "migrations").glob("*.sql"))
    return [_script(path.name, path.read_text(encoding="utf-8")) for path in paths]


def functions_script(folder: Path) -> Script:
    """Returns the functions as one script."""
    paths = sorted((folder / "functions").glob("*.sql"))
    return _script(FUNCTIONS, "\n".join(path.read_text(encoding="utf-8") for path in paths))


def new_migrations(folder: Path, applied: Mapping[str, str]) -> Iterator[Script]:
    """Yields the migrations that are not applied yet. Raises SchemaError if an applied one was changed."""
    for script in migration_scripts(folder):
        if script.name not in applied:
            yield script
        elif applied[script.name] != script.checksum:
            raise SchemaError(
                f"{script.name} was changed after it was applied. Write a new migration instead."
            )


def _script(name: str, text: str) -> Script:
    return Script(name, text, hashlib.sha256(text.encode()).hexdigest())
