"""The queues that bench/queue.py compares: each claims one task and marks it as done.

The router logs a call with each claim and closes it with the answer, fenced by the call_id; the others
dequeue one job (batch 1) and mark it as done. Each is measured as it is used (our TaskQueue, their workers
with an empty job) and by its bare statements; pgbench sends the router's two statements from C. All use the
same number of connections to the same PostgreSQL, with one task at a time per connection.
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
from router.database import connect, open_pool, rows
from router.migrations import migrate
from router.queue import TaskQueue
from router.task import CallResult, Outcome, new_call_id

CATEGORIES = ("technical", "creative", "general")
CLAIM = "SELECT * FROM claim_task('bench', '{general}', $1, $2)"
SETTLE = (
    "SELECT settle_call($1, 'answered', 'an answer', 10, 20, 0.001, 0.5, NULL, true, $2, 'bench', $3, $4)"
)
RESULT = CallResult(
    Outcome.ANSWERED, answer="an answer", prompt_tokens=10, completion_tokens=20, cost_usd=0.001,
    latency_seconds=0.5,
)  # fmt: skip
# uuidv7() replaces the worker's id; statements and round trips are the same.
PGBENCH = """
WITH made AS MATERIALIZED (SELECT uuidv7() AS call_id)
SELECT m.call_id, c.*
  FROM made m, claim_task('bench', '{general}', 'pgbench-' || :client_id, m.call_id) AS c \\gset
SELECT settle_call(:call_id::uuid, 'answered', 'an answer', 10, 20, 0.001, 0.5, NULL, true,
                   :task_id, 'bench', :prompt_version, :reserved_tokens);
"""

Take = Callable[[], Awaitable[None]]
Rate = Callable[[float], Awaitable[float]]


@dataclass(frozen=True)
class Rival:
    """A queue filled with more jobs than can be processed; each measurement continues the last one."""

    name: str
    as_used: bool
    tasks_per_second: Rate


def new_router_database(server: PostgresServer, name: str) -> str:
    """Creates a database with the router's schema and three categories. Returns its URL."""
    url = server.create_database(name)
    migrate(url)
    with connect(url) as connection:
        for category in CATEGORIES:
            rows(connection, "INSERT INTO categories VALUES (%s, %s)", (category, category == "general"))
        # Without classification all tasks are ready immediately.
        rows(connection, "UPDATE queue_settings SET categorise = false")
    return url


async def all_rivals(
    server: PostgresServer, connections: int, jobs: int, open_until: AsyncExitStack
) -> list[Rival]:
    """Returns every queue, filled; `open_until` closes their connections."""
    ours = new_router_database(server, "ours")
    pgbench = new_router_database(server, "pgbench")
    for url in (ours, pgbench):
        with connect(url) as connection:
            rows(
                connection,
                "INSERT INTO tasks (prompt) SELECT 'The answer to ' || n FROM generate_series(1, %s) AS n",
                (jobs,),
            )
    library = await _library(ours, connections, open_until)
    statements = await _ours(ours, connections, open_until)
    fetches, procrastinate = await _procrastinate(server, connections, jobs, open_until)
    dequeues, pgqueuer = await _pgqueuer(server, connections, jobs, open_until)
    return [
        Rival("router", as_used=True, tasks_per_second=_rate_of(library)),
        Rival("procrastinate", as_used=True, tasks_per_second=procrastinate),
        Rival("pgqueuer", as_used=True, tasks_per_second=pgqueuer),
        Rival("pgbench", as_used=False, tasks_per_second=_pgbench(server, connections)),
        Rival("router", as_used=False, tasks_per_second=_rate_of(statements)),
        Rival("procrastinate", as_used=False, tasks_per_second=_rate_of(fetches)),
        Rival("pgqueuer", as_used=False, tasks_per_second=_rate_of(dequeues)),
    ]


def _rate_of(takers: list[Take]) -> Rate:
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
            row = await connection.fetchrow(CLAIM, worker, call_id)
            assert row is not None
            closed = (row["task_id"], row["prompt_version"], row["reserved_tokens"])
            assert await connection.fetchval(SETTLE, call_id, *closed) == "solved"

        return take

    takers: list[Take] = []
    for n in range(connections):
        connection = await asyncpg.connect(url, server_settings={"jit": "off"})
        open_until.push_async_callback(connection.close)
        takers.append(taker(connection, f"bench-{n}"))
    return takers


async def _library(url: str, connections: int, open_until: AsyncExitStack) -> list[Take]:
    pool = await open_pool(url, connections=connections)
    open_until.push_async_callback(pool.close)
    queue = TaskQueue(pool, host="bench")
    await queue.renew_lease()

    async def take() -> None:
        claim = await queue.claim("bench", ["general"], max_tokens=512)
        assert claim is not None
        assert await queue.settle(claim, RESULT) == "solved"

    return [take] * connections


def _pgbench(server: PostgresServer, connections: int) -> Rate:
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
) -> tuple[list[Take], Rate]:
    from procrastinate.jobs import Status  # noqa: PLC0415 - optional dependency
    from procrastinate.manager import JobManager  # noqa: PLC0415

    async def opened(name: str) -> Any:
        app = _procrastinate_app(server.create_database(name), connections)
        await open_until.enter_async_context(app.open_async())
        await app.schema_manager.apply_schema_async()
        with connect(server.url(name)) as connection:
            rows(
                connection,
                "INSERT INTO procrastinate_jobs (queue_name, task_name, args)"
                " SELECT 'general', 'solve', jsonb_build_object('prompt', 'What is the answer to ' || n)"
                " FROM generate_series(1, %s) AS n",
                (jobs,),
            )
        return app

    # Two databases: workers take jobs of the bare statements' workers, which send no heartbeat.
    used, bare = await opened("procrastinate"), await opened("procrastinate_bare")

    async def work(seconds: float) -> float:
        worker = asyncio.create_task(
            used.run_worker_async(concurrency=connections, install_signal_handlers=False, delete_jobs="never")
        )
        return await _counted(lambda: int(used.solved), seconds, worker, worker.cancel)

    def taker(manager: Any, worker_id: int) -> Take:
        async def take() -> None:
            job = await manager.fetch_job(queues=None, worker_id=worker_id)
            assert job is not None
            await manager.finish_job(job, Status.SUCCEEDED, delete_job=False)

        return take

    manager = JobManager(bare.connector)
    return [taker(manager, await manager.register_worker()) for _ in range(connections)], work


def _procrastinate_app(url: str, connections: int) -> Any:
    """Returns an app whose task `solve` counts its runs in `solved`."""
    import procrastinate  # noqa: PLC0415 - optional dependency

    connector = procrastinate.PsycopgConnector(conninfo=url, min_size=connections, max_size=connections)
    app: Any = procrastinate.App(connector=connector)
    app.solved = 0

    @app.task(name="solve")  # type: ignore[untyped-decorator]  # untyped library
    async def solve(prompt: str) -> None:  # noqa: ARG001 - the job is empty
        app.solved += 1

    return app


async def _pgqueuer(
    server: PostgresServer, connections: int, jobs: int, open_until: AsyncExitStack
) -> tuple[list[Take], Rate]:
    from pgqueuer.db import AsyncpgDriver  # noqa: PLC0415 - optional dependency
    from pgqueuer.models import Job  # noqa: PLC0415
    from pgqueuer.qm import QueueManager  # noqa: PLC0415
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

    async def work(seconds: float) -> float:
        done = 0
        workers = [QueueManager(queries) for queries in workers_queries]
        for worker in workers:

            @worker.entrypoint("solve")
            async def solve(job: Job) -> None:  # noqa: ARG001 - the job is empty
                nonlocal done
                done += 1

        def stop() -> None:
            for worker in workers:
                worker.shutdown.set()

        running = asyncio.gather(*(worker.run(batch_size=1) for worker in workers))
        return await _counted(lambda: done, seconds, running, stop)

    workers_queries = [await opened() for _ in range(connections)]
    return [taker(first), *[taker(await opened()) for _ in range(connections - 1)]], work


async def _counted(
    done: Callable[[], int], seconds: float, running: asyncio.Future[Any], stop: Callable[[], Any]
) -> float:
    """Returns jobs per second, measured for `seconds` after the first job is done."""
    while not done():  # noqa: ASYNC110 - jobs are counted by the library's loop
        await asyncio.sleep(0.01)
    before, began = done(), time.perf_counter()
    await asyncio.sleep(seconds)
    rate = (done() - before) / (time.perf_counter() - began)
    stop()
    await asyncio.gather(running, return_exceptions=True)
    return rate
