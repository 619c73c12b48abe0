"""Compares a database's schema with the expected one: one problem per difference, with its remedy. Pure."""

from __future__ import annotations

import enum
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from router.migrations.facts import Column, SchemaFacts
from router.migrations.scripts import FUNCTIONS, SCHEMA_MIGRATION, ExpectedSchema


class ProblemKind(str, enum.Enum):
    """Kinds of problems, in the order in which they are reported."""

    ENCODING = "encoding"
    NOT_MIGRATED = "not_migrated"  # `router migrate` never ran
    ROWS_HIDDEN = "rows_hidden"  # by row level security
    PRIVILEGES = "privileges"
    OPEN_SCHEMA = "open_schema"  # others may create in a schema that functions use
    TABLE = "table"  # kind, columns or key of `tasks`
    MIGRATIONS_PENDING = "migrations_pending"  # the database is older than the program
    OUTDATED = "outdated"  # the program is older than the database
    TRIGGERS = "triggers"  # of `tasks`
    REPAIRABLE = "repairable"  # defaults, an index or a view, which `router migrate` restores
    INSERTS = "inserts"  # load, ask and serve cannot insert
    WRITES = "writes"  # a constraint or another trigger rejects or changes the router's writes


@dataclass(frozen=True, slots=True)
class SchemaProblem:
    """One problem of the schema, and what to do. Contains no value of any row.

    `names`: the triggers that are missing.
    """

    kind: ProblemKind
    text: str
    remedy: str
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.text} {self.remedy}"


# Problems with which tasks are not sent as they should be.
STOP_WORK = frozenset({
    ProblemKind.ENCODING, ProblemKind.NOT_MIGRATED, ProblemKind.ROWS_HIDDEN, ProblemKind.TABLE,
    ProblemKind.MIGRATIONS_PENDING, ProblemKind.OUTDATED, ProblemKind.TRIGGERS,
})  # fmt: skip
REPAIRED_BY_MIGRATE = frozenset({
    ProblemKind.NOT_MIGRATED, ProblemKind.MIGRATIONS_PENDING, ProblemKind.TRIGGERS, ProblemKind.REPAIRABLE,
})  # fmt: skip

_TEXT = ("text", "character varying")
_TIME = ("timestamp with time zone",)
# Types of columns that work as well as the one that a migration creates, which comes first.
_TYPES: Mapping[str, tuple[str, ...]] = {
    "id": ("bigint", "integer"),
    "prompt": _TEXT,
    "status": _TEXT,
    "priority": ("integer", "smallint", "bigint"),
    "max_tokens": ("integer", "bigint"),
    "answer_rank": ("smallint", "integer"),
    "created_at": (*_TIME, "timestamp without time zone"),
}
_ALIASES = {"text": _TEXT, "timestamptz": _TIME}
_ORIGINAL_COLUMNS = ("id", "prompt", "status")  # the others are added by `router migrate`
_MAY_BE_NOT_NULL = frozenset(
    {*_ORIGINAL_COLUMNS, "answer", "priority", "prompt_version", "created_at", "client"}
)
_DEFAULTS = ("status", "prompt_version", "created_at", "client", "inserted_by")
_KINDS = {
    "v": "a view", "m": "a materialized view", "p": "a partitioned table", "f": "a foreign table",
}  # fmt: skip
_CONVERSIONS = {
    "timestamp without time zone": "timestamptz USING {name} AT TIME ZONE 'UTC'",
    "smallint": "bigint",
}
CREATE_UTF8 = (
    "Copy it into one that is UTF8: `createdb --template template0 --encoding UTF8 NEW`, then"
    " `pg_dump OLD | psql NEW`."
)


def schema_problems(
    facts: SchemaFacts, expected: ExpectedSchema, defaults: Collection[str] | None
) -> list[SchemaProblem]:
    """Returns the problems by kind, the most severe first.

    `defaults`: columns of `tasks` for which the config has a value; None leaves out what stops only the
    router's own inserts.
    """
    return [
        *_encoding(facts),
        *_versions(facts, expected),
        *_access(facts),
        *(_table(facts, expected) if facts.kind == "r" else _kind(facts)),
        *(_parts(facts, expected) if facts.kind == "r" and facts.applied else ()),
        *(() if defaults is None else _inserts(facts, {*_ORIGINAL_COLUMNS, *expected.columns}, defaults)),
    ]


def _encoding(facts: SchemaFacts) -> Iterator[SchemaProblem]:
    if facts.encoding != "UTF8":
        yield SchemaProblem(
            ProblemKind.ENCODING,
            f"The database's encoding is {facts.encoding}, which cannot store every prompt and answer;"
            " the router needs UTF8.",
            CREATE_UTF8,
        )


def _versions(facts: SchemaFacts, expected: ExpectedSchema) -> Iterator[SchemaProblem]:
    if not facts.applied:
        yield SchemaProblem(
            ProblemKind.NOT_MIGRATED,
            "This database does not have the router's tables yet.",
            "Run `router migrate`.",
        )
        return
    if unknown := sorted(facts.applied.keys() - expected.checksums.keys()):
        yield SchemaProblem(
            ProblemKind.OUTDATED,
            f"The database was migrated by a newer version of the router ({unknown[-1]}).",
            "Update this installation and restart its processes.",
        )
    elif pending := sorted(expected.checksums.keys() - facts.applied.keys()):
        yield SchemaProblem(
            ProblemKind.MIGRATIONS_PENDING,
            f"The database is older than this version of the router: {', '.join(pending)} to apply.",
            "Run `router migrate`.",
        )
    elif facts.applied.get(FUNCTIONS) != expected.checksums[FUNCTIONS]:
        yield SchemaProblem(
            ProblemKind.MIGRATIONS_PENDING,
            "The SQL functions of the database are those of another version of the router.",
            "Run `router migrate` with the newest version, and restart older processes.",
        )


def _access(facts: SchemaFacts) -> Iterator[SchemaProblem]:
    if facts.rows_hidden:
        yield SchemaProblem(
            ProblemKind.ROWS_HIDDEN,
            f"Row level security hides rows of tasks from the role {facts.role}.",
            f"Use `ALTER TABLE tasks NO FORCE ROW LEVEL SECURITY` if {facts.role} owns the table, or"
            f" `ALTER ROLE {facts.role} BYPASSRLS`.",
        )
    yield from _ownership(facts)
    yield from _open_schemas(facts)


def _ownership(facts: SchemaFacts) -> Iterator[SchemaProblem]:
    if facts.may_work:
        return
    if facts.kind is not None and not facts.owned:
        yield SchemaProblem(
            ProblemKind.PRIVILEGES,
            f"The role {facts.role} does not own tasks; {facts.owner} does.",
            f"Run `ALTER TABLE tasks OWNER TO {facts.role}`, or connect as a member of {facts.owner}.",
        )
    if not facts.may_create:
        schema = facts.schema or "the first schema of search_path"
        yield SchemaProblem(
            ProblemKind.PRIVILEGES,
            f"The role {facts.role} may not create tables in {schema}.",
            f"Run `GRANT CREATE ON SCHEMA {facts.schema or 'NAME'} TO {facts.role}`.",
        )
    if not facts.may_create_schema and SCHEMA_MIGRATION not in (facts.applied or ()):
        yield SchemaProblem(
            ProblemKind.PRIVILEGES,
            f"The role {facts.role} may not create the schema router.",
            f'Run `GRANT CREATE ON DATABASE "{facts.database}" TO {facts.role}` as its owner.',
        )


def _open_schemas(facts: SchemaFacts) -> Iterator[SchemaProblem]:
    if facts.schema_owner is not None and not facts.may_work:
        yield SchemaProblem(
            ProblemKind.OPEN_SCHEMA,
            f"The schema router belongs to {facts.schema_owner}, who may replace functions in it.",
            f'Run `ALTER SCHEMA router OWNER TO "{facts.role}"`.',
        )
    for schema, role in facts.open_schemas:
        grantee = role if role == "PUBLIC" else f'"{role}"'
        yield SchemaProblem(
            ProblemKind.OPEN_SCHEMA,
            f"{grantee} may create objects in the schema {schema}, which could stand in for functions of the"
            " router.",
            f'Run `REVOKE CREATE ON SCHEMA "{schema}" FROM {grantee}`.',
        )


def _kind(facts: SchemaFacts) -> Iterator[SchemaProblem]:
    if facts.kind is not None:
        yield SchemaProblem(
            ProblemKind.TABLE,
            f"tasks is not an ordinary table but {_KINDS.get(facts.kind, 'another kind of relation')}.",
            "Rename it, or point the router at another database or schema.",
        )
    elif facts.applied:
        yield SchemaProblem(
            ProblemKind.TABLE,
            "The table tasks is missing, or not in a schema of search_path.",
            "Restore it, or set search_path for the role.",
        )


def _table(facts: SchemaFacts, expected: ExpectedSchema) -> Iterator[SchemaProblem]:
    if facts.inherits:
        yield SchemaProblem(
            ProblemKind.TABLE,
            "tasks is a partition, or part of an inheritance hierarchy.",
            "Triggers do not fire for rows that are written through another table of it. Use `ALTER TABLE ..."
            " NO INHERIT` or `DETACH PARTITION`, or another table.",
        )
    for name in (*_ORIGINAL_COLUMNS, *expected.columns):
        types = _types(name, expected)
        column = facts.columns.get(name)
        if column is None:
            if name in _ORIGINAL_COLUMNS or expected.columns[name].migration in (facts.applied or ()):
                yield _column_missing(name, types)
        elif _base(column.type) not in types:
            yield _column_type(name, column, types)
        elif column.not_null and name not in _MAY_BE_NOT_NULL:
            yield SchemaProblem(
                ProblemKind.TABLE,
                f"tasks.{name} is NOT NULL, but the router stores NULL there.",
                f"Run `ALTER TABLE tasks ALTER COLUMN {name} DROP NOT NULL`.",
            )
    if "id" in facts.columns and not facts.id_is_unique:
        yield SchemaProblem(
            ProblemKind.TABLE,
            "tasks.id is neither primary key nor unique.",
            "Run `ALTER TABLE tasks ADD PRIMARY KEY (id)`.",
        )


def _types(name: str, expected: ExpectedSchema) -> tuple[str, ...]:
    if name in _TYPES:
        return _TYPES[name]
    created = expected.columns[name].type
    return _ALIASES.get(created, (created,))


def _column_missing(name: str, types: Collection[str]) -> SchemaProblem:
    return SchemaProblem(
        ProblemKind.TABLE,
        f"tasks.{name} is missing.",
        "If it was renamed, rename it back; otherwise run"
        f" `ALTER TABLE tasks ADD COLUMN {name} {next(iter(types))}`.",
    )


def _column_type(name: str, column: Column, types: tuple[str, ...]) -> SchemaProblem:
    new = _CONVERSIONS.get(column.type, f"{types[0]} USING {name}::{types[0]}").format(name=name)
    if name == "id" and column.type != "smallint":
        remedy = "Rename the column, and add `id bigint GENERATED BY DEFAULT AS IDENTITY UNIQUE`."
    elif name == "status":
        remedy = (
            "Run `ALTER TABLE tasks ALTER COLUMN status DROP DEFAULT,"
            " ALTER COLUMN status TYPE text USING status::text`."
        )
    else:
        remedy = f"Rename the column, or run `ALTER TABLE tasks ALTER COLUMN {name} TYPE {new}`."
    return SchemaProblem(
        ProblemKind.TABLE, f"tasks.{name} is {column.type}, and must be {' or '.join(types)}.", remedy
    )


def _base(type_name: str) -> str:
    return re.sub(r"\(\d+\)", "", type_name)


def _parts(facts: SchemaFacts, expected: ExpectedSchema) -> Iterator[SchemaProblem]:
    lost = sorted(
        name
        for name, function in expected.triggers.items()
        if (found := facts.triggers.get(name)) is None or not found.enabled or found.function != function
    )
    if lost:
        yield SchemaProblem(
            ProblemKind.TRIGGERS,
            f"Triggers of tasks are missing or disabled: {', '.join(lost)}. New and changed tasks are"
            " queued only by the slow reconciliation, and counters are wrong.",
            "Run `router migrate`, which restores them.",
            tuple(lost),
        )
    others = [f"the default of {name}" for name in _DEFAULTS if not _has_default(facts, name)]
    others += [f"the view {name}" for name in sorted(expected.task_views - facts.views)]
    if not facts.external_id_is_unique and "external_id" in facts.columns:
        others.append("the unique index of external_id")
    if not facts.status_is_checked:
        others.append("the constraint tasks_status_known")
    if others:
        yield SchemaProblem(
            ProblemKind.REPAIRABLE,
            f"tasks lacks {', '.join(others)}.",
            "Run `router migrate`, which restores them.",
        )


def _has_default(facts: SchemaFacts, name: str) -> bool:
    return name not in facts.columns or facts.columns[name].has_default


def _inserts(facts: SchemaFacts, own: Collection[str], defaults: Collection[str]) -> Iterator[SchemaProblem]:
    """Problems of tasks that the router inserts. `own`: columns that it sets itself."""
    yield from _unknown_defaults(facts, own, defaults)
    yield from _without_value(facts, own, defaults)


def _unknown_defaults(
    facts: SchemaFacts, own: Collection[str], defaults: Collection[str]
) -> Iterator[SchemaProblem]:
    for name in sorted(defaults):
        if name in own or (facts.kind == "r" and name not in facts.columns):
            why = "the router sets that column itself" if name in own else "tasks has no such column"
            yield SchemaProblem(
                ProblemKind.INSERTS,
                f"tasks.defaults.{name} of config/models.yaml cannot be used: {why}.",
                "Remove the key.",
            )


def _without_value(
    facts: SchemaFacts, own: Collection[str], defaults: Collection[str]
) -> Iterator[SchemaProblem]:
    lacking = sorted(
        name
        for name, column in facts.columns.items()
        if column.not_null and not column.has_default and name not in defaults
        and (name == "id" or name not in own)
    )  # fmt: skip
    if "id" in lacking:
        lacking.remove("id")
        yield SchemaProblem(
            ProblemKind.INSERTS,
            "tasks.id has no default, so `router load`, `ask` and `serve` cannot insert tasks.",
            "Run `ALTER TABLE tasks ALTER COLUMN id ADD GENERATED BY DEFAULT AS IDENTITY`, then `SELECT"
            " setval(pg_get_serial_sequence('tasks', 'id'), (SELECT coalesce(max(id), 0) + 1 FROM tasks))`.",
        )
    if lacking:
        one = lacking[0]
        yield SchemaProblem(
            ProblemKind.INSERTS,
            f"Columns of tasks are NOT NULL and have no default: {', '.join(lacking)}."
            " `router load`, `ask` and `serve` cannot insert tasks.",
            f"Set a value for each in config/models.yaml (`tasks: {{defaults: {{{one}: ...}}}}`), or"
            f" `ALTER TABLE tasks ALTER COLUMN {one} SET DEFAULT ...`.",
        )
