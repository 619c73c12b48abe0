"""The engine and its workers, on a real PostgreSQL, a real Redis and a real Models Backend process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import requests

from local.redis import RedisServer
from models_backend.process import BackendServer, start_backend
from router.database import connect, migrate, rows
from router.engine import Engine
from router.roster import sync_roster
from router.settings import Addresses, ModelSettings, RouterConfig, WorkerSettings
from router.worker import Worker

MODELS = ("llama-3.1-8b", "phi-4")


def config(**targets: str) -> RouterConfig:
    models = {
        name: ModelSettings(target=targets.get(name, "50/s"), ranks={"general": place, "technical": 3 - place})
        for place, name in enumerate(MODELS, start=1)
    }
    worker = WorkerSettings(idle_leave_seconds=1.0, lease_seconds=2.0, heartbeat_seconds=0.5, retry_base_seconds=0.1,
                            retry_cap_seconds=0.3)  # fmt: skip
    return RouterConfig(models=models, worker=worker)


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[BackendServer]:
    server = start_backend(tmp_path, "--time-scale", "50", "--latency", "even:1:10")
    yield server
    server.stop()


@pytest.fixture
def addresses(empty_database: str, redis_server: RedisServer, redis_client: Any, backend: BackendServer) -> Addresses:
    migrate(empty_database)
    return Addresses(database_url=empty_database, redis_url=redis_server.url, backend_url=backend.url)


@asynccontextmanager
async def running(addresses: Addresses, settings: RouterConfig) -> AsyncIterator[Engine]:
    with connect(addresses.database_url) as connection:
        sync_roster(connection, settings)
    engine = Engine(addresses, settings)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def insert(addresses: Addresses, count: int, category: str | None = None) -> None:
    with connect(addresses.database_url) as connection:
        rows(connection, "INSERT INTO tasks (prompt, category) SELECT 'prompt ' || g, %s FROM generate_series(1, %s) g",
             (category, count))  # fmt: skip


def ask(addresses: Addresses, statement: str, *arguments: Any) -> list[dict[str, Any]]:
    with connect(addresses.database_url) as connection:
        return rows(connection, statement, arguments)


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "the condition did not come true"
        await asyncio.sleep(0.05)
    return time.monotonic() - started


def solved(addresses: Addresses) -> int:
    return int(ask(addresses, "SELECT count(*) AS n FROM tasks WHERE status = 'solved'")[0]["n"])


async def test_every_task_is_solved_once_by_the_right_call(addresses: Addresses, backend: BackendServer) -> None:
    insert(addresses, 60)
    async with running(addresses, config()) as engine:
        reasons = await asyncio.wait_for(
            asyncio.gather(*(Worker(engine, model, "run-1", frozenset(MODELS)).run() for model in MODELS)), 30
        )
    assert reasons == ["the queue was empty"] * 2
    assert solved(addresses) == 60
    calls = ask(addresses, "SELECT outcome, settlement, late, count(*) AS n FROM model_calls GROUP BY 1, 2, 3")
    by_settlement = {row["settlement"]: row["n"] for row in calls if not row["late"]}
    assert by_settlement.pop("solved") == 60
    assert set(by_settlement) <= {"retry"}  # the stand-in's models sometimes answer with nothing
    backend.stop()
    assert sorted(a["request_id"] for a in backend.arrivals()) == sorted(
        str(row["call_id"]) for row in ask(addresses, "SELECT call_id FROM model_calls")
    )
