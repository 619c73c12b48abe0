"""Producers INSERT INTO tasks: each task is queued, or fails with its reason, and is counted."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from tests.support.queue import Probe, probing


async def test_an_insert_is_queued_counted_and_notified_once(probe: Probe, database: str) -> None:
    heard: list[str] = []
    listener = await asyncpg.connect(database)
    told = asyncio.Event()

    def hear(_connection: object, _pid: int, channel: str, _payload: str) -> None:
        heard.append(channel)
        told.set()

    await listener.add_listener("router_tasks", hear)
    task_id = await probe.add("What is a monad?")
    await asyncio.wait_for(told.wait(), 5)
    await listener.close()

    queued = await probe.queued(task_id)
    assert queued is not None
    assert (queued["state"], queued["category"], queued["priority"], queued["attempt"]) == (
        "ready",
        "general",
        0,
        0,
    )
    assert await probe.counts() == {"general": (1, 0, 0)}
    assert heard == ["router_tasks"]


async def test_a_bulk_insert_adds_one_counter_row(probe: Probe) -> None:
    await probe.run("INSERT INTO tasks (prompt) SELECT 'prompt ' || n FROM generate_series(1, 10000) AS n")
    assert await probe.value("SELECT count(*) FROM queue WHERE state = 'ready'") == 10_000
    assert await probe.value("SELECT count(*) FROM task_count_deltas") == 1
    await probe.assert_counts_exact()
    in_order = await probe.value(
        "SELECT bool_and(rises) FROM"
        " (SELECT position > lag(position) OVER (ORDER BY task_id) AS rises FROM queue) AS p"
    )
    assert in_order


async def test_copy_queues_tasks(probe: Probe) -> None:
    records = [(f"prompt {n}", "creative" if n % 2 else None, n % 3) for n in range(1000)]
    await probe.connection.copy_records_to_table(
        "tasks", records=records, columns=["prompt", "category", "priority"]
    )
    assert await probe.counts() == {"creative": (500, 0, 0), "general": (500, 0, 0)}
    await probe.assert_counts_exact()


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [("", "the prompt is empty"), (" \n\t ", "the prompt is empty"), ("x" * 10_000_000, "10000000 bytes")],
)
async def test_an_unsendable_prompt_fails_immediately_with_its_reason(
    probe: Probe, prompt: str, reason: str
) -> None:
    good = await probe.add("a good one")
    task_id = await probe.add(prompt)
    task = await probe.task(task_id)
    assert task["status"] == "failed"
    assert reason in task["failure"]
    assert await probe.queued(task_id) is None
    assert (await probe.must_claim()).task_id == good
    await probe.assert_counts_exact()


async def test_valid_and_invalid_rows_of_one_statement_are_separated(probe: Probe) -> None:
    await probe.run(
        "INSERT INTO tasks (prompt)"
        " SELECT CASE WHEN n % 3 = 0 THEN ' ' ELSE 'p' END FROM generate_series(1, 30) AS n"
    )
    assert await probe.counts() == {"general": (20, 0, 10)}
    await probe.assert_counts_exact()


async def test_a_null_prompt_is_refused(probe: Probe) -> None:
    with pytest.raises(asyncpg.NotNullViolationError):
        await probe.add(None)


async def test_an_unknown_category_is_queued_under_the_default(probe: Probe) -> None:
    task_id = await probe.add("p", category="no-such-thing")
    queued = await probe.queued(task_id)
    assert queued is not None
    assert queued["category"] == "general"
    assert (await probe.task(task_id))["category"] == "no-such-thing", "the producer's word stays"
    taken = await probe.must_claim()
    await probe.settle(taken)
    await probe.assert_counts_exact()


@pytest.mark.parametrize(("priority", "kept"), [(2_000_000_000, 9), (-2_000_000_000, -9), (None, 0), (4, 4)])
async def test_a_priority_out_of_range_is_clamped(probe: Probe, priority: int | None, kept: int) -> None:
    queued = await probe.queued(await probe.add("p", priority=priority))
    assert queued is not None
    assert queued["priority"] == kept


async def test_finished_tasks_are_counted_and_not_queued(probe: Probe) -> None:
    await probe.add("p", status="solved", answer="a")
    await probe.add("p", status="failed", category="creative")
    assert await probe.counts() == {"general": (0, 1, 0), "creative": (0, 0, 1)}
    assert await probe.claim() is None
    await probe.assert_counts_exact()


async def test_the_largest_max_tokens_does_not_overflow(probe: Probe) -> None:
    # An overflow of prompt bytes plus max_tokens would fail every claim at the head of the queue.
    task_id = await probe.add("p" * 1000, max_tokens=2**31 - 1)
    taken = await probe.must_claim()
    assert taken.task_id == task_id
    assert taken.reserved_tokens == 2**31 - 1


async def test_a_producer_needs_only_the_insert_privilege(probe: Probe, database: str) -> None:
    role = "only_inserts"
    if not await probe.value("SELECT 1 FROM pg_roles WHERE rolname = $1", role):
        await probe.run(f"CREATE ROLE {role}")
    await probe.run(f"GRANT INSERT ON tasks TO {role}")
    async with probing(database) as producer:
        await producer.run(f"SET ROLE {role}")
        await producer.run("INSERT INTO tasks (prompt) VALUES ('p'), ('')")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await producer.run("DELETE FROM queue")
    assert await probe.counts() == {"general": (1, 0, 1)}


async def test_a_producers_search_path_does_not_matter(probe: Probe, database: str) -> None:
    await probe.run(
        "CREATE SCHEMA elsewhere; CREATE TABLE elsewhere.queue (trap int);"
        " CREATE TABLE elsewhere.tasks (trap int)"
    )
    async with probing(database) as producer:
        await producer.run("SET search_path = elsewhere")
        await producer.run("INSERT INTO public.tasks (prompt) VALUES ('p')")
        await producer.run("UPDATE public.tasks SET prompt = 'q'")
    assert (await probe.must_claim()).prompt == "q"


async def test_a_rolled_back_insert_queues_nothing(probe: Probe) -> None:
    transaction = probe.connection.transaction()
    await transaction.start()
    await probe.add("p", category="technical", priority=3)
    await transaction.rollback()
    assert await probe.claim() is None
    assert await probe.counts() == {}


async def test_producers_that_add_lanes_in_different_order_do_not_deadlock(
    probe: Probe, database: str
) -> None:
    async with probing(database) as other:
        first, second = probe.connection.transaction(), other.connection.transaction()
        await first.start()
        await second.start()
        await probe.add("p", category="technical", priority=5)
        await other.add("p", category="creative", priority=5)
        await asyncio.wait_for(probe.add("p", category="creative", priority=5), 5)
        await asyncio.wait_for(other.add("p", category="technical", priority=5), 5)
        await first.commit()
        await second.commit()
    assert await probe.counts() == {"technical": (2, 0, 0), "creative": (2, 0, 0)}
    await probe.run("SELECT compact_counts()")
    assert await probe.value("SELECT count(*) FROM queue_lanes") == 2, "doubles are dropped"
    assert len([await probe.must_claim() for _ in range(4)]) == 4
