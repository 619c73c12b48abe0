"""Each cause of a standstill is named within 5 s, alike everywhere, and no longer 5 s after its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.extensions
import pytest
import redis
import requests

from local.redis import RedisServer, start_redis
from models_backend.process import BackendServer, start_backend
from plugins.console.dashboard import Dashboard
from router.database import connect, rows
from router.errors import DatabaseError, LimiterError
from router.models.roster import sync_roster
from router.settings.environment import Addresses
from router.settings.models import ModelSettings
from router.settings.router import RouterConfig, WorkerSettings
from router.status import WhyNot, read_status, unreadable
from router.workers.engine import Engine
from router.workers.worker import Worker
from tests.support.command_line import CommandLine

pytestmark = [pytest.mark.alone, pytest.mark.timeout(300)]

MODEL = "phi-4"
TARGET = "30/s, 40 at once"
NAMED_SECONDS = GONE_SECONDS = 5.0


@dataclass
class World:
    """An engine with one worker and a backlog, and its services."""

    addresses: Addresses
    folder: Path
    redis: RedisServer
    backend: BackendServer
    stack: AsyncExitStack
    engine: Engine | None = None
    worker: asyncio.Task[str] | None = None
    connections: list[Any] = field(default_factory=list)

    def sql(self, *statements: str) -> None:
        with connect(self.addresses.database_url, autocommit=True) as connection:
            for statement in statements:
                rows(connection, statement)

    def admin(self, statement: str) -> None:
        """Runs a statement on the database from another one; `{name}` is its name."""
        name = psycopg2.extensions.parse_dsn(self.addresses.database_url)["dbname"]
        url = psycopg2.extensions.make_dsn(self.addresses.database_url, dbname="postgres")
        with connect(url, autocommit=True) as connection:
            rows(connection, statement.format(name=name))

    def cut_sessions(self) -> None:
        self.admin("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")

    def tell_redis(self, *command: str) -> None:
        with closing(redis.Redis.from_url(self.redis.url)) as client:
            client.execute_command(*command)

    def fault(self, **order: Any) -> None:
        order = {"share": 1, "seconds": 600, **order}
        requests.post(f"{self.backend.url}/faults", json=order, timeout=5).raise_for_status()

    def heal(self) -> None:
        requests.delete(f"{self.backend.url}/faults", timeout=5).raise_for_status()

    async def end_cooldown(self) -> None:
        self.heal()
        assert self.engine is not None
        for _ in range(5):  # a connection from before Redis restarted fails once
            with contextlib.suppress(LimiterError):
                await self.engine.limiter.cool_down(MODEL, 0, "")
                return

    def target(self, line: str) -> Awaitable[Any]:
        assert self.engine is not None
        return self.engine.targets.apply({MODEL: line}, version=time.time_ns() // 1000)

    def start_worker(self) -> None:
        assert self.engine is not None
        working = Worker(self.engine, MODEL, f"run {time.monotonic()}", frozenset({MODEL})).run()
        self.worker = asyncio.create_task(working)

    async def stop_worker(self) -> None:
        assert self.worker is not None
        self.worker.cancel()
        await asyncio.gather(self.worker, return_exceptions=True)

    async def start_engine(self) -> None:
        self.engine = Engine(self.addresses, CONFIG)
        await self.engine.start()
        self.start_worker()

    async def stop_engine(self) -> None:
        await self.stop_worker()
        assert self.engine is not None
        await self.engine.stop()

    async def activate_model(self) -> None:
        """A change of the roster ends the run; the DAG starts the next one."""
        self.sql("UPDATE roster SET state = 'active'", "SELECT nextval('roster_version')")
        await self.stop_worker()
        self.start_worker()

    def alter_database(self, change: str) -> None:
        """Changes what new sessions may do, and ends the present ones."""
        self.admin(f'ALTER DATABASE "{{name}}" {change}')
        self.cut_sessions()

    async def stop_backend(self) -> None:
        await asyncio.to_thread(self.backend.stop)

    async def start_backend(self) -> None:
        port = int(self.backend.url.rpartition(":")[2])
        self.backend = await asyncio.to_thread(start_backend, self.folder, *QUICK, port=port)

    async def stop_redis(self) -> None:
        await asyncio.to_thread(self.redis.stop)

    async def start_redis(self) -> None:
        self.redis = await asyncio.to_thread(start_redis, self.folder, port=self.redis.port)

    async def lock_lease(self) -> None:
        """An open transaction keeps the worker from renewing its lease, as a stalled process does."""
        connection = psycopg2.connect(self.addresses.database_url)
        rows(connection, "SELECT FROM workers FOR UPDATE")
        self.connections.append(connection)

    async def unlock_lease(self) -> None:
        self.connections.pop().close()

    def reading(self) -> WhyNot | None:
        """The reason of the whole, as a reader finds it now."""
        try:
            with connect(self.addresses.database_url) as connection:
                return read_status(connection, self.redis.url).why_not
        except DatabaseError as error:
            return unreadable(error).whole


QUICK = ("--time-scale", "50", "--latency", "even:1:10")
CONFIG = RouterConfig(
    models={MODEL: ModelSettings(target=TARGET, ranks={"general": 1}, timeout_seconds=20)},
    worker=WorkerSettings(retry_base_seconds=0.1, retry_cap_seconds=0.3),
)
Act = Callable[[World], "Awaitable[Any] | None"]


@dataclass(frozen=True)
class Cause:
    """A cause of a standstill: how it begins and ends, its code and the words of its sentence."""

    code: str
    words: str
    begin: Act
    end: Act
    logged: bool = True


CAUSES = {
    "the DAG is paused": Cause(
        "paused", "solve_tasks is paused",
        lambda w: w.sql("SELECT set_paused(true, 1)"), lambda w: w.sql("SELECT set_paused(false, 2)"),
    ),
    "the target is 0": Cause(
        "stopped", "target is 0", lambda w: w.target("0"), lambda w: w.target(TARGET)
    ),
    "the window is used up": Cause(
        "window", "used up; no permit before", lambda w: w.target("1/h, burst"), lambda w: w.target(TARGET),
        logged=False,
    ),
    "the model is paused": Cause(
        "model_paused", "No model on the roster is active",
        lambda w: w.sql("UPDATE roster SET state = 'paused'", "SELECT nextval('roster_version')"),
        World.activate_model,
    ),
    "a function is renamed": Cause(
        "claims_failing", "reserved_tokens",
        lambda w: w.sql("ALTER FUNCTION reserved_tokens RENAME TO renamed"),
        lambda w: w.sql("ALTER FUNCTION renamed RENAME TO reserved_tokens"),
    ),
    "a column is renamed": Cause(
        "schema", "tasks.max_tokens is missing",
        lambda w: w.sql("ALTER TABLE tasks RENAME COLUMN max_tokens TO renamed"),
        lambda w: w.sql("ALTER TABLE tasks RENAME COLUMN renamed TO max_tokens"),
    ),
    "triggers are disabled": Cause(
        "triggers_missing", "Triggers of tasks are missing or disabled",
        lambda w: w.sql("ALTER TABLE tasks DISABLE TRIGGER USER"),
        lambda w: w.sql("ALTER TABLE tasks ENABLE TRIGGER USER"),
    ),
    "a newer version migrated": Cause(
        "outdated", "newer version",
        lambda w: w.sql("INSERT INTO router_migrations (name, checksum) VALUES ('999_new.sql', '')"),
        lambda w: w.sql("DELETE FROM router_migrations WHERE name = '999_new.sql'"),
    ),
    "Redis becomes a replica": Cause(
        "redis_read_only", "read only replica",
        lambda w: w.tell_redis("REPLICAOF", "127.0.0.1", "1"),
        lambda w: w.tell_redis("REPLICAOF", "NO", "ONE"),
    ),
    "Redis is away": Cause("redis_unavailable", "Redis is unavailable", World.stop_redis, World.start_redis),
    "the backend is away": Cause(
        "backend_unreachable", "Models Backend is unreachable", World.stop_backend, World.start_backend
    ),
    "Redis misses its replicas": Cause(
        "redis_read_only", "NOREPLICAS",
        lambda w: w.tell_redis("CONFIG", "SET", "min-replicas-to-write", "1"),
        lambda w: w.tell_redis("CONFIG", "SET", "min-replicas-to-write", "0"),
    ),
    "the backend refuses for a while": Cause(
        "cooling_down", "Cooling down until",
        lambda w: w.fault(kind="rate_limit", retry_after_seconds=600),
        World.end_cooldown,
    ),
    "the lease is not renewed": Cause(
        "lease_lost", "has renewed its lease since", World.lock_lease, World.unlock_lease
    ),
    "Postgres is read-only": Cause(
        "database_read_only", "Postgres is read-only",
        lambda w: w.alter_database("SET default_transaction_read_only = on"),
        lambda w: w.alter_database("RESET default_transaction_read_only"),
    ),
    "Postgres is away": Cause(
        "database_unavailable", "Postgres cannot be reached",
        lambda w: w.alter_database("ALLOW_CONNECTIONS false"),
        lambda w: w.admin('ALTER DATABASE "{name}" ALLOW_CONNECTIONS true'),
    ),
    "the worker of the model ended": Cause(
        "no_worker", "No worker runs for this model", World.stop_worker, lambda w: w.start_worker()
    ),
    "the process ended": Cause(
        "no_worker", "No worker is running", World.stop_engine, World.start_engine, logged=False
    ),
    "nothing is to be done": Cause(
        "no_tasks", "No task is unsolved",
        lambda w: w.sql("DELETE FROM tasks"),
        lambda w: w.sql("INSERT INTO tasks (prompt) SELECT 'p' || g FROM generate_series(1, 3000) g"),
        logged=False,  # ordinary waits are logged if they last
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def own_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = start_redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
async def world(bare_database: str, own_redis: RedisServer, tmp_path: Path) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        backend = start_backend(tmp_path, *QUICK)
        addresses = Addresses(database_url=bare_database, redis_url=own_redis.url, backend_url=backend.url)
        world = World(addresses, tmp_path, own_redis, backend, stack)
        stack.callback(lambda: world.backend.stop())  # noqa: PLW0108 - causes replace them
        stack.callback(lambda: world.redis.stop())  # noqa: PLW0108
        with connect(bare_database) as connection:
            sync_roster(connection, CONFIG)
            rows(connection, "UPDATE queue_settings SET categorise = false")
            insertion = "INSERT INTO tasks (prompt) SELECT 'p' || g FROM generate_series(1, 9000) g"
            rows(connection, insertion)
        await world.start_engine()
        yield world
        await world.stop_engine()


async def test_each_cause_is_named_and_its_end_is_noticed(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="router.workers.standstill")
    assert await until(world, lambda why: why is None, 20) is not None
    problems = []
    for name, cause in CAUSES.items():
        caplog.clear()
        await act(world, cause.begin)

        def named(why: WhyNot | None, cause: Cause = cause) -> bool:
            return why is not None and why.code.value == cause.code and cause.words in why.text

        seconds = await until(world, named, NAMED_SECONDS)
        if seconds is None:
            problems.append(f"{name}: not named, but {await asyncio.to_thread(world.reading)}")
        problems += await different_views(world, cause, name)
        line = f"reason={cause.code}:"
        if cause.logged and not await until(world, lambda _, line=line: line in caplog.text, 5):  # type: ignore[misc]
            problems.append(f"{name}: not logged, but {caplog.text}")
        await act(world, cause.end)
        gone = await until(world, lambda why: why is None, GONE_SECONDS)
        if gone is None:
            problems.append(f"{name}: not gone, but {await asyncio.to_thread(world.reading)}")
            await until(world, lambda why: why is None, 20)
    assert not problems, "\n".join(problems)


async def different_views(world: World, cause: Cause, name: str) -> list[str]:
    """Compares command line and console while the cause lasts."""
    if cause.code == "database_unavailable":
        return []
    router = CommandLine(
        {"ROUTER_DATABASE_URL": world.addresses.database_url, "ROUTER_REDIS_URL": world.redis.url}
    )

    def views() -> tuple[Any, Any, str]:
        with connect(world.addresses.database_url) as connection:
            console = Dashboard().read(connection, world.redis.url)["why_not"]
        return router("status", "--json").json["why_not"], console, " ".join(router("status").out.split())

    printed, shown, text = await asyncio.to_thread(views)
    if {str(printed and printed["code"]), shown and shown.code.value} != {
        cause.code
    } or cause.words not in text:
        return [f"{name}: {printed}, {shown}, {text}"]
    return []


async def act(world: World, act: Act) -> None:
    done = act(world)
    if done is not None:
        await done


async def until(world: World, holds: Callable[[WhyNot | None], bool], seconds: float) -> float | None:
    """Returns after how many seconds the reading fulfils the condition; None if it does not in time."""
    started = time.monotonic()
    while (passed := time.monotonic() - started) <= seconds:
        if holds(await asyncio.to_thread(world.reading)):
            return passed
        await asyncio.sleep(0.2)
    return None
