"""State of a database's schema, read from the system catalogs in about a millisecond."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import asyncpg

from router.database import Connection, fetch_one, rows

# Without parameters and functions of the router: both drivers run it, on any database.
_FACTS = """
SELECT current_setting('server_encoding') AS encoding, current_user::text AS role,
       to_regclass('router_migrations') IS NOT NULL AS migrated,
       c.relkind::text AS kind, c.relname IS NOT NULL AND row_security_active(c.oid) AND (
           NOT EXISTS (SELECT FROM pg_policy p
                        WHERE p.polrelid = c.oid AND p.polpermissive AND p.polcmd = '*'
                          AND EXISTS (SELECT FROM unnest(p.polroles) AS r (oid)
                                       WHERE r.oid = 0 OR pg_has_role(r.oid, 'USAGE'))
                          AND pg_get_expr(p.polqual, p.polrelid) = 'true' AND p.polwithcheck IS NULL)
           OR EXISTS (SELECT FROM pg_policy p CROSS JOIN unnest(p.polroles) AS r (oid)
                       WHERE p.polrelid = c.oid AND NOT p.polpermissive
                         AND (r.oid = 0 OR pg_has_role(r.oid, 'USAGE')))) AS rows_hidden,
       pg_has_role(c.relowner, 'USAGE') AS owned, c.relowner::regrole::text AS owner,
       n.nspname::text AS schema,
       (SELECT has_table_privilege(q.oid, 'DELETE')
          FROM pg_class q JOIN pg_namespace s ON s.oid = q.relnamespace
         WHERE s.nspname = 'router' AND q.relname = 'queue') AS may_work,
       has_schema_privilege(coalesce(n.oid, current_schema()::regnamespace), 'CREATE') AS may_create,
       current_database()::text AS database,
       has_database_privilege(current_database(), 'CREATE') AS may_create_schema,
       -- Schemas in which strangers may create: PUBLIC by default before PostgreSQL 15. They could put
       -- something in the place of functions and tables of the router.
       (SELECT jsonb_agg(DISTINCT jsonb_build_array(s.nspname, coalesce(r.rolname, 'PUBLIC')))
          FROM pg_namespace s
         CROSS JOIN LATERAL aclexplode(s.nspacl) AS a
          LEFT JOIN pg_roles r ON r.oid = a.grantee
         WHERE (s.oid = n.oid OR s.nspname = 'router' OR s.nspname = ANY (current_schemas(false)))
           AND s.nspname !~ '^pg_' AND a.privilege_type = 'CREATE' AND a.grantee <> s.nspowner
           AND (r.oid IS NULL OR NOT (r.rolsuper OR r.rolname IN (current_user, 'pg_database_owner')
                                      OR pg_has_role(r.oid, coalesce(c.relowner, s.nspowner), 'MEMBER')))
       )::text AS open_schemas,
       (SELECT s.nspowner::regrole::text FROM pg_namespace s
         WHERE s.nspname = 'router' AND NOT pg_has_role(s.nspowner, 'USAGE')) AS schema_owner,
       EXISTS (SELECT FROM pg_inherits i WHERE i.inhparent = c.oid OR i.inhrelid = c.oid) AS inherits,
       EXISTS (SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'id'
                WHERE i.indrelid = c.oid AND i.indisunique AND i.indpred IS NULL AND i.indisvalid
                  AND i.indnkeyatts = 1 AND i.indkey[0] = a.attnum) AS id_is_unique,
       EXISTS (SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'external_id'
                WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid
                  AND i.indnkeyatts = 1 AND i.indkey[0] = a.attnum) AS external_id_is_unique,
       EXISTS (SELECT FROM pg_constraint k WHERE k.conrelid = c.oid AND k.conname = 'tasks_status_known')
           AS status_is_checked,
       (SELECT jsonb_object_agg(a.attname, jsonb_build_object(
                   'type', format_type(a.atttypid, a.atttypmod),
                   'not_null', a.attnotnull OR y.typnotnull,
                   'has_default', a.atthasdef OR a.attidentity <> '' OR y.typdefault IS NOT NULL))
          FROM pg_attribute a JOIN pg_type y ON y.oid = a.atttypid
         WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped)::text AS columns,
       (SELECT jsonb_object_agg(t.tgname, jsonb_build_object(
                   'function', p.proname, 'enabled', t.tgenabled IN ('O', 'A')))
          FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
         WHERE t.tgrelid = c.oid AND NOT t.tgisinternal)::text AS triggers,
       (SELECT jsonb_agg(DISTINCT v.relname)
          FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid JOIN pg_class v ON v.oid = r.ev_class
         WHERE d.classid = 'pg_rewrite'::regclass AND d.refclassid = 'pg_class'::regclass
           AND d.refobjid = c.oid)::text AS views
  FROM (SELECT to_regclass('tasks') AS oid) AS found
  LEFT JOIN pg_class c ON c.oid = found.oid
  LEFT JOIN pg_namespace n ON n.oid = c.relnamespace"""
_CHECKSUMS = "SELECT jsonb_object_agg(name, checksum)::text AS checksums FROM router_migrations"


@dataclass(frozen=True, slots=True)
class Column:
    """A column of `tasks`."""

    type: str
    not_null: bool
    has_default: bool


@dataclass(frozen=True, slots=True)
class Trigger:
    """A trigger of `tasks`, and whether it fires."""

    function: str
    enabled: bool


@dataclass(frozen=True, slots=True)
class SchemaFacts:
    """State of a database's schema. `kind` of the relation `tasks` is None if there is none, `r` for a table.

    `applied`: checksums by script; None if `router migrate` never ran. `rows_hidden`: row level security
    hides rows of `tasks` from the connected role. `may_work`: the role may run the engine without owning
    anything. `open_schemas`: pairs of a schema that functions use and a role that may create in it.
    `schema_owner`: owner of the schema `router`, if it is a stranger.
    """

    encoding: str
    role: str
    applied: Mapping[str, str] | None
    kind: str | None
    schema: str | None
    owner: str | None
    owned: bool
    may_create: bool
    database: str
    may_create_schema: bool
    rows_hidden: bool
    may_work: bool
    open_schemas: tuple[tuple[str, str], ...]
    schema_owner: str | None
    inherits: bool
    id_is_unique: bool
    external_id_is_unique: bool
    status_is_checked: bool
    columns: Mapping[str, Column]
    triggers: Mapping[str, Trigger]
    views: frozenset[str]


def read_facts(connection: Connection) -> SchemaFacts:
    """Reads the state of the schema."""
    row = rows(connection, _FACTS)[0]
    return _facts(row, rows(connection, _CHECKSUMS)[0]["checksums"] if row["migrated"] else None)


async def fetch_facts(pool: asyncpg.Pool) -> SchemaFacts:
    """Reads the state of the schema. Raises DatabaseError."""
    row = await fetch_one(pool, _FACTS)
    return _facts(row, (await fetch_one(pool, _CHECKSUMS))["checksums"] if row["migrated"] else None)


def _facts(row: Mapping[str, Any], checksums: str | None) -> SchemaFacts:
    return SchemaFacts(
        encoding=row["encoding"],
        role=row["role"],
        applied=json.loads(checksums or "{}") if row["migrated"] else None,
        kind=row["kind"],
        schema=row["schema"],
        owner=row["owner"],
        owned=bool(row["owned"]),
        may_create=bool(row["may_create"]),
        database=row["database"],
        may_create_schema=bool(row["may_create_schema"]),
        rows_hidden=bool(row["rows_hidden"]),
        may_work=bool(row["may_work"]),
        open_schemas=tuple((schema, role) for schema, role in json.loads(row["open_schemas"] or "[]")),
        schema_owner=row["schema_owner"],
        inherits=bool(row["inherits"]),
        id_is_unique=bool(row["id_is_unique"]),
        external_id_is_unique=bool(row["external_id_is_unique"]),
        status_is_checked=bool(row["status_is_checked"]),
        columns={name: Column(**column) for name, column in json.loads(row["columns"] or "{}").items()},
        triggers={name: Trigger(**trigger) for name, trigger in json.loads(row["triggers"] or "{}").items()},
        views=frozenset(json.loads(row["views"] or "[]")),
    )
