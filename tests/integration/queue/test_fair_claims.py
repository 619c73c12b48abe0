"""Claims next to locked rows, empty lanes, lost workers and unusable rows: none stops the others."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncpg
import pytest

from router.task import new_call_id
from tests.support.queue import Probe, probing

pytestmark = pytest.mark.timeout(120)

MANY = 20_000


@asynccontextmanager
async def holding(url: str, *statements: str) -> AsyncIterator[Probe]:
    """Another session that leaves a transaction with these statements open."""
    async with probing(url) as person:
        await person.run("BEGIN")
        for statement in statements:
            await person.run(statement)
        yield person
        await person.run("ROLLBACK")


async def _pages(probe: Probe, statement: str) -> int:
    """Pages that the statement reads: a measure of its cost without a clock."""
    await probe.run("SELECT pg_stat_force_next_flush()")
    lines = await probe.all(f"EXPLAIN (ANALYZE, BUFFERS) {statement}")
    hits = [part for row in lines for part in row[0].split() if part.startswith("hit=")]
    return int(hits[0].removeprefix("hit=")) if hits else 0


def _claiming() -> str:
    return f"SELECT * FROM claim_task('m1', '{{general}}', 'w1', '{new_call_id(time.time())}')"


# Locked rows.


@pytest.mark.parametrize("free", [0, 30, 4000])
async def test_a_claim_next_to_many_locked_rows_is_cheap(probe: Probe, database: str, free: int) -> None:
    await probe.run(f"INSERT INTO tasks (prompt) SELECT 'p' FROM generate_series(1, {MANY})")
    await probe.run("VACUUM ANALYZE queue")
    usual = await _pages(probe, _claiming())
    async with holding(database, f"SELECT FROM queue WHERE task_id <= {MANY - free} FOR UPDATE"):
        for _ in range(12):
            assert await _pages(probe, _claiming()) < usual + 800, "it walks over the locked rows"
        assert await probe.value("SELECT count(*) FROM queue WHERE state = 'claimed'") == 1 + min(free, 12)
        new = await probe.add()
        claims = [await probe.claim() for _ in range(20)]
        assert new in {taken.task_id for taken in claims if taken} or free, "new tasks"
        if free == 4000:
            assert len({taken.task_id for taken in claims if taken and taken.task_id > MANY - free}) >= 15
    await probe.run("DELETE FROM queue_skips")  # they end after a second
    assert (await probe.must_claim()).task_id < 200, "the first ones again"


async def test_a_short_lock_is_skipped_in_order(probe: Probe, database: str) -> None:
    ids = [await probe.add() for _ in range(5)]
    async with holding(database, f"UPDATE tasks SET priority = 1 WHERE id <= {ids[2]}"):
        assert (await probe.must_claim()).task_id == ids[3]


async def test_an_edit_of_many_tasks_leaves_them_claimable_and_is_applied_after_it(
    probe: Probe, database: str
) -> None:
    await probe.run(
        "INSERT INTO tasks (prompt, category) SELECT 'p', 'general' FROM generate_series(1, 3000)"
    )
    edit = "UPDATE tasks SET priority = 3, category = 'technical', deadline_at = '2100-01-01'"
    async with holding(database, edit) as person:
        taken = [await probe.must_claim() for _ in range(20)]
        assert min(one.task_id for one in taken) > 200, "the first 200 are locked as in any edit"
        await person.run("COMMIT")
    await probe.unclaim(taken[0])
    assert await probe.settle(taken[1]) == "solved"
    while await probe.value("SELECT apply_edits()"):
        pass
    queued = await probe.all(
        "SELECT category, priority, deadline_at::text AS deadline, count(*) AS n FROM queue GROUP BY 1, 2, 3"
    )
    assert [(row["category"], row["priority"], row["n"]) for row in queued] == [("technical", 3, 2999)]
    assert queued[0]["deadline"].startswith("2100")
    assert (await probe.must_claim("technical")).category == "technical"
    await probe.assert_counts_exact()


async def test_an_edit_of_many_tasks_waits_for_a_locked_queue_row(probe: Probe, database: str) -> None:
    await probe.run("INSERT INTO tasks (prompt) SELECT 'p' FROM generate_series(1, 300)")
    await probe.run("UPDATE tasks SET priority = 2")
    async with holding(database, "SELECT FROM queue WHERE task_id = 300 FOR UPDATE"):
        assert await probe.value("SELECT apply_edits()") == 100
        assert await probe.value("SELECT count(*) FROM queue_edits") == 1
    await probe.run("SELECT apply_edits()")
    assert await probe.value("SELECT count(*) FROM queue WHERE priority = 2") == 300


WAITS = {
    "settle_call": "SELECT settle_call('{call}', 'answered', 'a')",
    "settle_call of a failure": "SELECT settle_call('{call}', 'error')",
    "settle_request_call": "SELECT settle_request_call('{call}', 'answered', 'a', 1, 1, 0, 1, NULL, {task},"
    " 'm1', 'asked', 3::smallint, 1, 0, false)",
    "discard_result": "SELECT discard_result('{call}', 'answered', {task}, 'too long', 1, 0, 1, 1)",
    "reject_claim": "SELECT reject_claim('{call}', 'unreadable')",
    "unclaim": "SELECT unclaim('{call}')",
    "complete_deadline": "SELECT complete_deadline({task}, 1, 1)",
    "claim_task": "SELECT claim_task('m1', NULL, 'w1', uuidv7())",
    "claim_uncategorized": "SELECT claim_uncategorized(10)",
    "claim_due_deadlines": "SELECT claim_due_deadlines(1, 1, 10)",
    "release_worker": "SELECT release_worker('w1')",
    "release_lost_claims": "SELECT release_lost_claims()",
    "reconcile": "SELECT reconcile(0)",
    "apply_edits": "SELECT apply_edits()",
    "begin_request": "SELECT begin_request('p', 10, uuidv7(), 'm1', 'asked', 3::smallint, 'general', NULL,"
    " 'w1', 1, 'm1', NULL)",
}


@pytest.mark.parametrize("lock", ["row", "table"])
async def test_no_function_waits_longer_than_200_ms_for_a_lock(
    probe: Probe, database: str, lock: str
) -> None:
    task_id = await probe.add()
    call = (await probe.must_claim()).call_id
    held = {
        "row": (f"UPDATE tasks SET priority = 1 WHERE id = {task_id}", "SELECT FROM queue FOR UPDATE"),
        "table": ("LOCK TABLE tasks IN ACCESS EXCLUSIVE MODE",),
    }[lock]
    slow: dict[str, float] = {}
    async with holding(database, *held):
        for name, statement in WAITS.items():
            began = time.monotonic()
            with suppress(asyncpg.PostgresError):
                await probe.connection.execute(statement.format(call=call, task=task_id), timeout=20)
            if (took := time.monotonic() - began) > 2:  # 200 ms, on a busy machine
                slow[name] = took
    assert not slow


# Lanes.


async def test_empty_lanes_are_removed_and_come_back(probe: Probe) -> None:
    await probe.run(
        "INSERT INTO tasks (prompt, category, priority) SELECT 'p', c, p"
        " FROM unnest('{general,technical,creative}'::text[]) AS c, generate_series(-9, 9) AS p"
    )
    assert await probe.value("SELECT count(*) FROM queue_lanes") == 57
    await probe.run("DELETE FROM tasks WHERE priority <> 0")
    for _ in range(3):
        await probe.run("SELECT close_empty_lanes()")
    assert await probe.value("SELECT count(*) FROM queue_lanes") == 3
    back = await probe.add(priority=7, category="technical")
    assert (await probe.must_claim()).task_id == back


async def test_a_lane_that_an_open_transaction_fills_is_not_removed(probe: Probe, database: str) -> None:
    task_id = await probe.add(priority=4)
    await probe.run(f"DELETE FROM tasks WHERE id = {task_id}")
    async with holding(database, "INSERT INTO tasks (prompt, priority) VALUES ('p', 4)") as producer:
        for _ in range(5):
            await probe.run("SELECT close_empty_lanes()")
        assert await probe.value("SELECT count(*) FROM queue_lanes") == 1
        await producer.run("COMMIT")
    await probe.run("SELECT close_empty_lanes()")
    assert await probe.claim() is not None


@pytest.mark.parametrize("come_back", ["unclaim", "retry", "wait", "reconcile"])
async def test_a_task_that_becomes_ready_in_a_removed_lane_is_claimed(probe: Probe, come_back: str) -> None:
    await probe.add(priority=2)
    taken = await probe.must_claim()
    if come_back == "wait":
        await probe.settle(taken, "error")
    for _ in range(3):
        await probe.run("SELECT close_empty_lanes()")
    assert await probe.value("SELECT count(*) FROM queue_lanes") == 0
    if come_back == "unclaim":
        await probe.unclaim(taken)
    elif come_back == "retry":
        await probe.settle(taken, "rate_limited", counted=False)
    elif come_back == "wait":
        await probe.wake()
    else:
        await probe.unclaim(taken)
        await probe.run("DELETE FROM queue_lanes")
        await probe.reconcile()
    assert await probe.claim(model="m2") is not None


# Lost claims.


async def test_lost_claims_cost_no_attempt_and_end_after_a_bound_of_their_own(probe: Probe) -> None:
    task_id = await probe.add()
    await probe.run("UPDATE queue_settings SET max_lost_claims = 7")
    for death in range(7):
        await probe.run("UPDATE queue SET wake_at = now() WHERE state = 'waiting'")
        await probe.run("SELECT promote_waiting()")
        taken = await probe.must_claim(worker=f"w{death}", model="m-dying")
        assert taken.attempt == 1, "as if it was never sent"
        await probe.lose_lease(f"w{death}")
        if death < 6:
            assert (await probe.task(task_id))["status"] == "unsolved"
    task = await probe.task(task_id)
    assert task["status"] == "failed"
    assert "m-dying: lost" in task["failure"]
    assert "unknown" not in task["failure"]
    assert "7 claims" in task["failure"]
    await probe.assert_counts_exact()


async def test_five_deaths_of_a_worker_fail_nothing(probe: Probe) -> None:
    await probe.run("INSERT INTO tasks (prompt) SELECT 'p' FROM generate_series(1, 30)")
    for death in range(5):
        await probe.run("UPDATE queue SET wake_at = now() WHERE state = 'waiting'")
        await probe.run("SELECT promote_waiting()")
        for _ in range(30):
            await probe.must_claim(worker=f"w{death}")
        await probe.lose_lease(f"w{death}")
    assert await probe.value("SELECT count(*) FROM tasks WHERE status = 'unsolved'") == 30


# Rows that cannot be worked on.


async def _without_triggers(probe: Probe, statement: str, *arguments: Any) -> None:
    async with probe.connection.transaction():
        await probe.run("SET LOCAL session_replication_role = replica")
        await probe.run(statement, *arguments)


@pytest.mark.parametrize("status", ["solved", "failed", "deleted"])
async def test_a_claim_counts_a_task_that_ended_without_triggers(probe: Probe, status: str) -> None:
    ended, other = await probe.add(category="technical"), await probe.add()
    change = "DELETE FROM tasks" if status == "deleted" else f"UPDATE tasks SET status = '{status}'"
    await _without_triggers(probe, f"{change} WHERE id = {ended}")
    assert (await probe.must_claim("technical", "general")).task_id == other
    assert await probe.queued(ended) is None
    await probe.assert_counts_exact()


async def test_many_tasks_that_ended_without_triggers_hide_no_other(probe: Probe) -> None:
    await probe.run("INSERT INTO tasks (prompt) SELECT 'p' FROM generate_series(1, 200)")
    await _without_triggers(probe, "UPDATE tasks SET status = 'solved' WHERE id <= 199")
    claims = [await probe.claim() for _ in range(5)]
    assert [taken.task_id for taken in claims if taken] == [200]
    await probe.assert_counts_exact()


@pytest.mark.parametrize("prompt", [" ", "x" * 2_000_000], ids=["blank", "2 MB"])
async def test_a_prompt_that_cannot_be_sent_fails_its_task_at_the_claim(probe: Probe, prompt: str) -> None:
    poison, other = await probe.add(), await probe.add()
    await _without_triggers(probe, "UPDATE tasks SET prompt = $1 WHERE id = $2", prompt, poison)
    claims = [await probe.claim(), await probe.claim()]
    assert [
        taken.task_id for taken in claims if taken and len(taken.prompt) < 100 and taken.prompt.strip()
    ] == [other]
    if len(prompt) > 100:
        task = await probe.task(poison)
        assert (task["status"], await probe.queued(poison)) == ("failed", None)
        assert "2000000 bytes" in task["failure"]
    await probe.assert_counts_exact()


async def test_a_poison_row_that_cannot_even_fail_waits_and_stops_no_other(probe: Probe) -> None:
    await probe.run("UPDATE queue_settings SET max_prompt_bytes = 10, max_lost_claims = 1")
    poison = await probe.add("short")
    await _without_triggers(probe, "UPDATE tasks SET prompt = 'longer than that'")
    await probe.run("ALTER TABLE tasks ADD CONSTRAINT never_fails CHECK (status <> 'failed')")
    other = await probe.add()
    assert (await probe.must_claim()).task_id == other
    queued = await probe.queued(poison)
    assert queued is not None
    assert queued["state"] == "waiting"
    assert await probe.lose_lease() == 1, "one that refuses to fail"
    queued = await probe.queued(other)
    assert queued is not None
    assert queued["state"] == "waiting"


async def test_an_answer_that_cannot_be_stored_fails_its_task_and_is_not_asked_again(probe: Probe) -> None:
    task_id = await probe.add()
    taken = await probe.must_claim()
    settled = await probe.value(
        "SELECT discard_result($1, 'answered', $2, 'the answer is too long', 1.5, 0.01, 3, 4)",
        taken.call_id, task_id,
    )  # fmt: skip
    assert settled == "failed"
    task, call = await probe.task(task_id), await probe.call(taken.call_id)
    assert (task["status"], task["failure"]) == ("failed", "the answer is too long")
    assert (call["outcome"], call["settlement"], call["tokens"], float(call["cost"])) == (
        "answered",
        "failed",
        7,
        0.01,
    )
    assert await probe.claim() is None
    await probe.assert_counts_exact()


async def test_a_claim_that_cannot_be_read_fails_its_task(probe: Probe) -> None:
    task_id = await probe.add()
    taken = await probe.must_claim()
    assert await probe.value("SELECT reject_claim($1, 'byte 3 is not UTF-8')", taken.call_id)
    assert (await probe.task(task_id))["failure"] == "byte 3 is not UTF-8"
    assert await probe.value("SELECT count(*) FROM model_calls") == 0
    assert not await probe.value("SELECT reject_claim($1, 'again')", taken.call_id)
    await probe.assert_counts_exact()
