"""`router.queue.TaskQueue`, the workers' client."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import asyncpg
import pytest

from router.database import open_pool
from router.errors import DatabaseError, LeaseLost
from router.queue import TaskQueue, listening
from router.task import CallResult, Outcome
from tests.support.queue import Probe

GOOD = CallResult(
    Outcome.ANSWERED,
    answer="an answer",
    prompt_tokens=3,
    completion_tokens=4,
    cost_usd=0.001,
    latency_seconds=0.5,
)


@pytest.fixture
async def pool(database: str) -> AsyncIterator[asyncpg.Pool]:
    opened = await open_pool(database, connections=4)
    yield opened
    await opened.close()


@pytest.fixture
async def queue(pool: asyncpg.Pool) -> TaskQueue:
    started = TaskQueue(pool, host="here")
    await started.renew_lease()
    return started


async def test_claim_and_settle_transfer_all_fields(queue: TaskQueue, probe: Probe) -> None:
    task_id = await probe.add("Why?", category="technical")
    claim = await queue.claim("m1", ["technical"], max_tokens=100)
    assert claim is not None
    assert (claim.task_id, claim.prompt, claim.category, claim.attempt, claim.max_tokens) == (
        task_id,
        "Why?",
        "technical",
        1,
        100,
    )
    assert await queue.claim("m1", ["technical"], max_tokens=100) is None
    assert await queue.settle(claim, GOOD) == "solved"
    call = await probe.call(claim.call_id)
    assert (call["tokens"], float(call["cost"]), call["latency_seconds"], call["worker"]) == (
        7,
        0.001,
        0.5,
        queue.worker,
    )


@pytest.mark.parametrize(
    "ugly",
    [
        replace(GOOD, answer="a NUL \x00 inside"),
        replace(GOOD, answer="half a pair \ud800"),
        replace(GOOD, prompt_tokens=10**12),
        replace(GOOD, completion_tokens=-5),
        replace(GOOD, cost_usd=float("nan"), latency_seconds=float("inf")),
    ],
    ids=["nul", "surrogate", "huge", "negative", "nan"],
)
async def test_values_that_postgres_cannot_store_are_replaced(
    queue: TaskQueue, probe: Probe, ugly: CallResult
) -> None:
    await probe.add()
    claim = await queue.claim("m1", ["general"], max_tokens=100)
    assert claim is not None
    assert await asyncio.wait_for(queue.settle(claim, ugly), 5) == "solved"


async def test_a_result_that_postgres_refuses_fails_its_task_and_is_not_retried(
    queue: TaskQueue, probe: Probe
) -> None:
    task_id = await probe.add()
    claim = await queue.claim("m1", ["general"], max_tokens=100)
    assert claim is not None
    await probe.run(
        "ALTER TABLE tasks ADD CHECK (answer <> 'refused by a constraint of the operator''s own')"
    )
    refused = replace(GOOD, answer="refused by a constraint of the operator's own")
    assert await asyncio.wait_for(queue.settle(claim, refused), 5) == "failed"
    failure = (await probe.task(task_id))["failure"]
    assert "the result of m1 could not be stored" in failure
    assert "Failing row" not in failure, "it contains the prompt"
    assert await queue.claim("m2", ["general"], max_tokens=100) is None
    assert (await probe.call(claim.call_id))["outcome"] == "answered"


async def test_database_time_does_not_depend_on_the_local_clock(
    queue: TaskQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)
    assert abs(queue.database_time() - real()) < 5
    assert await queue.heartbeat()
    assert abs(queue.database_time() - real()) < 5


async def test_a_worker_continues_under_a_new_name_after_its_lease_expired(
    queue: TaskQueue, probe: Probe
) -> None:
    await probe.add()
    await probe.lose_lease(queue.worker)
    with pytest.raises(LeaseLost):
        await queue.claim("m1", ["general"], max_tokens=100)
    assert await queue.heartbeat() is False
    old = queue.worker
    queue.rename(queue.worker)
    assert queue.worker != old
    assert await queue.heartbeat()
    assert await queue.claim("m1", ["general"], max_tokens=100) is not None


async def test_renewing_a_lost_lease_begins_one_under_a_new_name(queue: TaskQueue, probe: Probe) -> None:
    lost = queue.worker
    await probe.lose_lease(lost)
    await queue.renew_lease()
    assert queue.worker != lost
    assert await queue.claim("m1", ["general"], max_tokens=100) is None


async def test_concurrent_renames_rename_once(queue: TaskQueue) -> None:
    lost = queue.worker
    queue.rename(lost)
    renamed = queue.worker
    queue.rename(lost)
    assert queue.worker == renamed != lost


async def test_a_cancelled_claim_is_released(queue: TaskQueue, probe: Probe) -> None:
    for _ in range(20):
        await probe.add()
    for n in range(20):
        claiming = asyncio.create_task(queue.claim("m1", ["general"], max_tokens=100))
        await asyncio.sleep(0.0005 * n)
        claiming.cancel()
        await asyncio.gather(claiming, return_exceptions=True)
        if not claiming.cancelled() and (claim := claiming.result()) is not None:
            await queue.unclaim(claim.call_id)
    deadline = time.monotonic() + 5
    while await probe.value("SELECT count(*) FROM queue WHERE state = 'ready'") < 20:
        assert time.monotonic() < deadline, "a cancelled claim kept its task"
        await asyncio.sleep(0.01)
    assert await probe.value("SELECT max(attempt) FROM queue") == 0


async def test_release_returns_all_claims(queue: TaskQueue, probe: Probe) -> None:
    for _ in range(3):
        await probe.add()
        await queue.claim("m1", ["general"], max_tokens=100)
    await queue.release()
    assert await probe.value("SELECT count(*) FROM queue WHERE state = 'ready'") == 3


async def test_orphaned_claims_are_released_by_their_worker(queue: TaskQueue, probe: Probe) -> None:
    for _ in range(2):
        await probe.add()
    kept = await queue.claim("m1", ["general"], max_tokens=100)
    assert await queue.claim("m1", ["general"], max_tokens=100) is not None  # its reply is lost
    assert kept is not None
    assert await queue.release_orphaned_claims({kept.call_id}) == 0, "too young to tell"
    await probe.run("UPDATE queue SET claimed_at = claimed_at - interval '2 min'")
    assert await queue.release_orphaned_claims({kept.call_id}) == 1
    assert await queue.settle(kept, GOOD) == "solved"
    assert await probe.value("SELECT state FROM queue") == "ready"


async def test_maintenance_promotes_releases_and_compacts(queue: TaskQueue, probe: Probe) -> None:
    retried, lost = await probe.add(), await probe.add()
    await probe.settle(await probe.must_claim(), "error")
    await probe.must_claim(worker="dead")
    await probe.run("UPDATE queue SET wake_at = clock_timestamp() WHERE state = 'waiting'")
    await probe.run("UPDATE workers SET lease_until = clock_timestamp() WHERE worker = 'dead'")
    await queue.run_maintenance()
    assert await probe.value(
        "SELECT array_agg(task_id ORDER BY task_id) FROM queue WHERE state = 'ready'"
    ) == [retried, lost]
    assert await probe.value("SELECT count(*) FROM task_count_deltas") == 0
    await queue.create_partitions()


async def test_state_reads_pause_runs_and_backlog(queue: TaskQueue, probe: Probe) -> None:
    await probe.run(
        "INSERT INTO tasks (prompt, category) VALUES ('p', 'technical'), ('p', 'technical'), ('p', NULL)"
    )
    await probe.run("SELECT begin_run('r1')")
    assert await queue.finish_run("r1", "the queue was empty") == "the queue was empty"
    assert await queue.finish_run("r1", "another reason") == "the queue was empty"
    state = await queue.state(["r1", "r2"])
    assert state.left_runs == {"r1": "the queue was empty"}
    assert json.loads(json.dumps(state.unsolved)) == {"technical": 2, "general": 1}
    assert not state.held


async def test_reconcile_steps_end(queue: TaskQueue, probe: Probe) -> None:
    await probe.run("INSERT INTO tasks (prompt) SELECT 'p' FROM generate_series(1, 7000)")
    steps: list[int | None] = [-(2**62)]
    while steps[-1] is not None:
        steps.append(await queue.reconcile_step(steps[-1]))
    assert steps == [-(2**62), 5000, None]


async def test_listeners_are_notified_of_new_tasks(database: str, probe: Probe) -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()
    async with listening(database, heard.put_nowait):
        await probe.add()
        assert await asyncio.wait_for(heard.get(), 5) == "router_tasks"


async def test_an_unavailable_postgres_raises_database_error(
    pool: asyncpg.Pool, queue: TaskQueue, probe: Probe
) -> None:
    waiting = asyncio.create_task(queue._one("SELECT pg_sleep(60)"))
    mine = "FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'SELECT pg_sleep%'"
    while not await probe.value(f"SELECT count(*) {mine}"):
        await asyncio.sleep(0.01)
    await probe.run(f"SELECT pg_terminate_backend(pid) {mine}")
    with pytest.raises(DatabaseError):
        await waiting
    assert await queue.heartbeat(), "and the next one finds a new connection"
