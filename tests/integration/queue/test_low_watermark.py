"""The low-water mark of a lane: it keeps claims cheap, and never hides a ready task."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from typing import Any

import pytest

from router.task import new_call_id
from tests.support.queue import Probe, probing

RETURNED = -(2**62)


async def test_the_watermark_advances_in_two_steps(probe: Probe) -> None:
    await probe.run("SELECT setseed(0)")  # claims advance the watermark at random
    for _ in range(5):
        await probe.add()
    for _ in range(3):
        await probe.must_claim()
    assert await probe.low_watermark() == 1
    await probe.advance_low_watermark()
    assert await probe.low_watermark() == 1, "the first step only records a candidate"
    await probe.advance_low_watermark()
    assert await probe.low_watermark() == 4
    assert await probe.claim() is not None
    assert await probe.claim() is not None


async def test_an_open_insert_holds_the_watermark_back(probe: Probe, database: str) -> None:
    assert await _history_with_a_slow_insert(probe, database), "the slow task was hidden below the watermark"


async def test_without_blocking_transactions_the_watermark_would_hide_a_task(
    probe: Probe, database: str
) -> None:
    # The same history without the check for blocking transactions.
    source = await probe.value("SELECT pg_get_functiondef('advance_low_watermark'::regproc)")
    unguarded = source.replace("coalesce(array_agg(l.virtualtransaction), '{}')", "'{}'::text[]")
    assert unguarded != source
    await probe.run(unguarded)
    assert not await _history_with_a_slow_insert(probe, database)


async def _history_with_a_slow_insert(probe: Probe, database: str) -> bool:
    """Commits an insert after later ones were claimed. Returns whether its task can be claimed."""
    async with probing(database) as slow:
        transaction = slow.connection.transaction()
        await transaction.start()
        hidden = await slow.add("slow")
        for _ in range(3):
            await probe.add("quick")
        for _ in range(3):
            await probe.must_claim()
        for _ in range(4):
            await probe.advance_low_watermark()
        await transaction.commit()
    for _ in range(2):
        await probe.advance_low_watermark()
    taken = await probe.claim()
    return taken is not None and taken.task_id == hidden


async def test_a_rolled_back_claim_is_not_below_the_watermark(probe: Probe, database: str) -> None:
    first = await probe.add()
    await probe.add()
    async with probing(database) as other:
        transaction = other.connection.transaction()
        await transaction.start()
        assert (await other.must_claim(worker="w2")).task_id == first
        await probe.must_claim()
        for _ in range(4):
            await probe.advance_low_watermark()
        await transaction.rollback()
    assert (await probe.must_claim()).task_id == first


async def test_an_old_snapshot_never_advances_the_watermark(probe: Probe, database: str) -> None:
    # Its snapshot does not contain rows committed since.
    await probe.add()
    async with probing(database) as old, old.connection.transaction(isolation="repeatable_read"):
        assert await old.value("SELECT count(*) FROM queue") == 1
        await probe.must_claim()
        hidden = await probe.add()
        for _ in range(4):
            await old.advance_low_watermark()
    assert (await probe.must_claim()).task_id == hidden


async def test_requeued_tasks_have_a_watermark_of_their_own(probe: Probe) -> None:
    for _ in range(10):
        await probe.add()
    for _ in range(5):
        for taken in [await probe.must_claim() for _ in range(3)]:
            await probe.unclaim(taken)
    for _ in range(2):
        await probe.advance_low_watermark(came_back=True)
        await probe.advance_low_watermark()
    assert RETURNED < await probe.low_watermark(came_back=True) < 0
    assert await probe.low_watermark() == 4
    assert {(await probe.must_claim()).task_id for _ in range(10)} == set(range(1, 11))


async def test_the_watermark_advances_in_a_lane_emptied_by_a_delete(probe: Probe) -> None:
    await probe.run("INSERT INTO tasks (prompt, priority) SELECT 'p', 5 FROM generate_series(1, 1000)")
    await probe.run("DELETE FROM tasks")
    await probe.run("SELECT setseed(0.5)")
    await probe.run("INSERT INTO tasks (prompt) SELECT 'p' FROM generate_series(1, 600)")
    for _ in range(600):
        await probe.must_claim()
    assert await probe.low_watermark(priority=5) > 1000


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.soak)])
async def test_no_ready_task_is_hidden_under_stress(  # noqa: C901 - three concurrent programs
    probe: Probe, database: str, seed: int
) -> None:
    dice = random.Random(seed)
    until = time.monotonic() + 5
    claimed: set[int] = set()

    async def produce() -> None:
        async with probing(database) as p:
            while time.monotonic() < until:
                transaction = p.connection.transaction()
                await transaction.start()
                for _ in range(dice.randint(1, 4)):
                    await p.add(priority=dice.randint(0, 1), category=dice.choice(["general", "technical"]))
                    await asyncio.sleep(dice.random() * 0.05)
                await (transaction.rollback() if dice.random() < 0.3 else transaction.commit())

    async def claim(name: str) -> None:
        async with probing(database) as p:
            await p.run("SET synchronous_commit = off")
            while time.monotonic() < until:
                for category in ("general", "technical"):
                    for came_back in (False, True):
                        await p.advance_low_watermark(category, dice.randint(0, 1), came_back=came_back)
                taken = await p.claim(worker=name)
                if taken is None:
                    await asyncio.sleep(0.005)
                elif dice.random() < 0.3:
                    await p.unclaim(taken)
                else:
                    claimed.add(taken.task_id)
                    await p.settle(taken)

    async def edit() -> None:
        async with probing(database) as p:
            while time.monotonic() < until:
                await p.run(
                    "UPDATE tasks SET priority = 1 - priority WHERE id = (SELECT id FROM tasks"
                    " WHERE status = 'unsolved' ORDER BY random() LIMIT 1)"
                )
                await asyncio.sleep(0.01)

    await asyncio.gather(*(produce() for _ in range(3)), *(claim(f"w{n}") for n in range(3)), edit())
    while (taken := await probe.claim()) is not None:
        claimed.add(taken.task_id)
        await probe.settle(taken)
    assert len(claimed) > 50
    assert await probe.value("SELECT count(*) FROM tasks WHERE status <> 'solved'") == 0, (
        "a ready task was hidden"
    )
    assert await probe.value("SELECT count(*) FROM queue") == 0
    await probe.assert_counts_exact()


# A held snapshot keeps dead index entries. The cost of a claim is measured in pages read.


async def _pages_of(probe: Probe, statement: str) -> int:
    plan = json.loads(await probe.value(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}"))[0]["Plan"]
    return int(plan["Shared Hit Blocks"]) + int(plan["Shared Read Blocks"])


async def _pages_of_a_claim(probe: Probe) -> int:
    statement = f"SELECT * FROM claim_task('m', '{{general}}', 'w1', '{new_call_id(time.time())}')"
    pages = [await _pages_of(probe, statement.replace(statement[-14:-2], f"{n:012x}")) for n in range(5)]
    return sorted(pages)[2]


async def _claim_and_settle(probe: Probe, tasks: int) -> None:
    # On the server, one transaction per task.
    await probe.run(
        """CREATE OR REPLACE PROCEDURE drain(n integer) LANGUAGE plpgsql AS $$
        DECLARE id uuid;
        BEGIN
            FOR i IN 1 .. n LOOP
                id := uuidv7();
                PERFORM claim_task('m', '{general}', 'w1', id);
                COMMIT;
                PERFORM set_config('synchronous_commit', 'off', false);
                PERFORM settle_call(id, 'answered', 'a');
                COMMIT;
            END LOOP;
        END $$"""
    )
    await probe.connection.execute(f"CALL drain({tasks})", timeout=170)


async def test_claims_stay_cheap_while_a_snapshot_is_held(probe: Probe, database: str) -> None:
    await probe.run("INSERT INTO tasks (prompt) SELECT 'p' FROM generate_series(1, 21000)")
    fresh = await _pages_of_a_claim(probe)
    async with probing(database) as reader, reader.connection.transaction(isolation="repeatable_read"):
        await reader.value("SELECT count(*) FROM queue")
        await _claim_and_settle(probe, 20_000)
        await probe.run("SELECT compact_counts()")
        assert await _pages_of_a_claim(probe) < fresh + 25, "claims scan dead entries"
        # None of the 20,000 compacted deltas is read again, although all are still stored.
        assert await _pages_of(probe, "SELECT * FROM task_counts_now") < 20
        assert await probe.value("SELECT pg_relation_size('task_count_deltas') / 8192") > 100


@pytest.mark.soak
async def test_claims_without_a_watermark_get_expensive(probe: Probe, database: str) -> None:
    await probe.run("INSERT INTO tasks (prompt) SELECT 'p' FROM generate_series(1, 6000)")
    fresh = await _pages_of_a_claim(probe)
    await probe.run(
        "CREATE OR REPLACE FUNCTION router.advance_low_watermark("
        " p_category text, p_priority smallint, p_came_back boolean, p_client text DEFAULT '*')"
        " RETURNS void LANGUAGE sql AS 'SELECT'"
    )
    async with probing(database) as reader, reader.connection.transaction(isolation="repeatable_read"):
        await reader.value("SELECT count(*) FROM queue")
        await _claim_and_settle(probe, 5000)
        assert await _pages_of_a_claim(probe) > fresh + 60


# Plans: a session keeps those made while the tables were nearly empty.


async def _plans(probe: Probe, statement: str) -> str:
    messages: list[str] = []
    probe.connection.add_log_listener(lambda _connection, message: messages.append(message.message))
    await probe.run("LOAD 'auto_explain'")
    for setting, value in [
        ("log_min_duration", "0"), ("log_nested_statements", "on"), ("log_level", "notice"),
    ]:  # fmt: skip
        await probe.run(f"SET auto_explain.{setting} = {value}")
    await probe.run(statement)
    await probe.run("SET auto_explain.log_min_duration = -1")
    await asyncio.sleep(0)
    return "\n".join(messages)


def _scans_of(plans: str, table: str) -> set[str]:
    return {match.strip() for match in re.findall(rf"->\s+(.*? on {table}\b.*?)\s+\(cost", plans)}


@pytest.mark.parametrize("size", ["nearly empty", "large"])
async def test_plans_use_the_intended_index(probe: Probe, size: str) -> None:
    tasks = 3 if size == "nearly empty" else 5000
    await probe.run("INSERT INTO tasks (prompt) SELECT 'p' FROM generate_series(1, $1)", tasks)
    await probe.run("VACUUM ANALYZE")
    claim: Any = await _plans(
        probe, f"SELECT * FROM claim_task('m', '{{general}}', 'w1', '{new_call_id(time.time())}')"
    )
    scans = _scans_of(claim, "queue")
    assert "Index Scan using queue_ready on queue r" in scans
    assert not [scan for scan in scans if "Seq Scan" in scan or "Bitmap" in scan], scans
    assert 'Sort Key: q."position"' not in claim

    promote = await _plans(probe, "SELECT promote_waiting()")
    assert "Index Scan using queue_waiting on queue q" in _scans_of(promote, "queue")

    call_id = await probe.value("SELECT call_id FROM queue WHERE state = 'claimed'")
    settle = await _plans(probe, f"SELECT settle_call('{call_id}', 'answered', 'a')")
    assert "Index Scan using queue_pkey on queue q" in _scans_of(settle, "queue")
    assert "Seq Scan" not in settle.replace("Seq Scan on queue_settings", "")

    await probe.must_claim()
    release = await _plans(probe, "SELECT release_claims('w1', 10)")
    assert "Index Scan using queue_claimed on queue q" in _scans_of(release, "queue")
