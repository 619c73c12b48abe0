"""Values and tables of producers: an extreme value or an old column type concerns its own task only."""

from __future__ import annotations

import json

import psycopg2
import pytest

from local.postgres import PostgresServer
from plugins.console import tasks as console
from router.database import connect, open_pool
from router.migrations import migrate
from router.models import sync_roster
from router.queue import TaskQueue, finished_tasks, read_calls, retry_failed
from router.settings import load_config
from router.status import read_status
from router.task import CallResult, Outcome, new_call_id
from tests.support.queue import Probe, probing

TIMES = (
    "99999-01-01", "294276-12-31", "infinity", "-infinity", "0044-03-15 BC", "4713-01-01 BC", "1970-01-01",
    "0001-01-01 00:00:00+14",
)  # fmt: skip
ID_TYPES = ("integer", "serial", "bigint", "bigserial")


@pytest.mark.parametrize("value", TIMES)
@pytest.mark.parametrize("column", ["deadline_at", "created_at", "solved_at"])
async def test_every_reader_copes_with_every_time(
    probe: Probe, database: str, column: str, value: str
) -> None:
    await probe.run("UPDATE queue_settings SET max_attempts = 1")
    odd = await probe.value(
        f"INSERT INTO tasks (prompt, category, {column}) VALUES ('odd', 'general', '{value}') RETURNING id"
    )
    honest = await probe.add("honest", category="general")

    await probe.all("SELECT * FROM claim_due_deadlines(10, 30, 100)")
    await probe.all("SELECT * FROM console_oldest()")
    pool = await open_pool(database, connections=2)
    queue = TaskQueue(pool, host="here")
    await queue.renew_lease()
    claims = [await queue.claim("m1", ["general"], max_tokens=100) for _ in range(2)]
    assert [claim.task_id for claim in claims if claim is not None] == [odd, honest]
    for claim in claims:
        assert claim is not None
        outcome = Outcome.REJECTED if claim.task_id == odd else Outcome.ANSWERED
        await queue.settle(claim, CallResult(outcome, answer="an answer", error="refused"))
    await pool.close()

    with connect(database) as connection:
        assert read_status(connection, None).tasks.unsolved == 0
        details = console.task_details(connection, odd)
        assert details is not None
        assert json.dumps(details["task"], default=str)
        assert len(console.failures(connection, None, None, 20)["failures"]) == 1
        assert len(read_calls(connection, limit=10)) == 2
        assert {row["id"] for row in finished_tasks(connection, ["solved", "failed"])} == {odd, honest}
    with connect(database) as connection:
        assert [step.unsolved for step in retry_failed(connection, task_ids=[odd])][-1] == 1
    await probe.assert_counts_exact()


EXTREMES = {
    "prompt": [
        "'x' || repeat(E'\\n', 3000)",
        "repeat('x', 1048576)",
        "E'\\\\000 \\uFFFF \\\\x00 %s {} \u202e'",
    ],
    "priority": ["2147483647", "-2147483648", "NULL"],
    "category": ["''", "repeat('c', 1000000)", "'none such'", "E'tech\\nnical'"],
    "max_tokens": ["1", "2147483647", "NULL"],
    "external_id": ["''", "repeat('9', 2000)", "E'a\\tb'", "'-1'"],
    "deadline_at": ["'infinity'", "'-infinity'", "'294276-12-31 23:59:59+00'", "'4713-01-01 BC'"],
    "created_at": ["'infinity'", "'-infinity'", "'294276-12-31 23:59:59+00'", "'4713-01-01 BC'"],
    "solved_at": ["'infinity'", "'-infinity'", "'294276-12-31 23:59:59+00'", "'4713-01-01 BC'"],
    "failure": ["repeat('f', 1000000)"],
    "answer": ["repeat('a', 1000000)"],
    "answered_by": ["repeat('m', 100000)"],
    "status": ["'solved'", "'failed'"],
}


async def test_no_extreme_value_of_any_column_stops_the_others(probe: Probe, database: str) -> None:
    for column, values in EXTREMES.items():
        for value in values:
            names, row = ("prompt", value) if column == "prompt" else (f"prompt, {column}", f"'odd', {value}")
            await probe.run(f"INSERT INTO tasks ({names}) VALUES ({row})")
    honest = await probe.add("honest")
    count = await probe.value("SELECT count(*) FROM tasks WHERE status = 'unsolved'")

    await probe.all("SELECT * FROM claim_uncategorized(100)")
    await probe.all("SELECT * FROM claim_due_deadlines(10, 30, 100)")
    pool = await open_pool(database, connections=2)
    queue = TaskQueue(pool, host="here")
    await queue.renew_lease()
    seen = set()
    while (claim := await queue.claim("m1", [], max_tokens=100)) is not None:
        seen.add(claim.task_id)
        await queue.settle(claim, CallResult(Outcome.ANSWERED, answer="an answer"))
    await pool.close()
    assert len(seen) == count
    assert honest in seen
    await probe.reconcile()
    await probe.assert_counts_exact()

    with connect(database) as connection:
        assert read_status(connection, None).tasks.unsolved == 0
        ids = {row["id"] for row in finished_tasks(connection, ["solved", "failed"])}
        for task_id in ids:
            details = console.task_details(connection, task_id)
            assert details is not None
            assert len(json.dumps(details, default=str)) < 500_000
        assert len(read_calls(connection, limit=100)) == count
    with connect(database) as connection:
        list(retry_failed(connection))
    assert len(ids) == await probe.value("SELECT count(*) FROM tasks")


async def test_a_huge_prompt_is_not_read_for_its_story(probe: Probe, database: str) -> None:
    async with probe.connection.transaction():
        await probe.run("SET LOCAL session_replication_role = replica")
        await probe.run("ALTER TABLE tasks ALTER prompt SET STORAGE EXTERNAL")
        task_id = await probe.value("INSERT INTO tasks (prompt) VALUES (repeat('x', 50000000)) RETURNING id")
    with connect(database) as connection:
        details = console.task_details(connection, task_id)
        assert details is not None
        assert details["task"]["prompt_characters"] == 50_000_000
    read = f"SELECT text_size(prompt), left(prompt, 4000) FROM tasks WHERE id = {task_id}"
    plan = await probe.all(f"EXPLAIN (ANALYZE, BUFFERS) {read}")
    pages = [int(part[4:]) for row in plan for part in row[0].split() if part.startswith(("hit=", "read="))]
    assert not pages or max(pages) < 200, "50 MB are 6,000 pages"


async def test_bytes_that_are_not_utf8_concern_their_own_task_only(
    postgres: PostgresServer, migrated_template: str
) -> None:
    """Databases of other encodings are refused today; one may be older than that."""
    dump = postgres.run("pg_dump", "--inserts", migrated_template).stdout
    postgres.run("createdb", "--encoding=SQL_ASCII", "--locale=C", "--template=template0", "bytes")
    database = postgres.url("bytes")
    old = psycopg2.connect(database)
    with old, old.cursor() as cursor:
        cursor.execute("\n".join(line for line in dump.splitlines() if not line.startswith("\\")))
    old.close()
    async with probing(database) as probe:
        await probe.run("SET search_path = public, router")
        await probe.run("UPDATE queue_settings SET categorise = true")
        for category in ("NULL", "'general'"):
            await probe.run(
                f"INSERT INTO tasks (prompt, category, deadline_at) VALUES (E'caf\\xe9', {category}, now())"
            )
        honest = await probe.add("honest", category="general")
        assert len(await probe.all("SELECT * FROM claim_uncategorized(10)")) == 1
        assert len(await probe.all("SELECT * FROM claim_due_deadlines(10, 30, 100)")) == 2
        pool = await open_pool(database, connections=2)
        queue = TaskQueue(pool, host="here")
        claims = [await queue.claim("m1", ["general"], max_tokens=100) for _ in range(2)]
        await pool.close()
        assert [claim.task_id for claim in claims if claim is not None] == [honest]
        assert await probe.value("SELECT failure FROM tasks WHERE id = 2") == "the prompt is not valid UTF-8"
    with connect(database) as connection:
        assert console.task_details(connection, 1) is not None
    postgres.run("dropdb", "bytes")


async def test_missed_deadlines_do_not_delay_one_that_can_be_met(probe: Probe) -> None:
    await probe.run(
        "INSERT INTO tasks (prompt, category, deadline_at)"
        " SELECT 'missed', 'general', '1970-01-01' FROM generate_series(1, 300)"
    )
    in_time = await probe.value(
        "INSERT INTO tasks (prompt, category, deadline_at)"
        " VALUES ('in time', 'general', clock_timestamp() + interval '5 s') RETURNING id"
    )
    taken = await probe.all("SELECT * FROM claim_due_deadlines(10, 30, 10)")
    assert len(taken) == 10
    assert taken[0]["task_id"] == in_time


@pytest.mark.parametrize("kind", ID_TYPES)
async def test_every_function_works_on_a_table_with_old_types(empty_database: str, kind: str) -> None:
    connection = psycopg2.connect(empty_database)
    with connection, connection.cursor() as cursor:
        cursor.execute(
            f"CREATE TABLE tasks (id {kind} PRIMARY KEY, prompt varchar(9000),"
            " status varchar(20) DEFAULT 'unsolved', answer varchar(40), created_at timestamp DEFAULT now())"
        )
        if "serial" not in kind:
            cursor.execute("CREATE SEQUENCE own_ids")
            cursor.execute("ALTER TABLE tasks ALTER COLUMN id SET DEFAULT nextval('own_ids')")
    connection.close()
    migrate(empty_database)
    with connect(empty_database) as synchronous:
        sync_roster(synchronous, load_config())

    async with probing(empty_database) as probe:
        await probe.run("UPDATE queue_settings SET max_attempts = 1")
        await probe.run("SELECT announce_classifier(60)")
        task = await probe.add("to classify")
        (taken,) = await probe.all("SELECT * FROM claim_uncategorized(10)")
        assert taken["task_id"] == task
        arguments = [[task], [taken["prompt_version"]], ["technical"], [0.9], ["a test"]]
        assert await probe.value("SELECT assign_categories($1, $2, $3, $4, $5)", *arguments) == 1
        claim = await probe.must_claim("technical")
        assert await probe.settle(claim, "error", error="it broke") == "failed"

        call_id = new_call_id(1.8e9)
        await probe.run("SELECT heartbeat('asks')")
        begun = await probe.row(
            "SELECT * FROM begin_request("
            "'now', 5, $1, 'm1', 'asked', 3::smallint, 'general', 1, 'asks', 10, 'm1', 'm2')",
            call_id,
        )
        await probe.run(
            "UPDATE queue SET deadline_at = clock_timestamp() WHERE task_id = $1", begun["task_id"]
        )
        (due,) = await probe.all("SELECT * FROM claim_due_deadlines(10, 30, 10)")
        assert due["task_id"] == begun["task_id"]
        assert (await probe.row("SELECT * FROM console_oldest()"))["task_id"] == begun["task_id"]
        assert await probe.value("SELECT discard_request_call($1, 'the client left')", call_id)
        await probe.reconcile()
        await probe.assert_counts_exact()
    with connect(empty_database) as synchronous:
        assert len(console.failures(synchronous, None, None, 20)["failures"]) == 1, "requests do not count"
        assert {row["status"] for row in finished_tasks(synchronous, ["solved", "failed"])} == {"failed"}
