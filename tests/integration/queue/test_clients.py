"""The client of tasks and calls: from the column, in claims and in the log; unusable values end one task."""

from __future__ import annotations

import time

import pytest

from router.database import connect, rows
from router.migrations import examine, migrate
from router.task import new_call_id
from tests.support.queue import Probe

UNUSABLE = {
    "a space": "two words",
    "65 characters": "x" * 65,
    "a first dot": ".hidden",
    "another alphabet": "Алиса",
    "a line break at the end": "alice\n",
    "a megabyte": "x" * 1_000_000,
}
USABLE = ("", "alice", "a", "7", "team.one_2-b@example.org", "x" * 64)


@pytest.mark.parametrize("client", USABLE)
async def test_a_claim_and_its_log_row_carry_the_client(probe: Probe, client: str) -> None:
    await probe.add(client=client)
    taken = await probe.must_claim()
    assert taken.client == client
    assert (await probe.call(taken.call_id))["client"] == client


async def test_null_is_the_empty_client(probe: Probe) -> None:
    task_id = await probe.add(client=None)
    await probe.run("INSERT INTO tasks (prompt, client) SELECT 'p', NULL FROM generate_series(1, 3)")
    await probe.run("UPDATE tasks SET client = NULL WHERE id = $1", task_id)
    assert await probe.value("SELECT array_agg(DISTINCT client) FROM tasks") == [""]
    assert (await probe.must_claim()).client == ""


@pytest.mark.parametrize("client", UNUSABLE.values(), ids=UNUSABLE)
async def test_an_unusable_client_fails_its_task_alone(probe: Probe, client: str) -> None:
    await probe.run("INSERT INTO tasks (prompt, client) VALUES ('p', 'bob'), ('p', $1), ('p', 'bob')", client)
    failed = await probe.row("SELECT status, failure FROM tasks WHERE client = $1", client)
    assert failed["status"] == "failed"
    assert "at most 64 characters" in failed["failure"]
    assert len(failed["failure"]) < 300
    assert [(await probe.must_claim()).client for _ in range(2)] == ["bob", "bob"]
    await probe.assert_counts_exact()


async def test_an_update_to_an_unusable_client_fails_the_task(probe: Probe) -> None:
    task_id, other = await probe.add(client="alice"), await probe.add(client="alice")
    await probe.run("UPDATE tasks SET client = 'not a client' WHERE id = $1", task_id)
    assert (await probe.task(task_id))["status"] == "failed"
    assert (await probe.must_claim()).task_id == other
    await probe.assert_counts_exact()


async def test_an_unusable_client_that_no_trigger_saw_fails_its_task_at_the_claim(probe: Probe) -> None:
    task_id, other = await probe.add(), await probe.add()
    async with probe.connection.transaction():
        await probe.run("SET LOCAL session_replication_role = replica")
        await probe.run("UPDATE tasks SET client = 'not a client' WHERE id = $1", task_id)
    assert (await probe.must_claim()).task_id == other
    assert "not a client" in (await probe.task(task_id))["failure"]


async def test_a_reset_task_with_an_unusable_client_fails_again(probe: Probe) -> None:
    task_id = await probe.add(client="not a client")
    await probe.run("UPDATE tasks SET status = 'unsolved' WHERE id = $1", task_id)
    assert (await probe.task(task_id))["status"] == "failed"
    await probe.run("UPDATE tasks SET status = 'unsolved', client = 'alice' WHERE id = $1", task_id)
    assert (await probe.must_claim()).client == "alice"


async def test_a_call_that_a_crash_lost_is_logged_again_with_its_client(probe: Probe) -> None:
    task_id = await probe.add(client="alice")
    taken = await probe.must_claim()
    await probe.run("DELETE FROM model_calls WHERE call_id = $1", taken.call_id)
    await probe.run("UPDATE queue SET state = 'ready', call_id = NULL, worker = NULL, claimed_at = NULL")
    version = (await probe.task(task_id))["prompt_version"]
    await probe.settle(taken, task_id=task_id, model="m1", prompt_version=version)
    assert (await probe.call(taken.call_id))["client"] == "alice"


async def test_requests_carry_the_client(probe: Probe) -> None:
    await probe.run("SELECT heartbeat('w1')")
    first, second = (new_call_id(time.time()) for _ in range(2))
    begun = await probe.row(
        "SELECT * FROM begin_request('p', 10, $1, 'm1', 'asked', 3::smallint, 'general', NULL, 'w1', 1, 'm1',"
        " NULL, NULL, 'alice')",
        first,
    )
    await probe.run(
        "SELECT add_request_call($1, $2, $3, 'm2', 'fallback', 2::smallint, 'general', NULL, 'w1', 1, 1,"
        " 'm1', 'm2', 'alice')",
        second, begun["task_id"], begun["prompt_version"],
    )  # fmt: skip
    assert (await probe.task(begun["task_id"]))["client"] == "alice"
    assert [(await probe.call(call))["client"] for call in (first, second)] == ["alice", "alice"]


async def test_a_due_deadline_carries_the_client(probe: Probe) -> None:
    await probe.run("INSERT INTO tasks (prompt, client, deadline_at) VALUES ('p', 'alice', now())")
    (due,) = await probe.all("SELECT * FROM claim_due_deadlines(10, 30, 10)")
    assert due["client"] == "alice"


OLD = "CREATE TABLE tasks (id serial PRIMARY KEY, prompt text, status text DEFAULT 'unsolved', client {});"
SAME = {
    "text": "text",
    "varchar": "varchar(40)",
    "not null": "text NOT NULL",
    "with a default": "text DEFAULT 'x'",
}


@pytest.mark.parametrize("kind", SAME.values(), ids=SAME)
def test_a_client_column_of_an_existing_table_is_used(empty_database: str, kind: str) -> None:
    with connect(empty_database) as connection:
        rows(connection, OLD.format(kind))
        rows(
            connection, "INSERT INTO tasks (prompt, client) VALUES ('old', 'alice'), ('bad', 'not a client')"
        )
        if "NOT NULL" not in kind:
            rows(connection, "INSERT INTO tasks (prompt, client) VALUES ('null', NULL)")
    migrate(empty_database)
    assert not examine(empty_database).problems
    with connect(empty_database) as connection:
        rows(connection, "UPDATE queue_settings SET categorise = false")
        rows(connection, "INSERT INTO tasks (prompt, category) VALUES ('new', 'general')")
        rows(connection, "SELECT apply_default_category()")
        claim = "SELECT prompt, client FROM claim_task('m', '{}', 'w', %s)"
        claimed = [rows(connection, claim, (str(new_call_id(time.time())),)) for _ in range(4)]
        found = {row["prompt"]: row["client"] for one in claimed for row in one}
        failed = rows(connection, "SELECT prompt FROM tasks WHERE status = 'failed'")
    new = "x" if "DEFAULT" in kind else ""
    assert found == {"old": "alice", "new": new} | ({} if "NOT NULL" in kind else {"null": ""})
    assert [row["prompt"] for row in failed] == ["bad"]


@pytest.mark.parametrize("kind", ["integer", "uuid", "jsonb"])
def test_a_client_column_of_another_type_is_refused_with_a_remedy(empty_database: str, kind: str) -> None:
    with connect(empty_database) as connection:
        rows(connection, OLD.format(kind))
    (problem,) = [one for one in examine(empty_database).problems if "client" in one.text]
    assert "Rename the column" in problem.remedy
