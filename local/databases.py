"""The databases `router` and `airflow` of a stack, each owned by a role of the same name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import psycopg2
import psycopg2.extensions
from psycopg2 import sql

from local.postgres import PostgresServer

NAMES = ("router", "airflow")


def accepts_connections(server: PostgresServer) -> bool:
    """Returns whether the server accepts connections on its socket."""
    try:
        psycopg2.connect(server.url("postgres"), connect_timeout=5).close()
    except psycopg2.OperationalError:
        return False
    return True


def prepare(server: PostgresServer, password: str) -> None:
    """Creates missing roles and databases, and sets the password of the roles."""
    with _superuser(server) as cursor:
        for name in NAMES:
            if not _exists(cursor, "pg_roles", "rolname", name):
                cursor.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
            command = sql.SQL("ALTER ROLE {} PASSWORD {}")
            cursor.execute(command.format(sql.Identifier(name), sql.Literal(password)))
            if not _exists(cursor, "pg_database", "datname", name):
                cursor.execute(sql.SQL("CREATE DATABASE {0} OWNER {0}").format(sql.Identifier(name)))


def comment(server: PostgresServer, name: str) -> str | None:
    """Returns the comment on a database, which is stored with the data."""
    with _superuser(server) as cursor:
        cursor.execute(
            "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = %s", (name,)
        )
        row = cursor.fetchone()
        return None if row is None else row[0]


def set_comment(server: PostgresServer, name: str, text: str) -> None:
    """Sets the comment on a database."""
    with _superuser(server) as cursor:
        cursor.execute(
            sql.SQL("COMMENT ON DATABASE {} IS {}").format(sql.Identifier(name), sql.Literal(text))
        )


def _exists(cursor: Any, table: str, column: str, name: str) -> bool:
    query = sql.SQL("SELECT 1 FROM {} WHERE {} = {}")
    cursor.execute(query.format(sql.Identifier(table), sql.Identifier(column), sql.Literal(name)))
    return cursor.fetchone() is not None


@contextlib.contextmanager
def _superuser(server: PostgresServer) -> Iterator[psycopg2.extensions.cursor]:
    connection = psycopg2.connect(server.url("postgres"))
    connection.autocommit = True  # CREATE DATABASE cannot be in a transaction
    try:
        with connection.cursor() as cursor:
            yield cursor
    finally:
        connection.close()
