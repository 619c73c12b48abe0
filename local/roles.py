"""Gives each service of docker-compose.yaml a role of its own, also in databases that a superuser owns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from psycopg2 import sql
from psycopg2.extensions import encrypt_password

from router.database import Connection, connect, rows
from router.migrations import SQL_FOLDER
from router.settings import PostgresAddress

ADMINISTRATOR = "ADMIN_DATABASE_URL"
OWNER, AIRFLOW = "router_owner", "airflow"
PASSWORDS = {
    OWNER: "ROUTER_OWNER_PASSWORD", "router_app": "ROUTER_APP_PASSWORD", AIRFLOW: "AIRFLOW_DB_PASSWORD",
}  # fmt: skip
# Hands tables, sequences, views, types and functions to a role, without rewriting anything.
_HAND_OVER = """
DO $hand_over$
DECLARE
    new_owner text := current_setting('router.new_owner');
    found record;
BEGIN
    FOR found IN
        SELECT 'SCHEMA' AS kind, n.oid::regnamespace::text AS name FROM pg_namespace n
         WHERE n.nspname = 'router' AND n.nspowner <> new_owner::regrole
        UNION ALL
        SELECT CASE c.relkind WHEN 'v' THEN 'VIEW' WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END,
               c.oid::regclass::text
          FROM pg_class c
         WHERE c.relnamespace IN (to_regnamespace('public'), to_regnamespace('router'))
           AND c.relkind IN ('r', 'p', 'v', 'S') AND c.relowner <> new_owner::regrole
           AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = c.oid AND d.classid = 'pg_class'::regclass
                              AND (d.deptype = 'e' OR c.relkind = 'S' AND d.deptype IN ('a', 'i')))
        UNION ALL
        SELECT 'TYPE', t.oid::regtype::text FROM pg_type t
         WHERE t.typnamespace IN (to_regnamespace('public'), to_regnamespace('router'))
           AND t.typtype IN ('e', 'd') AND t.typowner <> new_owner::regrole
        UNION ALL
        SELECT 'ROUTINE', p.oid::regprocedure::text FROM pg_proc p
         WHERE p.pronamespace IN (to_regnamespace('public'), to_regnamespace('router'))
           AND p.proowner <> new_owner::regrole
           AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')
    LOOP
        EXECUTE format('ALTER %s %s OWNER TO %I', found.kind, found.name, new_owner);
    END LOOP;
END
$hand_over$"""


def prepare_roles(
    administrator: str, passwords: Mapping[str, str], airflow_database: str = "airflow"
) -> None:
    """Creates the roles, sets their passwords, and hands both databases to their owners. Safe to repeat."""
    with connect(administrator) as connection:
        _execute(connection, (SQL_FOLDER / "roles.sql").read_text(encoding="utf-8"))
        for role, password in passwords.items():
            _set_password(connection, role, password)
        _hand_over(connection, OWNER)
    with connect(replace(PostgresAddress.parse(administrator), database=airflow_database).url) as connection:
        _hand_over(connection, AIRFLOW)


def _set_password(connection: Connection, role: str, password: str) -> None:
    """Allows the role to log in. The server and its log get the password's hash only."""
    if not rows(connection, "SELECT FROM pg_roles WHERE rolname = %s", (role,)):
        _execute(connection, sql.SQL("CREATE ROLE {}").format(sql.Identifier(role)))
    hashed = sql.Literal(encrypt_password(password, role, connection, "scram-sha-256"))
    _execute(connection, sql.SQL("ALTER ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(role), hashed))


def _hand_over(connection: Connection, role: str) -> None:
    name = rows(connection, "SELECT current_database() AS name")[0]["name"]
    words = (sql.Identifier(name), sql.Identifier(role))
    _execute(connection, sql.SQL("ALTER DATABASE {} OWNER TO {}").format(*words))
    rows(connection, "SELECT set_config('router.new_owner', %s, true)", (role,))
    _execute(connection, _HAND_OVER)


def _execute(connection: Connection, statement: str | sql.Composable) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement)
