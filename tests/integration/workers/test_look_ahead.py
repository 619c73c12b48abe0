"""Number of tasks that a worker claims before it can send them; others cannot solve these."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from local.redis import RedisServer
from models_backend.process import BackendServer, start_backend
from router.database import connect, rows
from router.models.roster import sync_roster
from router.queue.task_queue import TaskQueue
from router.settings.environment import Addresses
from router.settings.models import ModelSettings
from router.settings.router import RouterConfig, WorkerSettings
from router.workers.engine import Engine
from router.workers.worker import Worker

BUSY, FREE, SLOW = "busy", "free", "slow"
TASKS = 120
LONG_POLL_SECONDS = 30.0
CALLS = "SELECT call_id FROM model_calls"
REQUEUED = "SELECT count(*) FROM queue WHERE position < 0"
OPEN_CALLS = "SELECT count(*) FROM model_calls WHERE model = $1 AND outcome IS NULL"


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendServer]:
    arguments = (
        "--time-scale",
        "50",
        "--latency",
        "even:1:10",
        "--also",
        BUSY,
        "--also",
        FREE,
        "--also",
        SLOW,
    )
    server = start_backend(tmp_path_factory.mktemp("backend"), *arguments)
    yield server
    server.stop()


@pytest.fixture
def addresses(
    bare_database: str, redis_server: RedisServer, redis_client: Any, backend: BackendServer
) -> Addresses:
    return Addresses(database_url=bare_database, redis_url=redis_server.url, backend_url=backend.url)


@asynccontextmanager
async def running(addresses: Addresses, **targets: str) -> AsyncIterator[Engine]:
    models = {name: ModelSettings(target=target, ranks={"general": 1}) for name, target in targets.items()}
    settings = RouterConfig(models=models, worker=WorkerSettings(poll_seconds=LONG_POLL_SECONDS))
    with connect(addresses.database_url) as connection:
        sync_roster(connection, settings)
        insertion = "INSERT INTO tasks (prompt) SELECT 'prompt ' || g FROM generate_series(1, %s) g"
        rows(connection, insertion, (TASKS,))
    engine = Engine(addresses, settings)
    await engine.start()
    workers = [Worker(engine, name, "run-1", frozenset(targets)).run() for name in targets]
    running_workers = [asyncio.create_task(worker) for worker in workers]
    try:
        yield engine
    finally:
        for task in running_workers:
            task.cancel()
        await asyncio.gather(*running_workers, return_exceptions=True)
        await engine.stop()


async def test_model_at_its_concurrency_limit_claims_only_what_it_sends_soon(addresses: Addresses) -> None:
    claimed: list[int] = []
    async with running(addresses, busy="4 at once, burst") as engine:
        ends_at = time.monotonic() + 30
        while engine.solved < TASKS // 2:
            assert time.monotonic() < ends_at
            claimed.append(engine.in_flight())
            await asyncio.sleep(0.01)
    # 4 in flight, 9 for a quarter of a second at 36 a second, one more, and those being settled.
    assert max(claimed) <= 30, max(claimed)


async def test_slow_model_claims_a_task_only_when_it_can_send_it(
    addresses: Addresses,
) -> None:
    async with running(addresses, slow="30/min") as engine:
        ends_at = time.monotonic() + 20
        while len(await engine.pool.fetch(CALLS)) < 3:
            assert time.monotonic() < ends_at
            assert await engine.pool.fetchval(REQUEUED) == 0, "a claim was requeued before it could be sent"
            await asyncio.sleep(0.02)


async def test_requeued_task_wakes_an_idle_worker(addresses: Addresses) -> None:
    async with running(addresses, busy="1 at once, burst") as engine:
        queue: TaskQueue = engine.queue
        claimed = []
        while (claim := await queue.claim(FREE, ["general"], max_tokens=100)) is not None:
            claimed.append(claim)
        ends_at = time.monotonic() + LONG_POLL_SECONDS / 3
        while await engine.pool.fetchval(OPEN_CALLS, BUSY) or engine.in_flight():
            assert time.monotonic() < ends_at
            await asyncio.sleep(0.02)
        solved = engine.solved
        await asyncio.sleep(0.5)  # the worker found nothing and waits for a notification
        assert engine.solved == solved
        await queue.unclaim(claimed[0].call_id)
        while engine.solved == solved:
            assert time.monotonic() < ends_at, "the worker was not woken"
            await asyncio.sleep(0.02)
