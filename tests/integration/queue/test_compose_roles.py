"""Roles of docker-compose.yaml: set up on new databases, and on those that a superuser has owned so far."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from local.postgres import PostgresServer
from local.roles import PASSWORDS, prepare_roles
from router.database import Connection, connect, rows
from router.migrations import examine, migrate

SECRETS = {role: f"password-of-{role}" for role in PASSWORDS}
STRANGERS = """
SELECT c.oid::regclass::text AS name FROM pg_class c
 WHERE c.relnamespace IN ('public'::regnamespace, to_regnamespace('router'))
   AND c.relowner <> (SELECT d.datdba FROM pg_database d WHERE d.datname = current_database())
 UNION SELECT p.oid::regprocedure::text FROM pg_proc p
 WHERE p.pronamespace = to_regnamespace('router')
   AND p.proowner <> (SELECT d.datdba FROM pg_database d WHERE d.datname = current_database())"""


@pytest.fixture
def airflow_database(postgres: PostgresServer, administrator: Connection) -> Iterator[str]:
    name = f"compose_airflow_{os.getpid()}"
    url = postgres.create_database(name)
    with connect(url) as connection:
        rows(connection, "CREATE TYPE state AS ENUM ('up'); CREATE TABLE job (id serial, state state)")
    yield name
    rows(administrator, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.mark.parametrize("kind", ["new", "of a superuser"])
def test_databases_are_handed_to_their_owners(
    kind: str, empty_database: str, postgres: PostgresServer, airflow_database: str
) -> None:
    if kind != "new":
        migrate(empty_database)
        with connect(empty_database) as connection:
            rows(connection, "INSERT INTO tasks (prompt) VALUES ('p')")
    for _ in range(2):
        prepare_roles(empty_database, SECRETS, airflow_database)
        owner = empty_database.replace("postgres@", "router_owner@")
        assert migrate(owner, roles=True).problems == ()
    for url in (empty_database, postgres.url(airflow_database)):
        with connect(url) as connection:
            assert rows(connection, STRANGERS) == []
    app = empty_database.replace("postgres@", "router_app@")
    assert examine(app).ok
    with connect(app) as connection:
        rows(connection, "INSERT INTO tasks (prompt) VALUES ('q')")
        found = rows(connection, "SELECT count(*) AS n FROM queue")
    assert found[0]["n"] == (1 if kind == "new" else 2)
    with connect(empty_database) as connection:
        hashed = (
            "SELECT bool_and(rolpassword LIKE 'SCRAM-SHA-256$%%') AS all FROM pg_authid"
            " WHERE rolname = ANY (%s)"
        )
        assert rows(connection, hashed, (list(PASSWORDS),))[0]["all"]
