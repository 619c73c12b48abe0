"""Schema of a database: what is wrong is reported with a remedy, and `migrate` restores what it can."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.extensions
import pytest

from local.postgres import PostgresServer
from router.database import connect, fetch, open_pool, rows
from router.errors import DatabaseError, InvalidValue, SchemaError
from router.migrations import (
    SQL_FOLDER,
    ProblemKind,
    SchemaMonitor,
    SchemaProblem,
    blocking_problem,
    examine,
    expected_schema,
    migrate,
    recount_if_due,
    schema_problem,
)
from router.migrations.apply import MIGRATION_LOCK
from router.models import sync_roster
from router.settings import RouterConfig, load_config
from router.status import read_status
from tests.support.command_line import CommandLine
from tests.support.queue import Probe
from tests.support.waiting import until

SWAP = (
    "CREATE TABLE tasks_new (LIKE tasks INCLUDING ALL); INSERT INTO tasks_new SELECT * FROM tasks;"
    "SELECT setval(pg_get_serial_sequence('tasks_new', 'id'), max(id)) FROM tasks;"
    "ALTER TABLE tasks RENAME TO tasks_old; ALTER TABLE tasks_new RENAME TO tasks;"
)
LOSSES = {
    "dropped triggers": "DROP TRIGGER router_inserted ON tasks;"
    " DROP TRIGGER router_failure_updated ON tasks;",
    "disabled triggers": "ALTER TABLE tasks DISABLE TRIGGER USER;",
    "swapped table": SWAP,
    "swapped table without defaults": SWAP
    + "ALTER TABLE tasks ALTER status DROP DEFAULT, ALTER prompt_version DROP DEFAULT, ALTER prompt_version"
    " DROP NOT NULL, ALTER created_at DROP DEFAULT, ALTER inserted_by DROP DEFAULT,"
    " DROP CONSTRAINT tasks_status_known;"
    " DROP INDEX tasks_new_external_id_idx;",
    "dropped view": "DROP VIEW task_states;",
}
BROKEN = {
    "renamed column": ("ALTER TABLE tasks RENAME COLUMN max_tokens TO x", "tasks.max_tokens is missing"),
    "dropped column": ("ALTER TABLE tasks DROP COLUMN failure CASCADE", "tasks.failure is missing"),
    "changed type": ("ALTER TABLE tasks ALTER external_id TYPE varchar(9) USING NULL", None),
    "not null": ("ALTER TABLE tasks ALTER category SET NOT NULL", "tasks.category is NOT NULL"),
    "no key": ("ALTER TABLE tasks DROP CONSTRAINT tasks_pkey", "neither primary key nor unique"),
    "renamed table": ("ALTER TABLE tasks RENAME TO jobs", "tasks is missing"),
}  # fmt: skip


def _run(url: str, *statements: str) -> None:
    with connect(url) as connection:
        for statement in statements:
            rows(connection, statement)


def _one(url: str, statement: str) -> Any:
    with connect(url) as connection:
        return next(iter(rows(connection, statement)[0].values()))


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_a_database_that_is_not_utf8_is_refused(postgres: PostgresServer, encoding: str) -> None:
    name = f"encoded_{encoding.lower()}_{os.getpid()}"
    postgres.run("createdb", "--template", "template0", "--encoding", encoding, "--locale", "C", name)
    url = postgres.url(name)
    with pytest.raises(SchemaError, match=f"encoding is {encoding}.*createdb.*Nothing was changed"):
        migrate(url)
    assert _one(url, "SELECT to_regclass('router_migrations')") is None
    found = examine(url)
    assert found.refused
    assert found.problems[0].kind is ProblemKind.ENCODING
    postgres.run("dropdb", name)


@pytest.mark.parametrize("loss", LOSSES)
async def test_migrate_restores_what_tasks_lost(probe: Probe, database: str, loss: str) -> None:
    for prompt in ("first", "second", "third"):
        await probe.add(prompt, category="general")
    await probe.settle(await probe.must_claim())
    await probe.run(LOSSES[loss])
    if "view" not in loss:
        with connect(database) as connection:
            problem = blocking_problem(connection)
            assert problem is not None
            assert problem.kind is ProblemKind.TRIGGERS
            shown = read_status(connection, None).notes
            assert any("router_failure_updated" in note and "router migrate" in note for note in shown)
    await probe.run(
        "INSERT INTO tasks (prompt, status, prompt_version) VALUES ('late', 'unsolved', 5);"
        "UPDATE tasks SET status = 'failed', failure = 'by hand' WHERE prompt = 'second'"
    )
    would = examine(database)
    assert would.restores
    assert not would.refused

    report = migrate(database)

    assert {problem.text for problem in report.restored} == set(would.restores)
    assert report.problems == ()
    assert examine(database).ok
    assert await probe.value("SELECT count(*) FROM task_failures") == 1
    assert await probe.value("SELECT count(*) FROM task_states") == 4
    assert {row["prompt"] for row in await probe.all(
        "SELECT t.prompt FROM queue q JOIN tasks t ON t.id = q.task_id")} == {"third", "late"}  # fmt: skip
    await probe.assert_counts_exact()
    await probe.run("INSERT INTO tasks (prompt) VALUES ('after')")
    assert await probe.value("SELECT count(*) FROM queue") == 3
    assert migrate(database).restored == ()


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_table_is_named_by_migrate_and_status(bare_database: str, kind: str) -> None:
    statement, word = BROKEN[kind]
    _run(bare_database, statement)
    if word is None:
        assert examine(bare_database).ok
        return
    with connect(bare_database) as connection:
        assert word in str(schema_problem(connection))
        if kind != "renamed table":
            assert word in str(read_status(connection, None).why_not)
    with pytest.raises(SchemaError, match=word):
        migrate(bare_database)
    assert examine(bare_database).refused


def test_hidden_rows_are_named_by_migrate_and_status(bare_database: str, postgres: PostgresServer) -> None:
    role = f"hidden_{os.getpid()}"
    name = str(_one(bare_database, "SELECT current_database()"))
    _run(
        bare_database,
        f"CREATE ROLE {role} LOGIN",
        f'ALTER DATABASE "{name}" OWNER TO {role}',
        f"ALTER TABLE tasks OWNER TO {role}",
        f"GRANT ALL ON ALL TABLES IN SCHEMA public, router TO {role}",
        f"GRANT ALL ON SCHEMA public TO {role}",
        f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA router TO {role}",
        "ALTER TABLE tasks ENABLE ROW LEVEL SECURITY",
        "ALTER TABLE tasks FORCE ROW LEVEL SECURITY",
    )
    url = postgres.url(name).replace("postgres@", f"{role}@")
    with connect(url) as connection:
        problem = blocking_problem(connection)
        assert problem is not None
        assert problem.kind is ProblemKind.ROWS_HIDDEN
        assert "hides rows of tasks" in str(read_status(connection, None).why_not)
    with pytest.raises(SchemaError, match="NO FORCE ROW LEVEL SECURITY"):
        migrate(url)
    _run(bare_database, "ALTER TABLE tasks NO FORCE ROW LEVEL SECURITY")
    with connect(url) as connection:
        assert blocking_problem(connection) is None


def test_columns_that_need_a_value_are_reported_on_a_table_in_use(database: str) -> None:
    _run(database, "ALTER TABLE tasks ADD customer_id int NOT NULL DEFAULT 1, ADD region text")
    assert examine(database).ok
    _run(database, "ALTER TABLE tasks ALTER customer_id DROP DEFAULT")
    report = migrate(database)
    assert [problem.kind for problem in report.problems] == [ProblemKind.INSERTS]
    assert "customer_id" in str(report.problems[0])
    assert not examine(database).refused
    assert examine(database, task_defaults={"customer_id": "7"}).ok
    wrong = examine(database, task_defaults={"customer_id": "abc"}).problems
    assert "tasks.defaults" in wrong[0].remedy
    unknown = examine(database, task_defaults={"customer_id": "7", "nothing": "1"}).problems
    assert "tasks has no such column" in unknown[0].text


async def test_no_error_contains_the_rejected_row(database: str) -> None:
    _run(database, "ALTER TABLE tasks ADD customer_id int NOT NULL CHECK (customer_id > 0)")
    pool = await open_pool(database, connections=1)
    for values in ("DEFAULT", "-1"):
        with pytest.raises(InvalidValue) as rejected:
            await fetch(pool, f"INSERT INTO tasks (prompt, customer_id) VALUES ('a secret', {values})")
        assert "customer_id" in str(rejected.value)
        assert "secret" not in str(rejected.value)
    await pool.close()
    with pytest.raises(DatabaseError) as refused:
        _run(database, "INSERT INTO tasks (prompt, customer_id) VALUES ('a secret', -1)")
    assert "secret" not in str(refused.value)


def test_an_integer_id_is_widened_by_the_documented_recipe(empty_database: str) -> None:
    _run(
        empty_database,
        "CREATE TABLE tasks (id serial PRIMARY KEY, prompt text, status text DEFAULT 'unsolved')",
        "INSERT INTO tasks (prompt) VALUES ('p')",
    )
    migrate(empty_database)
    recipe = (Path(__file__).parents[3] / "docs/operations.md").read_text().split("<!-- widen -->")[1]
    _run(empty_database, recipe.split("```sql\n")[1].split("```")[0])
    assert "the view task_states" in migrate(empty_database).restored[0].text
    assert examine(empty_database).ok
    _run(
        empty_database,
        "SELECT setval('tasks_id_seq', 3000000000)",
        "INSERT INTO tasks (prompt) VALUES ('beyond')",
    )
    assert _one(empty_database, "SELECT max(id) FROM task_states") == 3_000_000_001
    assert _one(empty_database, "SELECT count(*) FROM queue") == 2


# The lock


def test_a_migration_waits_for_another_one_and_says_so(
    bare_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.migrations.apply.LOCK_PATIENCE_SECONDS", 1.0)
    said: list[str] = []
    holder = psycopg2.connect(bare_database)
    with holder.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", (MIGRATION_LOCK,))
    pid = holder.info.backend_pid
    with pytest.raises(SchemaError, match=f"Another migration is running .pid {pid}.*Nothing was changed"):
        migrate(bare_database, progress=said.append)
    assert len(said) == 1
    assert str(pid) in said[0]

    monkeypatch.setattr("router.migrations.apply.LOCK_PATIENCE_SECONDS", 30.0)
    threading.Timer(0.5, holder.rollback).start()
    assert migrate(bare_database).applied == ()
    holder.close()


def test_a_lock_that_was_left_behind_is_named(bare_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.migrations.apply.IDLE_HOLDER_SECONDS", 0.1)
    holder = psycopg2.connect(bare_database)
    holder.autocommit = True
    with holder.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_lock(%s)", (MIGRATION_LOCK,))
    time.sleep(0.2)
    began = time.monotonic()
    with pytest.raises(SchemaError, match=rf"pg_terminate_backend\({holder.info.backend_pid}\)"):
        migrate(bare_database)
    assert time.monotonic() - began < 10
    pid = holder.info.backend_pid
    holder.close()
    with connect(bare_database) as connection:
        until(lambda: not rows(connection, "SELECT FROM pg_stat_activity WHERE pid = %s", (pid,)), 10)
    migrate(bare_database)


class Pooler:
    """Connection as through a pooler in transaction mode: every transaction may get another session."""

    def __init__(self, url: str) -> None:
        self.sessions = [psycopg2.connect(url) for _ in range(3)]
        for session in self.sessions:
            session.autocommit = True
        self._at = 0

    def cursor(self) -> Any:
        session = self.sessions[self._at]
        if session.info.transaction_status == psycopg2.extensions.TRANSACTION_STATUS_IDLE:
            self._at = (self._at + 1) % len(self.sessions)
        return self.sessions[self._at].cursor()


def test_a_pooler_in_transaction_mode_keeps_no_lock(
    empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pooler = Pooler(empty_database)

    @contextmanager
    def pooled(_url: str, **_options: object) -> Iterator[Pooler]:
        yield pooler

    monkeypatch.setattr("router.migrations.apply.connect", pooled)
    assert migrate(empty_database).applied
    assert migrate(empty_database).applied == ()
    assert _one(empty_database, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0
    for session in pooler.sessions:
        session.close()


# Versions


async def test_processes_older_than_a_migration_ask_for_a_restart(bare_database: str, tmp_path: Path) -> None:
    for kind in ("migrations", "functions"):
        shutil.copytree(SQL_FOLDER / kind, tmp_path / kind)
    pool = await open_pool(bare_database, connections=1)
    running = SchemaMonitor(expected_schema(tmp_path))
    assert await running.problem(pool) is None
    (tmp_path / "migrations" / "900_newer.sql").write_text("CREATE TABLE newer ()")
    (tmp_path / "functions" / "99_newer.sql").write_text(
        "CREATE FUNCTION newer() RETURNS int LANGUAGE sql AS 'SELECT 1'"
    )
    newer = SchemaMonitor(expected_schema(tmp_path))
    before = await newer.problem(pool)
    assert before is not None
    assert "900_newer.sql" in before.text
    assert before.remedy == "Run `router migrate`."

    migrate(bare_database, tmp_path)

    assert await newer.problem(pool) is None
    outdated = await running.problem(pool)
    assert outdated == SchemaProblem(
        ProblemKind.OUTDATED,
        "The database was migrated after this process had started.",
        "Restart this process.",
    )
    with connect(bare_database) as connection:
        fresh = blocking_problem(connection)
        assert fresh is not None
        assert "newer version" in fresh.text
    with pytest.raises(SchemaError, match="newer version"):
        migrate(bare_database)
    await pool.close()


# Counters


def _config(*categories: str, default: str = "general") -> RouterConfig:
    config = load_config()
    models = {name: model.model_copy(update={"ranks": {}}) for name, model in config.models.items()}
    return config.model_copy(
        update={"categories": categories, "default_category": default, "models": models, "discovered": {}}
    )


def _synced(url: str, config: RouterConfig) -> bool:
    with connect(url) as connection:
        sync_roster(connection, config)
        connection.commit()
        return recount_if_due(connection)


async def test_counters_follow_a_change_of_the_categories(
    probe: Probe, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.migrations.apply.RECOUNT_PATIENCE_SECONDS", 0.3)
    await probe.run(
        "INSERT INTO tasks (prompt, category, status) SELECT 'p', c, s"
        " FROM unnest(ARRAY['legal', 'technical', NULL, 'general']) AS c,"
        " unnest(ARRAY['unsolved', 'solved', 'solved', 'failed']) AS s, generate_series(1, 5)"
    )
    for categories, default in (
        (("technical", "creative", "general", "legal"), "general"),
        (("technical", "general"), "general"),
        (("technical", "general"), "technical"),
        (("legal",), "legal"),
    ):
        assert _synced(database, _config(*categories, default=default))
        await probe.reconcile()
        await probe.assert_counts_exact()
    await probe.run("DELETE FROM tasks WHERE category = 'legal'")
    await probe.assert_counts_exact()

    # A transaction that counted under the former categories is still open.
    other = psycopg2.connect(database)
    with other.cursor() as cursor:
        cursor.execute("INSERT INTO tasks (prompt, category, status) VALUES ('p', 'general', 'solved')")
    assert not _synced(database, _config("technical", "general", default="technical"))
    await probe.run("DELETE FROM tasks WHERE category = 'technical' AND status = 'solved'")
    other.commit()
    other.close()
    await probe.reconcile()
    await probe.run("ANALYZE tasks")
    await probe.run("SELECT compact_counts()")
    await probe.assert_counts_exact()


async def test_a_claim_counts_a_task_that_was_finished_without_triggers(probe: Probe) -> None:
    ids = [await probe.add(category="general") for _ in range(3)]
    await probe.run("ALTER TABLE tasks DISABLE TRIGGER USER")
    await probe.run("UPDATE tasks SET status = 'solved', answer = 'a' WHERE id = $1", ids[0])
    await probe.run("UPDATE tasks SET status = 'failed' WHERE id = $1", ids[1])
    await probe.run("ALTER TABLE tasks ENABLE TRIGGER USER")
    assert (await probe.must_claim()).task_id == ids[2]
    await probe.assert_counts_exact()


# The command line


def test_doctor_reports_problems_and_what_migrate_would_do(empty_database: str) -> None:
    router = CommandLine({"ROUTER_DATABASE_URL": empty_database.replace("postgres@", "postgres:hunter2@")})
    fresh = router("doctor")
    assert fresh.code == 3
    assert "apply 001_tasks.sql" in fresh.out
    assert _one(empty_database, "SELECT to_regclass('router_migrations')") is None
    assert router("migrate").code == 0
    healthy = router("doctor")
    assert (healthy.code, healthy.err) == (0, "")
    _run(empty_database, "DROP TRIGGER router_inserted ON tasks")
    shown = router("migrate", "--check", "--json")
    assert shown.code == 3
    found = shown.json
    assert not found["ok"]
    assert [problem["kind"] for problem in found["problems"]] == ["triggers"]
    assert found["restores"]
    assert not found["refused"]
    repaired = router("migrate")
    assert repaired.code == 0
    assert "router_inserted" in repaired.err
    _run(empty_database, "ALTER TABLE tasks RENAME COLUMN max_tokens TO x")
    broken = router("migrate")
    assert broken.code == 1
    assert "tasks.max_tokens is missing" in broken.err
    for run in (fresh, healthy, shown, repaired, broken):
        assert "hunter2" not in run.out + run.err
        assert "Traceback" not in run.err


def test_load_names_the_column_without_a_value_and_takes_it_from_the_config(
    database: str, tmp_path: Path
) -> None:
    _run(database, "ALTER TABLE tasks ADD customer_id int NOT NULL")
    router = CommandLine({"ROUTER_DATABASE_URL": database})
    (tmp_path / "prompts.txt").write_text("a secret\n")
    refused = router("load", tmp_path / "prompts.txt")
    assert refused.code == 1
    assert "defaults: {customer_id: ...}" in refused.err
    assert "secret" not in refused.err
    warned = router("migrate")
    assert (warned.code, "customer_id" in warned.err) == (0, True)

    shutil.copytree(SQL_FOLDER.parent / "config", tmp_path / "config")
    with (tmp_path / "config" / "models.yaml").open("a") as models:
        models.write("\ntasks:\n  defaults: {customer_id: 7}\n")
    synced = router("models", "sync", "--config", tmp_path / "config")
    assert (synced.code, synced.err) == (0, "")
    assert router("load", tmp_path / "prompts.txt").code == 0
    assert _one(database, "SELECT customer_id FROM tasks") == 7
    assert router("doctor", "--config", tmp_path / "config").code == 0
