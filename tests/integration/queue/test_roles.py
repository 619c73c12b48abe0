"""The roles of sql/roles.sql: a producer only produces, a reader reads, the router runs without owning."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest

from local.postgres import PostgresServer
from router.database import connect, open_pool, rows
from router.errors import SchemaError
from router.migrations import blocking_problem, examine, migrate, schema_problem
from router.models import sync_roster
from router.queue import NewTask, TaskQueue, enqueue, retry_failed
from router.settings import load_config
from router.task import CallResult, Outcome
from tests.support.queue import Probe, probing
from tests.support.roles import RolesDatabase, apply_roles

# Columns that a producer may write; each other column of `tasks` is the router's, and sql/roles.sql lists it.
PRODUCERS = {
    "prompt",
    "request",
    "status",
    "category",
    "priority",
    "external_id",
    "max_tokens",
    "deadline_at",
    "client",
}
REFUSED = (asyncpg.InsufficientPrivilegeError, asyncpg.FeatureNotSupportedError)
OPEN_PUBLIC = "GRANT CREATE ON SCHEMA public TO PUBLIC"  # the default before PostgreSQL 15


@pytest.fixture(params=["PostgreSQL 15 and later", "rights of PostgreSQL 14"])
def any_rights(request: pytest.FixtureRequest, roles_database: RolesDatabase) -> RolesDatabase:
    """The database with the default rights on `public` of today, and with those of PostgreSQL 14."""
    if request.param != "PostgreSQL 15 and later":
        with connect(roles_database.superuser) as connection:
            rows(connection, OPEN_PUBLIC)
    return roles_database


async def _solve(database: RolesDatabase, answer: str = "an answer") -> int:
    """Solves all tasks as the router's role; returns how many."""
    pool = await open_pool(database.url("app"), connections=2)
    queue = TaskQueue(pool, host="here")
    await queue.renew_lease()
    solved = 0
    while claim := await queue.claim("llama-3.3-70b", ["general", "technical", "creative"], max_tokens=100):
        await queue.settle(claim, CallResult(Outcome.ANSWERED, answer=answer))
        solved += 1
    await pool.close()
    return solved


# What each role does


def test_producers_write_these_columns(roles_database: RolesDatabase) -> None:
    with connect(roles_database.superuser) as connection:
        columns = rows(
            connection,
            "SELECT attname::text AS name,"
            " has_column_privilege('login_alice', attrelid, attnum, 'INSERT') AS i,"
            " has_column_privilege('login_alice', attrelid, attnum, 'UPDATE') AS u FROM pg_attribute"
            " WHERE attrelid = 'tasks'::regclass AND attnum > 0 AND NOT attisdropped",
        )
    assert {column["name"] for column in columns if column["i"]} == PRODUCERS
    assert {column["name"] for column in columns if column["u"]} == PRODUCERS


async def test_a_producer_inserts_reads_edits_and_cancels_its_tasks(any_rights: RolesDatabase) -> None:
    async with probing(any_rights.url("alice")) as alice:
        first = await alice.value(
            "INSERT INTO tasks (prompt, status, category, priority, external_id, max_tokens, deadline_at,"
            " client) VALUES ('p', 'unsolved', 'general', 3, 'a-1', 50, now() + interval '1 h', 'team')"
            " RETURNING id"
        )
        await alice.run("INSERT INTO tasks (prompt) VALUES ('q'), ('')")
        await alice.run(
            "INSERT INTO tasks (prompt, external_id) VALUES ('again', 'a-1')"
            " ON CONFLICT (external_id) WHERE external_id IS NOT NULL DO NOTHING"
        )
        assert await alice.value("SELECT count(*) FROM tasks WHERE status = 'failed'") == 1
        assert await _solve(any_rights) == 2
        row = await alice.row("SELECT status, answer FROM tasks WHERE id = $1", first)
        assert (row["status"], row["answer"]) == ("solved", "an answer")
        await alice.run("UPDATE tasks SET status = 'unsolved' WHERE id = $1", first)
        await alice.run("UPDATE tasks SET prompt = 'edited', priority = 5 WHERE prompt = 'q'")
        assert await alice.value("SELECT answer FROM tasks WHERE prompt = 'edited'") is None
        await alice.run("UPDATE tasks SET status = 'failed' WHERE prompt = 'edited'")
        assert await _solve(any_rights) == 1


async def test_a_producer_sees_only_its_own_tasks(any_rights: RolesDatabase) -> None:
    async with probing(any_rights.url("alice")) as alice, probing(any_rights.url("bob")) as bob:
        await alice.run("INSERT INTO tasks (prompt) VALUES ('a canary')")
        await bob.run("INSERT INTO tasks (prompt) VALUES ('mine')")
        assert await bob.value("SELECT array_agg(prompt) FROM tasks") == ["mine"]
        await bob.run("UPDATE tasks SET prompt = 'taken over'")
        assert await alice.value("SELECT array_agg(prompt) FROM tasks") == ["a canary"]


async def test_a_reader_only_reads(roles_database: RolesDatabase) -> None:
    async with probing(roles_database.url("alice")) as alice:
        await alice.run("INSERT INTO tasks (prompt) VALUES ('p')")
    assert await _solve(roles_database) == 1
    async with probing(roles_database.url("reader")) as reader:
        views = await reader.all(
            "SELECT c.oid::regclass::text AS name FROM pg_class c"
            " WHERE c.relnamespace = 'router'::regnamespace AND c.relkind = 'v'"
        )
        for name in ["tasks", "model_calls", *(view["name"] for view in views)]:
            await reader.all(f"SELECT * FROM {name}")
        assert await reader.value("SELECT answer FROM tasks") == "an answer"
        for statement in (
            "UPDATE tasks SET prompt = 'x'", "DELETE FROM tasks", "INSERT INTO tasks (prompt) VALUES ('x')",
            "SELECT * FROM queue", "SELECT claim_task('m', '{}', 'w', gen_random_uuid())",
        ):  # fmt: skip
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await reader.run(statement)


async def test_the_router_runs_without_owning_anything(roles_database: RolesDatabase) -> None:
    app = roles_database.url("app")
    with connect(app) as connection:
        assert schema_problem(connection) is None
        assert blocking_problem(connection) is None
        sync_roster(connection, load_config())
        batch = [NewTask(1, "loaded", "x-1", True, "general", 0, None, None)]
        assert enqueue(connection, batch).added == 1
    assert examine(app).ok
    async with probing(app) as probe:
        assert await _solve(roles_database) == 1
        await probe.run("SELECT make_call_partitions(12)")
        await probe.run("SELECT compact_counts(), heartbeat('w'), recount_tasks()")
        await probe.run("SELECT record_target('phi-4', '10/min', 1)")
        old = await probe.value("SELECT router.first_call_id(now() - interval '40 days')")
        await probe.run(
            "INSERT INTO model_calls (call_id, task_id, prompt_version, model) VALUES ($1, 1, 1, 'm')", old
        )
        await probe.run("SELECT make_call_partitions()")
        old_day = await probe.value("SELECT partition FROM old_call_partitions(86400, 30)")
        await probe.run("SELECT drop_call_partition($1)", old_day)
        await probe.run("UPDATE tasks SET status = 'failed' WHERE external_id = 'x-1'")
        for statement in (
            "CREATE TABLE router.mine ()",
            "CREATE FUNCTION router.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
            "ALTER TABLE tasks DISABLE TRIGGER USER", "DROP TABLE queue", "TRUNCATE tasks",
        ):  # fmt: skip
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await probe.run(statement)
    with connect(app) as connection:
        assert sum(step.unsolved for step in retry_failed(connection)) == 1
    with pytest.raises(SchemaError, match="login_app does not own tasks; router_owner does"):
        migrate(app)


# What a producer must not do: each statement is refused


async def _is_refused(producer: Probe, statement: str) -> bool:
    try:
        async with producer.connection.transaction():
            await producer.run(statement)
    except REFUSED:
        return True
    return False


ATTACKS = {
    "publish knowledge": [
        "INSERT INTO tasks (prompt, status, answer) VALUES ('q', 'solved', 'false')",
        "INSERT INTO tasks (prompt, status) VALUES ('q', 'solved')",
        "UPDATE tasks SET status = 'solved'",
        "INSERT INTO knowledge_sources DEFAULT VALUES",
        "SELECT claim_task('m', '{}', 'w', gen_random_uuid())",
    ],
    "take ids": [
        "INSERT INTO tasks (id, prompt) VALUES (1000000, 'p')",
        "UPDATE tasks SET id = id + 1000",
        "SELECT setval('tasks_id_seq', 9000000)",
        "SELECT nextval('tasks_id_seq')",
        "SELECT nextval('router.queue_position')",
    ],
    "set answers": [
        "UPDATE tasks SET answer = 'x'",
        "UPDATE tasks SET answer_rank = 3, answered_by = 'm'",
        "INSERT INTO tasks (prompt, answer) VALUES ('p', 'x')",
        "INSERT INTO tasks (prompt, answer_rank) VALUES ('p', 3)",
        "INSERT INTO tasks (prompt, solved_at) VALUES ('p', now())",
        "INSERT INTO tasks (prompt, inserted_by) VALUES ('p', 'login_bob')",
        "INSERT INTO tasks (prompt, answer_message) VALUES ('p', '{}')",
        "SELECT settle_call(gen_random_uuid(), 'answered', 'x')",
        "SELECT router.record_answer(NULL, 'x', 1, NULL)",
    ],
    "stop the batch": [
        "LOCK TABLE tasks IN ACCESS EXCLUSIVE MODE",
        "LOCK TABLE tasks IN SHARE MODE",
        "LOCK TABLE router.queue IN ACCESS SHARE MODE",
        "LOCK TABLE router.task_states IN ACCESS EXCLUSIVE MODE",
        "DELETE FROM tasks",
        "TRUNCATE tasks",
        "DROP TABLE tasks",
        "ALTER TABLE tasks DISABLE TRIGGER USER",
        "ALTER TABLE tasks DISABLE ROW LEVEL SECURITY",
        "DROP TRIGGER router_inserted ON tasks",
        "DELETE FROM router.queue",
        "UPDATE router.queue_settings SET max_attempts = 1",
        "SELECT router.set_paused(true, 1)",
        "SET session_replication_role = replica",
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'postgres'",
    ],
    "run code as the owner": [
        ("CREATE TRIGGER t BEFORE UPDATE ON tasks FOR EACH ROW"
         " EXECUTE FUNCTION suppress_redundant_updates_trigger()"),
        ("CREATE TEMP TABLE bait (id int); CREATE TRIGGER t AFTER TRUNCATE ON bait FOR EACH STATEMENT"
         " EXECUTE FUNCTION router.tasks_truncated()"),
        "CREATE FUNCTION router.queue_priority(int) RETURNS smallint LANGUAGE sql AS 'SELECT 1::smallint'",
        "CREATE TABLE router.trap ()",
        "ALTER FUNCTION router.tasks_inserted() RESET search_path",
        "CREATE POLICY mine ON tasks USING (true)",
        "SET ROLE router_owner",
        "SET ROLE router_app",
        "ALTER DEFAULT PRIVILEGES FOR ROLE router_owner GRANT ALL ON TABLES TO PUBLIC",
    ],
    "read what is not its own": [
        "SELECT * FROM router.model_calls",
        "SELECT * FROM router.queue",
        "SELECT * FROM router.task_states",
        "SELECT * FROM router.knowledge_since(0, -1, 100)",
        "SELECT * FROM router.task_failures",
        "COPY tasks TO '/tmp/stolen'",
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", ATTACKS)
async def test_a_producer_may_not(kind: str, any_rights: RolesDatabase) -> None:
    async with probing(any_rights.url("bob")) as bob, probing(any_rights.url("alice")) as alice:
        await bob.run("INSERT INTO tasks (prompt) VALUES ('of bob')")
        await alice.run("INSERT INTO tasks (prompt) VALUES ('of alice')")
        for statement in ATTACKS[kind]:
            assert await _is_refused(alice, statement), statement
    async with probing(any_rights.superuser) as admin:
        found = await admin.all("SELECT id, prompt, status, answer FROM tasks ORDER BY id")
        assert [tuple(row) for row in found] == [
            (1, "of bob", "unsolved", None),
            (2, "of alice", "unsolved", None),
        ]


async def test_a_role_with_insert_on_the_whole_table_may_not_either(roles_database: RolesDatabase) -> None:
    """As versions before documented it: GRANT INSERT ON tasks."""
    async with probing(roles_database.superuser) as admin:
        await admin.run("GRANT INSERT ON tasks TO pg_monitor; SET ROLE pg_monitor")
        await admin.run("INSERT INTO tasks (prompt, status) VALUES ('p', 'unsolved')")
        for columns, values in (
            ("status, answer", "'solved', 'x'"), ("id", "1000000"), ("answer_rank", "3"),
            ("solved_at", "now()"), ("interactive", "true"),
        ):  # fmt: skip
            with pytest.raises(asyncpg.InsufficientPrivilegeError, match=r"may not set .* of tasks"):
                await admin.run(f"INSERT INTO tasks (prompt, {columns}) VALUES ('p', {values})")
        await admin.run("INSERT INTO tasks (prompt) VALUES ('q')")
        await admin.run("RESET ROLE")
        assert await admin.value("SELECT array_agg(id ORDER BY id) FROM tasks") == [1, 6]
        # The owner restores whatever it has.
        await admin.run("INSERT INTO tasks (id, prompt, status, answer) VALUES (500, 'p', 'solved', 'old')")


# Names that stand in for those of the router

SPY = (
    "CREATE FUNCTION {schema}.spy() RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN"
    " INSERT INTO {schema}.seen VALUES (current_user); RETURN true; END $$;"
)
OVERLOADS = (
    "{schema}.queue_priority(int) RETURNS integer LANGUAGE sql AS $$ SELECT {schema}.spy()::int $$",
    "{schema}.resolve_category(varchar) RETURNS text LANGUAGE sql AS $$ SELECT {schema}.spy()::text $$",
    "{schema}.prompt_problem(varchar) RETURNS text LANGUAGE sql AS $$ SELECT {schema}.spy()::text $$",
    "{schema}.octet_length(varchar) RETURNS integer LANGUAGE sql AS $$ SELECT {schema}.spy()::int $$",
    "{schema}.count(varchar) RETURNS integer LANGUAGE sql AS $$ SELECT {schema}.spy()::int $$",
    "{schema}.is_failed(text, boolean) RETURNS boolean LANGUAGE sql AS $$ SELECT {schema}.spy() $$",
    "{schema}.format(text, int, int) RETURNS text LANGUAGE sql AS $$ SELECT {schema}.spy()::text $$",
    "{schema}.unnest(bigint[]) RETURNS SETOF bigint LANGUAGE sql AS $$ SELECT {schema}.spy()::int $$",
    "{schema}.wake_workers() RETURNS void LANGUAGE sql AS $$ SELECT {schema}.spy() $$",
    "{schema}.equal(text, varchar) RETURNS boolean LANGUAGE sql AS $$ SELECT {schema}.spy() $$",
)
OPERATORS = (
    "CREATE OPERATOR {schema}.= (LEFTARG = text, RIGHTARG = varchar, FUNCTION = {schema}.equal)",
    "CREATE OPERATOR {schema}.<> (LEFTARG = text, RIGHTARG = varchar, FUNCTION = {schema}.equal)",
)


@pytest.mark.parametrize("schema", ["public", "own"])
async def test_functions_operators_and_tables_of_a_producer_stand_in_for_none(
    roles_database: RolesDatabase, schema: str
) -> None:
    """Also where `public` was opened again after the migration: nothing runs with the owner's rights."""
    async with probing(roles_database.superuser) as admin:
        await admin.run(OPEN_PUBLIC + "; CREATE SCHEMA own AUTHORIZATION login_alice")
    async with probing(roles_database.url("alice")) as alice:
        await alice.run(f"CREATE TABLE {schema}.seen (role text); GRANT ALL ON {schema}.seen TO PUBLIC")
        await alice.run(SPY.format(schema=schema))
        for overload in OVERLOADS:
            await alice.run("CREATE FUNCTION " + overload.format(schema=schema))
        for operator in OPERATORS:
            await alice.run(operator.format(schema=schema))
        await alice.run(
            f"CREATE TABLE {schema}.queue (trap int); CREATE TABLE {schema}.categories (trap int);"
            "CREATE TEMP TABLE queue (trap int); CREATE TEMP TABLE queue_settings (trap int);"
            "CREATE TEMP TABLE inserted (trap int); CREATE TEMP TABLE task_count_deltas (trap int)"
        )
        await alice.run(f"SET search_path = pg_temp, {schema}, pg_catalog, router, public")
        await alice.run(
            "SET router.interactive = 'on'; SET router.edits = '100000'; SET router.functions = 'x'"
        )
        await alice.run("INSERT INTO public.tasks (prompt, category) VALUES ('p', 'general'), ('', 'none')")
        await alice.run(
            "UPDATE public.tasks SET prompt = 'q', priority = 4, category = 'creative' WHERE prompt = 'p'"
        )
        await alice.run("INSERT INTO public.tasks (prompt) VALUES (repeat('too long ', 200000))")
        await alice.run("UPDATE public.tasks SET status = 'failed'")
        await alice.run("UPDATE public.tasks SET status = 'unsolved' WHERE prompt = 'q'")
        seen = await alice.value(f"SELECT array_agg(DISTINCT role) FROM {schema}.seen")
        assert set(seen or []) <= {"login_alice"}
    async with probing(roles_database.superuser) as admin:
        assert await admin.value("SELECT count(*) FROM router.queue") == 1


def test_a_migration_does_not_accept_an_open_schema_again(roles_database: RolesDatabase) -> None:
    with connect(roles_database.superuser) as connection:
        rows(connection, OPEN_PUBLIC)
    with pytest.raises(SchemaError, match='REVOKE CREATE ON SCHEMA "public" FROM PUBLIC'):
        migrate(roles_database.url("owner"))
    assert examine(roles_database.url("app")).problems[0].remedy.startswith("Run `REVOKE")
    apply_roles(roles_database.superuser)
    assert migrate(roles_database.url("owner")).problems == ()


# Time: a producer that holds its rows delays nobody else


async def test_a_producer_that_keeps_a_transaction_open_stops_nobody(roles_database: RolesDatabase) -> None:
    async with probing(roles_database.url("alice")) as alice, probing(roles_database.url("bob")) as bob:
        await alice.run("INSERT INTO tasks (prompt) VALUES ('held')")
        await bob.run("INSERT INTO tasks (prompt) SELECT 'free' FROM generate_series(1, 5)")
        transaction = alice.connection.transaction()
        await transaction.start()
        await alice.run("SELECT * FROM tasks FOR UPDATE")
        await alice.run("UPDATE tasks SET prompt = prompt || '!'")
        await alice.run("INSERT INTO tasks (prompt) VALUES ('not yet')")
        assert await _solve(roles_database) == 5
        await transaction.rollback()
        assert await _solve(roles_database) == 1


# Applying


def test_roles_can_be_applied_again_and_to_an_existing_database(database: str) -> None:
    """By psql or by `router migrate --roles`; later migrations then grant the rights on new tables."""
    for _ in range(2):
        apply_roles(database)
    assert migrate(database, roles=True).problems == ()
    with connect(database) as connection:
        rows(connection, "REVOKE SELECT ON router.discovered_models FROM router_reader")
        rows(connection, "DELETE FROM router_migrations WHERE name = 'functions'")
    migrate(database)
    with connect(database) as connection:
        granted = "SELECT has_table_privilege('router_reader', 'router.discovered_models', 'SELECT') AS may"
        assert rows(connection, granted)[0]["may"]
    assert examine(database).ok


def test_the_roles_of_an_empty_database_wait_for_the_migration(empty_database: str) -> None:
    apply_roles(empty_database)
    migrate(empty_database)
    with connect(empty_database) as connection:
        may = "SELECT has_table_privilege('router_app', 'router.queue', 'UPDATE') AS may"
        assert not rows(connection, may)[0]["may"]
    assert migrate(empty_database, roles=True).problems == ()
    with connect(empty_database) as connection:
        assert rows(connection, may)[0]["may"]


async def test_a_dump_keeps_rights_and_guards(
    roles_database: RolesDatabase, empty_database: str, postgres: PostgresServer, tmp_path: Path
) -> None:
    """Only the default search path of the database is lost; `router migrate` sets it again."""
    with connect(roles_database.url("alice")) as connection:
        rows(connection, "INSERT INTO tasks (prompt) VALUES ('p')")
    source, target = (urlsplit(url).path[1:] for url in (roles_database.superuser, empty_database))
    with connect(empty_database) as connection:
        rows(connection, f'ALTER DATABASE "{target}" OWNER TO router_owner')
    postgres.run("pg_dump", "--format=custom", "--file", str(tmp_path / "dump"), source)
    postgres.run("pg_restore", "--exit-on-error", "--dbname", target, str(tmp_path / "dump"))
    restored = RolesDatabase(empty_database)
    assert examine(restored.url("app")).ok
    assert await _solve(restored) == 1
    assert migrate(restored.url("owner")).applied == ()
    async with probing(restored.url("alice")) as alice:
        assert await alice.value("SELECT answer FROM tasks") == "an answer"
        await alice.run("INSERT INTO tasks (prompt) VALUES ('q')")
        for statements in ATTACKS.values():
            for statement in statements:
                assert await _is_refused(alice, statement), statement
    async with probing(restored.url("reader")) as reader:
        assert await reader.value("SELECT count(*) FROM model_calls") == 1
