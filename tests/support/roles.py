"""A database with the roles of sql/roles.sql, and one login for each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from psycopg2 import sql

from local.postgres import PostgresServer
from router.database import Connection, connect, rows
from router.migrations import SQL_FOLDER, migrate
from router.models import sync_roster
from router.settings import load_config
from tests.support.queue import without_classification

LOGINS = {
    "app": "router_app",
    "alice": "router_producer",
    "bob": "router_producer",
    "reader": "router_reader",
}


@dataclass(frozen=True)
class RolesDatabase:
    """URLs of one database, by login. `superuser` is for what a test prepares; the owner is not one."""

    superuser: str

    def url(self, login: str) -> str:
        """Returns the URL of `owner`, `app`, `reader`, or of the producers `alice` and `bob`."""
        role = "router_owner" if login == "owner" else f"login_{login}"
        return self.superuser.replace("postgres@", f"{role}@")


def apply_roles(url: str) -> None:
    """Runs roles.sql as psql does."""
    with connect(url, autocommit=True) as connection, connection.cursor() as cursor:
        cursor.execute((SQL_FOLDER / "roles.sql").read_text())


@pytest.fixture(scope="session")
def roles_template(postgres: PostgresServer, administrator: Connection) -> str:
    """Name of a template database that router_owner has migrated, with the roles and the shipped config."""
    name = f"roles_{os.getpid()}"
    apply_roles(postgres.url("postgres"))
    rows(administrator, "ALTER ROLE router_owner LOGIN")
    for login, role in LOGINS.items():
        rows(administrator, f"CREATE ROLE login_{login} LOGIN IN ROLE {role}")
    rows(administrator, f"CREATE DATABASE {name} OWNER router_owner")
    owner = RolesDatabase(postgres.url(name)).url("owner")
    migrate(owner, roles=True)
    with connect(owner) as connection:
        sync_roster(connection, without_classification(load_config()))
    return name


@pytest.fixture
def roles_database(
    postgres: PostgresServer, administrator: Connection, roles_template: str
) -> Iterator[RolesDatabase]:
    """A new database with the roles and no task."""
    name = f"{roles_template}_copy"
    words = {"name": sql.Identifier(name), "template": sql.Identifier(roles_template)}
    with administrator.cursor() as cursor:
        for statement in (
            "CREATE DATABASE {name} OWNER router_owner TEMPLATE {template} STRATEGY file_copy",
            'ALTER DATABASE {name} SET search_path = "$user", public, router',
        ):
            cursor.execute(sql.SQL(statement).format(**words))
        yield RolesDatabase(postgres.url(name))
        cursor.execute(sql.SQL("DROP DATABASE {name} WITH (FORCE)").format(**words))
