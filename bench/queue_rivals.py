"""The queues that bench/queue.py measures side by side, each doing the same: take one task, mark it done.

Ours writes a log row when it takes a task and closes it with the answer, fenced by the call_id; the others
take one job (batch 1) and mark it done through their own classes; pgbench sends our two statements from C.
All use the same number of connections to the same PostgreSQL, one task at a time on each.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import asyncpg

from local.postgres import PostgresServer
from router.database import connect, migrate, rows
from router.task import new_call_id

CATEGORIES = ("technical", "creative", "general")
CLAIM = "SELECT * FROM claim_task('bench', '{general}', $1, $2)"
SETTLE = "SELECT settle_call($1, 'answered', 'an answer', 10, 20, 0.001, 0.5)"
# uuidv7() stands in for the id that a worker makes; it is the same two statements and round trips.
PGBENCH = """
WITH made AS MATERIALIZED (SELECT uuidv7() AS call_id)
SELECT m.call_id, c.*
  FROM made m, claim_task('bench', '{general}', 'pgbench-' || :client_id, m.call_id) AS c \\gset
SELECT settle_call(:call_id::uuid, 'answered', 'an answer', 10, 20, 0.001, 0.5);
"""

Take = Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Rival:
    """A queue, filled with more jobs than can be taken; each measurement goes on where the last stopped."""

    name: str
    tasks_per_second: Callable[[float], Awaitable[float]]


def new_router_database(server: PostgresServer, name: str) -> str:
    """The URL of a database with the router's schema and three categories."""
    url = server.create_database(name)
    migrate(url)
    with connect(url) as connection:
        for category in CATEGORIES:
            rows(connection, "INSERT INTO categories VALUES (%s, %s)", (category, category == "general"))
    return url


async def all_rivals(
    server: PostgresServer, connections: int, jobs: int, open_until: AsyncExitStack
) -> list[Rival]:
    """Every queue, filled; their connections stay open as long as `open_until`."""
    ours = new_router_database(server, "ours")
    pgbench = new_router_database(server, "pgbench")
    for url in (ours, pgbench):
        with connect(url) as connection:
            rows(
                connection,
                "INSERT INTO tasks (prompt) SELECT 'The answer to ' || n FROM generate_series(1, %s) AS n",
                (jobs,),
            )
    return [
        Rival("router (asyncpg)", _rate_of(await _ours(ours, connections, open_until))),
        Rival("pgbench, the same two statements", _pgbench(server, connections)),
        Rival("procrastinate", _rate_of(await _procrastinate(server, connections, jobs, open_until))),
        Rival("pgqueuer (batch 1)", _rate_of(await _pgqueuer(server, connections, jobs, open_until))),
    ]


def _rate_of(takers: list[Take]) -> Callable[[float], Awaitable[float]]:
    async def measure(seconds: float) -> float:
        began = time.perf_counter()

        async def go(take: Take) -> int:
            done = 0
            while time.perf_counter() - began < seconds:
                await take()
                done += 1
            return done

        done = sum(await asyncio.gather(*(go(take) for take in takers)))
        return done / (time.perf_counter() - began)

    return measure


async def _ours(url: str, connections: int, open_until: AsyncExitStack) -> list[Take]:
    def taker(connection: asyncpg.Connection, worker: str) -> Take:
        async def take() -> None:
            call_id = new_call_id(time.time())
            assert await connection.fetchrow(CLAIM, worker, call_id) is not None
            assert await connection.fetchval(SETTLE, call_id) == "solved"

        return take

    takers: list[Take] = []
    for n in range(connections):
        connection = await asyncpg.connect(url, server_settings={"jit": "off"})
        open_until.push_async_callback(connection.close)
        takers.append(taker(connection, f"bench-{n}"))
    return takers


def _pgbench(server: PostgresServer, connections: int) -> Callable[[float], Awaitable[float]]:
    async def measure(seconds: float) -> float:
        with tempfile.NamedTemporaryFile("w", suffix=".sql") as script:
            script.write(PGBENCH)
            script.flush()
            done: subprocess.CompletedProcess[str] = await asyncio.to_thread(
                server.run, "pgbench", "-n", "-M", "prepared", "-c", str(connections), "-j", "1",
                "-T", str(max(1, round(seconds))), "-f", script.name, "pgbench", check=False,
            )  # fmt: skip
        found = re.search(r"tps = ([0-9.]+)", done.stdout)
        if found is None or "failed" in done.stderr:
            raise RuntimeError(f"pgbench: {done.stdout}{done.stderr}")
        return float(found.group(1))

    return measure


async def _procrastinate(
    server: PostgresServer, connections: int, jobs: int, open_until: AsyncExitStack
) -> list[Take]:
    import procrastinate  # noqa: PLC0415 - a rival's library, wanted here only
    from procrastinate.jobs import Status  # noqa: PLC0415
    from procrastinate.manager import JobManager  # noqa: PLC0415

    url = server.create_database("procrastinate")
    connector = procrastinate.PsycopgConnector(conninfo=url, min_size=connections, max_size=connections)
    app = procrastinate.App(connector=connector)
    await open_until.enter_async_context(app.open_async())
    await app.schema_manager.apply_schema_async()
    with connect(url) as connection:
        rows(
            connection,
            "INSERT INTO procrastinate_jobs (queue_name, task_name, args)"
            " SELECT 'general', 'solve', jsonb_build_object('prompt', 'What is the answer to ' || n)"
            " FROM generate_series(1, %s) AS n",
            (jobs,),
        )

    def taker(manager: Any, worker_id: int) -> Take:
        async def take() -> None:
            job = await manager.fetch_job(queues=None, worker_id=worker_id)
            assert job is not None
            await manager.finish_job(job, Status.SUCCEEDED, delete_job=False)

        return take

    manager = JobManager(connector)
    return [taker(manager, await manager.register_worker()) for _ in range(connections)]


async def _pgqueuer(
    server: PostgresServer, connections: int, jobs: int, open_until: AsyncExitStack
) -> list[Take]:
    from pgqueuer.db import AsyncpgDriver  # noqa: PLC0415 - a rival's library, wanted here only
    from pgqueuer.queries import EntrypointExecutionParameter, Queries  # noqa: PLC0415

    url = server.create_database("pgqueuer")

    async def opened() -> Any:
        connection = await asyncpg.connect(url)
        open_until.push_async_callback(connection.close)
        return Queries(AsyncpgDriver(connection))

    first = await opened()
    await first.install()
    for start in range(0, jobs, 10_000):
        batch = min(10_000, jobs - start)
        await first.enqueue(["solve"] * batch, [b"What is the answer?"] * batch, [0] * batch)

    def taker(queries: Any) -> Take:
        entrypoints = {"solve": EntrypointExecutionParameter(0)}
        manager_id = uuid.uuid4()

        async def take() -> None:
            taken = await queries.dequeue(1, entrypoints, manager_id, None, timedelta(seconds=30))
            assert taken
            await queries.log_jobs([(taken[0], "successful", None)])

        return take

    return [taker(first), *[taker(await opened()) for _ in range(connections - 1)]]
