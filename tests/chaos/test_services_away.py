"""Redis or Postgres fails while tasks are solved: nothing is lost and no rate limit is exceeded."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.judge import TargetChange, Verdict, judge, read_arrivals
from local.postgres import PostgresServer, start_postgres
from local.redis import RedisServer, start_redis
from models_backend.process import BackendServer, start_backend
from router.database import connect, rows
from router.migrations import migrate
from router.models.roster import sync_roster
from router.settings.environment import Addresses
from router.settings.models import ModelSettings
from router.settings.router import RouterConfig, WorkerSettings
from router.traffic import TrafficTarget
from router.workers.engine import Engine
from router.workers.worker import Worker

MODELS = ("llama-3.1-8b", "phi-4")
TARGET = "40/2s, 12 at once"
TASKS = 400
OUTAGES = [pytest.param(3.0, id="3 s"), pytest.param(20.0, id="20 s", marks=pytest.mark.soak)]


@dataclass
class Services:
    """Own services of the test, so that each can be stopped."""

    folder: Path
    postgres: PostgresServer
    redis: RedisServer
    backend: BackendServer
    addresses: Addresses

    def tasks(self, where: str) -> int:
        with connect(self.addresses.database_url) as connection:
            return int(rows(connection, f"SELECT count(*) AS n FROM tasks WHERE {where}")[0]["n"])

    def verdict(self) -> Verdict:
        self.backend.stop()
        changes = [TargetChange(0.0, model, TrafficTarget.parse(TARGET)) for model in MODELS]
        arrivals = read_arrivals(self.backend.arrival_log)
        return judge(arrivals, changes, backlog_from=None, backlog_until=None)


@pytest.fixture
def services() -> Iterator[Services]:
    with ExitStack() as stopping:  # stops what was started, also if the next service fails to start
        folder = Path(tempfile.mkdtemp(prefix="router-outage-"))
        stopping.callback(shutil.rmtree, folder, ignore_errors=True)
        postgres = start_postgres(folder / "pg", settings={"fsync": "off"})
        stopping.callback(postgres.stop)
        redis = start_redis(folder / "redis")
        backend = start_backend(folder / "backend", "--time-scale", "20", "--latency", "even:1:10")
        url = postgres.create_database("router")
        services = Services(folder, postgres, redis, backend, Addresses(
            database_url=url, redis_url=redis.url, backend_url=backend.url
        ))  # fmt: skip
        stopping.callback(lambda: services.redis.stop())  # noqa: PLW0108 - tests replace it
        stopping.callback(backend.stop)
        migrate(url)
        yield services


@asynccontextmanager
async def draining(services: Services) -> AsyncIterator[Engine]:
    """Workers in the middle of a backlog."""
    models = {name: ModelSettings(target=TARGET, ranks={"general": 1}) for name in MODELS}
    worker = WorkerSettings(
        retry_base_seconds=0.2, retry_cap_seconds=1, lease_seconds=2, heartbeat_seconds=0.5
    )  # fmt: skip
    config = RouterConfig(models=models, worker=worker)
    with connect(services.addresses.database_url) as connection:
        sync_roster(connection, config)
        rows(
            connection,
            "INSERT INTO tasks (prompt) SELECT 'prompt ' || g FROM generate_series(1, %s) g",
            (TASKS,),
        )
    engine = Engine(services.addresses, config)
    await engine.start()
    workers = [asyncio.create_task(Worker(engine, model, "run").run()) for model in MODELS]
    try:
        await until(lambda: services.tasks("status = 'solved'") > TASKS // 8)
        yield engine
        await until(lambda: services.tasks("status = 'unsolved'") == 0, 60)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await engine.stop()


async def until(condition: Callable[[], bool], seconds: float = 30.0) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"the condition did not come true within {seconds:g} s"
        await asyncio.sleep(0.1)
    return time.monotonic() - started


def assert_nothing_lost(services: Services) -> None:
    assert services.tasks("status = 'solved'") == TASKS
    with connect(services.addresses.database_url) as connection:
        kept = rows(connection, "SELECT count(*) AS n FROM model_calls WHERE settlement = 'solved'")
        still_open = rows(connection, "SELECT count(*) AS n FROM model_calls WHERE outcome IS NULL")
    assert (kept[0]["n"], still_open[0]["n"]) == (TASKS, 0)


@pytest.mark.parametrize("outage_seconds", OUTAGES)
async def test_redis_restarts_without_its_state(services: Services, outage_seconds: float) -> None:
    async with draining(services) as engine:
        services.redis.stop()
        gone = time.monotonic()
        await until(lambda: engine.in_flight() <= len(MODELS) * 4, 10)  # calls in flight end
        await asyncio.sleep(max(0.0, outage_seconds - (time.monotonic() - gone)))
        services.redis = start_redis(services.folder / "redis", port=services.redis.port)
        back = time.monotonic()
        before = services.tasks("status = 'solved'")
        took = await until(lambda: services.tasks("status = 'solved'") > before)
        assert took < 5, "sending resumes by itself"
    verdict = services.verdict()
    sent = [arrival.at for arrival in read_arrivals(services.backend.arrival_log)]
    assert not [at for at in sent if gone + 0.5 < at < back], "nothing is sent while Redis is down"
    assert verdict.breach_count == 0
    assert_nothing_lost(services)


@pytest.mark.parametrize("outage_seconds", OUTAGES)
async def test_postgres_restarts_while_workers_run(services: Services, outage_seconds: float) -> None:
    async with draining(services):
        services.postgres.stop()
        await asyncio.sleep(outage_seconds)
        start_postgres(services.folder / "pg", settings={"fsync": "off"})
        before = services.tasks("status = 'solved'")
        assert await until(lambda: services.tasks("status = 'solved'") > before + 10) < 15
    with connect(services.addresses.database_url) as connection:
        lost = rows(connection, "SELECT count(*) AS n FROM model_calls WHERE late OR outcome = 'lost'")
    assert lost == [{"n": 0}], "an outage longer than the lease must not lose claims of living workers"
    assert services.verdict().breach_count == 0
    assert_nothing_lost(services)
