"""The schema `router`: functions and tables are out of reach of whoever may not create in it."""

from __future__ import annotations

import re
import threading
from typing import Any

import psycopg2
import pytest

from router.database import Connection, connect, open_pool, rows
from router.errors import SchemaError
from router.migrations import SQL_FOLDER, ProblemKind, SchemaMonitor, examine, migrate
from tests.support.queue import probing

MIGRATION = "026_schema.sql"
OUTSIDE = """
SELECT relname::text AS name FROM pg_class c
 WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v', 'S')
 UNION SELECT proname::text FROM pg_proc WHERE pronamespace = 'public'::regnamespace ORDER BY 1"""
# Functions that neither have a search path of their own nor are kept from everybody but owner and router.
EXPOSED = """
SELECT p.oid::regprocedure::text AS function
  FROM pg_proc p CROSS JOIN LATERAL aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) AS a
 WHERE p.pronamespace = 'router'::regnamespace AND a.grantee <> p.proowner
   AND a.grantee IS DISTINCT FROM to_regrole('router_app')
   AND NOT EXISTS (SELECT FROM unnest(p.proconfig) AS c WHERE c LIKE 'search_path=router, %%pg_temp')"""
DEFINERS = """
SELECT p.proname::text AS name, (SELECT c FROM unnest(p.proconfig) AS c WHERE c LIKE 'search_path=%%') AS path
  FROM pg_proc p WHERE p.pronamespace = 'router'::regnamespace AND p.prosecdef"""
# Puts the tables that the migration moves, and all functions, where versions before it had them.
MOVE_BACK = """
DO $$
DECLARE
    moved record;
BEGIN
    FOR moved IN SELECT c.oid::regclass AS name, c.relkind FROM pg_class c
                  WHERE c.relnamespace = 'router'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'S')
                    AND (c.relname IN ({names}) OR c.relname ~ '^model_calls_')
    LOOP
        EXECUTE format('ALTER %%s %%s SET SCHEMA public', CASE moved.relkind WHEN 'v' THEN 'VIEW'
                       WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, moved.name);
    END LOOP;
    FOR moved IN SELECT p.oid, p.proname FROM pg_proc p WHERE p.pronamespace = 'router'::regnamespace
    LOOP
        EXECUTE format('ALTER FUNCTION %%s SET SCHEMA public', moved.oid::regprocedure);
        EXECUTE format('ALTER FUNCTION %%s RESET search_path', moved.oid::regprocedure);
    END LOOP;
    EXECUTE format('ALTER DATABASE %%I RESET search_path', current_database());
END
$$;
ALTER TABLE tasks DROP COLUMN inserted_by;
"""


def _run(url: str, *statements: str) -> None:
    with connect(url) as connection:
        for statement in statements:
            rows(connection, statement)


def _column(url: str, statement: str) -> list[Any]:
    with connect(url) as connection:
        return [next(iter(row.values())) for row in rows(connection, statement)]


def test_nothing_but_tasks_is_outside_the_schema(bare_database: str) -> None:
    assert set(_column(bare_database, OUTSIDE)) == {"tasks", "tasks_id_seq"}


def test_every_function_has_a_search_path_or_is_out_of_reach(bare_database: str) -> None:
    assert _column(bare_database, EXPOSED) == []
    with connect(bare_database) as connection:
        paths = {row["name"]: row["path"] for row in rows(connection, DEFINERS)}
    assert "tasks_inserted" in paths
    assert set(paths.values()) == {"search_path=router, pg_temp"}


def test_what_runs_with_the_owners_rights_calls_one_function_that_sees_other_schemas(
    bare_database: str,
) -> None:
    """That one, which runs triggers of others, calls no function and compares nothing but ids."""
    calls = (
        "SELECT DISTINCT o.proname::text || ': ' || o.prosrc FROM pg_proc d"
        " JOIN pg_proc o ON o.pronamespace = d.pronamespace AND NOT o.prosecdef"
        " AND d.prosrc ~ ('\\m' || o.proname || '\\M *\\(') AND o.prosrc ~ '\\mtasks\\M'"
        " WHERE d.pronamespace = 'router'::regnamespace AND d.prosecdef"
    )
    (called,) = _column(bare_database, calls)
    assert called.startswith("fail_unusable")
    assert "(" not in called


def test_the_next_function_is_secured_as_well(bare_database: str, tmp_path: Any) -> None:
    """A function of a later version gets its path and loses PUBLIC without a word in its text."""
    _copy_sql(tmp_path)
    (tmp_path / "functions" / "99_more.sql").write_text(
        "CREATE FUNCTION more() RETURNS int LANGUAGE plpgsql SECURITY DEFINER AS 'BEGIN RETURN 7; END';"
        "CREATE FUNCTION less() RETURNS bigint LANGUAGE sql AS 'SELECT count(*) FROM tasks';"
    )
    migrate(bare_database, tmp_path)
    assert _column(bare_database, EXPOSED) == []
    paths = "SELECT proconfig FROM pg_proc WHERE proname = '{}'"
    assert _column(bare_database, paths.format("more")) == [["search_path=router, pg_temp"]]
    assert _column(bare_database, paths.format("less")) == [["search_path=router, public, pg_temp"]]


def _copy_sql(folder: Any) -> None:
    for kind in ("migrations", "functions"):
        (folder / kind).mkdir()
        for path in (SQL_FOLDER / kind).glob("*.sql"):
            (folder / kind / path.name).write_text(path.read_text())


def test_no_table_is_granted_to_public(bare_database: str) -> None:
    granted = (
        "SELECT c.relname::text FROM pg_class c CROSS JOIN LATERAL aclexplode(c.relacl) AS a"
        " WHERE a.grantee = 0 AND c.relnamespace IN ('public'::regnamespace, 'router'::regnamespace)"
    )
    assert _column(bare_database, granted) == []


# An existing database


def _moved_names() -> str:
    text = (SQL_FOLDER / "migrations" / MIGRATION).read_text()
    return ", ".join(re.findall(r"'\w+'", text.split("ARRAY[")[1].split("]")[0]))


def test_a_database_is_moved_in_place(database: str) -> None:
    """Rows, files and rights stay; nothing is rewritten; a queue of any state goes on."""
    url = database
    _run(
        url,
        "INSERT INTO tasks (prompt, category) SELECT 'p', 'general' FROM generate_series(1, 50)",
        "SELECT claim_task('m1', '{general}', 'w', '01890000-0000-7000-8000-000000000000')",
        f"DELETE FROM router_migrations WHERE name = '{MIGRATION}'",
        MOVE_BACK.replace("{names}", _moved_names()),
        "GRANT SELECT ON discovered_models, model_calls TO PUBLIC",
    )
    assert "queue" in _column(url, OUTSIDE)
    files = (
        "SELECT array_agg(c.relname || pg_relation_filenode(c.oid) ORDER BY 1) FROM pg_class c"
        " WHERE c.relname IN ('tasks', 'queue', 'roster', 'model_calls_other', 'workers')"
    )
    before = _column(url, files)

    assert migrate(url).applied == (MIGRATION,)

    assert set(_column(url, OUTSIDE)) == {"tasks", "tasks_id_seq"}
    assert _column(url, files) == before
    assert _column(url, EXPOSED) == []
    assert examine(url).ok
    settle = "SELECT settle_call('01890000-0000-7000-8000-000000000000', 'answered', 'yes')"
    assert _column(url, settle) == ["solved"]
    assert _column(url, "SELECT (unsolved, solved)::text FROM task_counts_now") == ["(49,1)"]
    reader = "SET ROLE pg_read_all_settings"  # any role without rights of its own
    with connect(url) as connection:
        rows(connection, reader)
        assert rows(connection, "SELECT * FROM discovered_models") == []
        assert rows(connection, "SELECT count(*) AS n FROM model_calls")[0]["n"] == 1
    assert migrate(url).applied == ()


def test_producers_go_on_while_a_database_is_moved(database: str) -> None:
    """Sessions that were open before insert without an error, and every task is queued."""
    _run(
        database,
        "INSERT INTO tasks (prompt, category) SELECT 'p', 'general' FROM generate_series(1, 200)",
        MOVE_BACK.replace("{names}", _moved_names()),
        f"DELETE FROM public.router_migrations WHERE name = '{MIGRATION}'",
    )
    stop = threading.Event()
    inserted, failed = [0], []

    def produce() -> None:
        with connect(database, autocommit=True) as connection:
            while not stop.is_set():
                try:
                    rows(connection, "INSERT INTO tasks (prompt, category) VALUES ('q', 'general')")
                except psycopg2.Error as error:
                    failed.append(str(error))
                    return
                inserted[0] += 1

    producers = [threading.Thread(target=produce) for _ in range(2)]
    for producer in producers:
        producer.start()
    try:
        assert migrate(database).applied == (MIGRATION,)
    finally:
        stop.set()
        for producer in producers:
            producer.join()
    assert failed == []
    assert _column(database, "SELECT count(*) FROM queue") == [200 + inserted[0]]


async def test_outside_programs_find_the_tables_by_their_names(empty_database: str) -> None:
    """Through a plain driver, whatever the database's default path was; `migrate` restores a lost default."""
    migrate(empty_database)
    async with probing(empty_database) as outside:
        assert await outside.value("SELECT count(*) FROM model_calls") == 0
        assert await outside.value("SELECT claim_task('m', '{}', 'w', gen_random_uuid())") is None
        name = await outside.value("SELECT current_database()")
        await outside.run(f'ALTER DATABASE "{name}" SET search_path = public')
    migrate(empty_database)
    async with probing(empty_database) as outside:
        assert await outside.value("SHOW search_path") == "public, router"
        await outside.run("CREATE TABLE mine (id int)")
        assert await outside.value("SELECT to_regclass('public.mine') IS NOT NULL")


async def test_the_routers_own_sessions_do_not_depend_on_the_default_path(database: str) -> None:
    name = _column(database, "SELECT current_database()")[0]
    _run(database, f'ALTER DATABASE "{name}" RESET search_path')
    with connect(database) as connection:
        assert rows(connection, "SELECT count(*) AS n FROM queue")[0]["n"] == 0
    pool = await open_pool(database, connections=1)
    assert await pool.fetchval("SELECT count(*) FROM queue") == 0
    await pool.close()


async def test_a_process_that_was_first_sees_the_schema_after_the_migration(empty_database: str) -> None:
    pool = await open_pool(empty_database, connections=1)
    monitor = SchemaMonitor()
    problem = await monitor.problem(pool)
    assert problem is not None
    assert problem.kind is ProblemKind.NOT_MIGRATED
    migrate(empty_database)
    await monitor.problem(pool)
    assert await monitor.problem(pool) is None
    await pool.close()


# Schemas that are open to others

OPEN = {
    "public as before PostgreSQL 15": ("GRANT CREATE ON SCHEMA public TO PUBLIC", "public", "PUBLIC"),
    "public to a role": ("GRANT CREATE ON SCHEMA public TO stranger", "public", '"stranger"'),
    "the router's schema": ("GRANT CREATE ON SCHEMA router TO stranger", "router", '"stranger"'),
    "another schema of the path": (
        ("CREATE SCHEMA lib; GRANT ALL ON SCHEMA lib TO stranger;"
         " SET search_path = public, lib, router"), "lib", '"stranger"',
    ),
}  # fmt: skip


@pytest.fixture
def stranger(administrator: Connection) -> str:
    if not rows(administrator, "SELECT FROM pg_roles WHERE rolname = 'stranger'"):
        rows(administrator, "CREATE ROLE stranger LOGIN")
    return "stranger"


@pytest.mark.usefixtures("stranger")
@pytest.mark.parametrize("kind", OPEN)
def test_a_schema_that_others_may_create_in_is_refused(bare_database: str, kind: str) -> None:
    grant, schema, grantee = OPEN[kind]
    if "lib" in grant:
        name = _column(bare_database, "SELECT current_database()")[0]
        grant = grant.replace("SET search_path", f'ALTER DATABASE "{name}" SET search_path')
    _run(bare_database, grant)
    with pytest.raises(SchemaError, match="Nothing was changed") as refused:
        migrate(bare_database)
    remedy = f'REVOKE CREATE ON SCHEMA "{schema}" FROM {grantee}'
    assert remedy in str(refused.value)
    found = examine(bare_database)
    assert found.refused
    assert [problem.kind for problem in found.problems] == [ProblemKind.OPEN_SCHEMA]
    _run(bare_database, remedy)
    assert migrate(bare_database).problems == ()


@pytest.mark.usefixtures("stranger")
def test_an_owner_of_tasks_who_may_not_create_a_schema_is_told_so(empty_database: str) -> None:
    """The usual rights of a role that a database administrator made for one table."""
    _run(
        empty_database,
        "CREATE TABLE tasks (id serial PRIMARY KEY, prompt text, status text DEFAULT 'unsolved')",
        "ALTER TABLE tasks OWNER TO stranger",
        "GRANT CREATE ON SCHEMA public TO stranger",
    )
    owner = empty_database.replace("postgres@", "stranger@")
    with pytest.raises(SchemaError, match=r"create the schema router.*Nothing was changed") as refused:
        migrate(owner)
    assert examine(owner).refused
    remedy = re.search("GRANT CREATE ON DATABASE[^`]*", str(refused.value))
    assert remedy is not None
    _run(empty_database, remedy[0])
    assert migrate(owner).problems == ()
    with connect(owner) as connection:  # it does not own the database: the default path is its own
        assert rows(connection, "SHOW search_path")[0]["search_path"] == '"$user", public, router'


@pytest.mark.usefixtures("stranger")
def test_a_schema_of_somebody_else_is_refused(empty_database: str) -> None:
    name = _column(empty_database, "SELECT current_database()")[0]
    _run(
        empty_database,
        "DO $$ BEGIN CREATE ROLE plain_owner LOGIN; EXCEPTION WHEN duplicate_object THEN END $$",
    )
    _run(
        empty_database,
        f'ALTER DATABASE "{name}" OWNER TO plain_owner',
        "CREATE SCHEMA router AUTHORIZATION stranger",
    )
    with pytest.raises(SchemaError, match=r"router belongs to stranger.*Nothing was changed"):
        migrate(empty_database.replace("postgres@", "plain_owner@"))
