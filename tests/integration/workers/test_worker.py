"""The engine and its workers, with real PostgreSQL, Redis and Models Backend processes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from local.redis import RedisServer
from models_backend.process import BackendServer, start_backend
from router.database import connect, rows
from router.models.roster import sync_roster
from router.settings.clients import ClientSettings
from router.settings.environment import Addresses
from router.settings.models import ModelSettings
from router.settings.router import RouterConfig, WorkerSettings
from router.workers.engine import Engine
from router.workers.worker import Worker, wait_for_work
from tests.support.roles import RolesDatabase

MODELS = ("llama-3.1-8b", "phi-4")
QUICK = ("--time-scale", "50", "--latency", "even:1:10")
# A claim counts as an attempt until it is requeued.
ATTEMPTS = "SELECT coalesce(sum(attempt - (state = 'claimed')::int), 0) AS n FROM queue"


def config(**targets: str) -> RouterConfig:
    models = {
        name: ModelSettings(
            target=targets.get(name, "3000/min"), ranks={"general": place, "technical": 3 - place}
        )
        for place, name in enumerate(MODELS, start=1)
    }
    worker = WorkerSettings(
        idle_leave_seconds=1.0,
        lease_seconds=2.0,
        heartbeat_seconds=0.5,
        retry_base_seconds=0.1,
        retry_cap_seconds=0.3,
    )
    return RouterConfig(models=models, worker=worker)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendServer]:
    server = start_backend(tmp_path_factory.mktemp("backend"), *QUICK)
    yield server
    server.stop()


@dataclass(frozen=True)
class Backend:
    """The server that all tests share, limited to the calls of one test."""

    url: str
    ended_before: int

    def arrivals(self) -> list[dict[str, Any]]:
        """Returns the calls of this test that have ended."""
        since = {"since": self.ended_before}
        return list(requests.get(f"{self.url}/arrivals", params=since, timeout=5).json()["arrivals"])

    def fault(self, **order: Any) -> None:
        requests.post(f"{self.url}/faults", json={"share": 1, **order}, timeout=5).raise_for_status()


@pytest.fixture
async def backend(server: BackendServer) -> AsyncIterator[Backend]:
    """The backend without faults and without calls of the previous test."""

    def health() -> dict[str, Any]:
        return dict(requests.get(f"{server.url}/health", timeout=5).json())

    await until(lambda: health()["in_flight"] == 0)
    yield Backend(server.url, health()["arrived"])
    requests.delete(f"{server.url}/faults", timeout=5).raise_for_status()


@pytest.fixture
def addresses(
    bare_database: str, redis_server: RedisServer, redis_client: Any, backend: Backend
) -> Addresses:
    return Addresses(database_url=bare_database, redis_url=redis_server.url, backend_url=backend.url)


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
        insertion = (
            "INSERT INTO tasks (prompt, category) SELECT 'prompt ' || g, %s FROM generate_series(1, %s) g"
        )
        rows(connection, insertion, (category, count))


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


async def test_every_task_is_solved_once(addresses: Addresses, backend: Backend) -> None:
    insert(addresses, 60)
    async with running(addresses, config()) as engine:
        reasons = await asyncio.wait_for(
            asyncio.gather(*(Worker(engine, model, "run-1", frozenset(MODELS)).run() for model in MODELS)), 30
        )
    assert reasons == ["the queue was empty"] * 2
    assert not any(interactive for _, interactive in engine.limiter._queues)
    left_over = ask(
        addresses,
        "SELECT t.*, q.state FROM tasks t LEFT JOIN queue q ON q.task_id = t.id WHERE status <> 'solved'",
    )
    assert left_over == []
    calls = ask(
        addresses, "SELECT outcome, settlement, late, count(*) AS n FROM model_calls GROUP BY 1, 2, 3"
    )
    by_settlement = {row["settlement"]: row["n"] for row in calls if not row["late"]}
    assert by_settlement.pop("solved") == 60
    assert set(by_settlement) <= {"retry"}  # the simulated models sometimes give empty answers
    assert sorted(a["request_id"] for a in backend.arrivals()) == sorted(
        str(row["call_id"]) for row in ask(addresses, "SELECT call_id FROM model_calls")
    )


async def test_the_engine_runs_as_a_role_that_owns_nothing(
    roles_database: RolesDatabase, redis_server: RedisServer, redis_client: Any, backend: Backend
) -> None:
    def as_role(login: str) -> Addresses:
        return Addresses(
            database_url=roles_database.url(login), redis_url=redis_server.url, backend_url=backend.url
        )

    addresses, producer = as_role("app"), as_role("alice")
    insert(producer, 20)
    async with running(addresses, config()) as engine:
        await asyncio.gather(*(Worker(engine, model, "run-1", frozenset(MODELS)).run() for model in MODELS))
    assert solved(producer) == solved(addresses) == 20


@asynccontextmanager
async def working(engine: Engine, *models: str, run: str = "run-1") -> AsyncIterator[list[asyncio.Task[str]]]:
    """Workers of one run; canceled at the end unless they left before."""
    tasks = [asyncio.create_task(Worker(engine, model, run).run()) for model in models or MODELS]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def set_targets(engine: Engine, version: int, **lines: str) -> None:
    await engine.targets.apply(
        {name.replace("_", "-"): line for name, line in lines.items()}, version=version
    )


def calls(addresses: Addresses, where: str = "true") -> int:
    return int(ask(addresses, f"SELECT count(*) AS n FROM model_calls WHERE {where}")[0]["n"])


async def test_usage_of_clients_is_summed_up(addresses: Addresses, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.workers.engine.USAGE_SECONDS", 0.2)
    insert(addresses, 20)
    ask(addresses, "UPDATE tasks SET client = CASE WHEN id > 5 THEN 'alice' ELSE 'bob' END")
    async with running(addresses, config()) as engine, working(engine):
        await until(lambda: solved(addresses) == 20)
        summed = "SELECT client, sum(answered)::int AS n FROM client_usage GROUP BY client ORDER BY client"
        expected = [{"client": "alice", "n": 15}, {"client": "bob", "n": 5}]
        await until(lambda: ask(addresses, summed) == expected)


async def test_nothing_is_sent_while_the_batch_is_paused(addresses: Addresses) -> None:
    insert(addresses, 400)
    async with running(addresses, config()) as engine, working(engine):
        await until(lambda: solved(addresses) > 5)
        ask(addresses, "SELECT set_paused(true, 1)")
        await asyncio.sleep(1.2)  # applied within a second; calls in flight end
        before = calls(addresses)
        await asyncio.sleep(1.0)
        assert calls(addresses) == before
        ask(addresses, "SELECT set_paused(false, 2)")
        assert await until(lambda: calls(addresses) > before) < 2


async def test_workers_leave_when_the_roster_changes_and_no_model_idles(addresses: Addresses) -> None:
    insert(addresses, 2000)
    async with running(addresses, config(**dict.fromkeys(MODELS, "240/min"))) as engine:
        leaving = [
            asyncio.create_task(Worker(engine, model, "run-1", frozenset(MODELS)).run()) for model in MODELS
        ]
        await until(lambda: solved(addresses) > 2)
        assert not any(task.done() for task in leaving)
        ask(addresses, "UPDATE roster SET state = 'paused' WHERE model = 'phi-4'")
        assert await asyncio.wait_for(asyncio.gather(*leaving), 3) == ["the roster changed"] * 2
        await until(lambda: "phi-4" not in engine.roster.models)
        await until(lambda: calls(addresses, "model = 'phi-4' AND outcome IS NULL") == 0)
        paused, going_on = (calls(addresses, f"model = '{model}'") for model in ("phi-4", "llama-3.1-8b"))
        await until(lambda: calls(addresses, "model = 'llama-3.1-8b'") > going_on + 3, 5)
        assert calls(addresses, "model = 'phi-4'") == paused


async def test_new_model_is_used_before_the_next_run(addresses: Addresses) -> None:
    insert(addresses, 2000)
    async with running(addresses, config()) as engine:
        ask(addresses, "UPDATE roster SET state = 'paused' WHERE model = 'phi-4'")
        await until(lambda: set(engine.roster.models) == {"llama-3.1-8b"})
        only = frozenset({"llama-3.1-8b"})
        leaving = asyncio.create_task(Worker(engine, "llama-3.1-8b", "run-1", only).run())
        await until(lambda: calls(addresses) > 2)
        ask(addresses, "UPDATE roster SET state = 'active' WHERE model = 'phi-4'")
        await asyncio.wait_for(leaving, 3)
        await until(lambda: calls(addresses, "model = 'phi-4'") > 2, 3)
        next_run = [asyncio.create_task(Worker(engine, m, "run-2", frozenset(MODELS)).run()) for m in MODELS]
        await until(lambda: not engine.handover.covers("phi-4"), 3)
        before = calls(addresses, "model = 'phi-4'")
        await until(lambda: calls(addresses, "model = 'phi-4'") > before + 3, 3)
        for task in next_run:
            task.cancel()
        await asyncio.gather(*next_run, return_exceptions=True)


async def test_canceled_worker_loses_nothing(addresses: Addresses) -> None:
    insert(addresses, 300)
    async with running(addresses, config()) as engine:
        async with working(engine):
            await until(lambda: engine.in_flight() > 3)
        await until(lambda: engine.in_flight() == 0)
        assert calls(addresses, "outcome IS NULL") == 0
        assert ask(addresses, "SELECT count(*) AS n FROM queue WHERE state = 'claimed'") == [{"n": 0}]


async def test_unreachable_backend_costs_no_attempt(addresses: Addresses, tmp_path: Path) -> None:
    mortal = start_backend(tmp_path / "first", *QUICK)
    addresses = addresses.model_copy(update={"backend_url": mortal.url})
    insert(addresses, 100)
    async with running(addresses, config()) as engine, working(engine):
        await until(lambda: solved(addresses) > 3)
        port = int(mortal.url.rsplit(":", 1)[1])
        mortal.process.kill()  # calls in flight break: those do count
        mortal.process.wait()
        await until(lambda: engine.in_flight() == 0)
        counted = ask(addresses, ATTEMPTS)[0]["n"]
        await asyncio.sleep(2)
        assert ask(addresses, ATTEMPTS)[0]["n"] <= counted
        again = start_backend(tmp_path / "again", *QUICK, port=port)
        try:
            await until(lambda: solved(addresses) == 100, 40)
        finally:
            again.stop()


async def test_429_cools_the_model_down_and_costs_no_attempt(addresses: Addresses, backend: Backend) -> None:
    backend.fault(model="phi-4", kind="rate_limit", seconds=60)
    insert(addresses, 30)
    async with running(addresses, config()) as engine, working(engine, "phi-4"):
        await until(lambda: calls(addresses, "outcome = 'rate_limited'") >= 1)
        assert (await engine.limiter.snapshot(["phi-4"]))["phi-4"].cooldown_seconds > 0
        assert ask(addresses, "SELECT max(attempt) AS n FROM queue WHERE state = 'ready'") == [{"n": 0}]
        errors = "SELECT trouble FROM roster WHERE model = 'phi-4'"
        assert ask(addresses, errors) == [{"trouble": None}]  # a few failures raise no alarm


async def test_breaker_opens_for_a_failing_model_and_closes_again(
    addresses: Addresses, backend: Backend
) -> None:
    backend.fault(model="phi-4", kind="error", seconds=4)
    insert(addresses, 200)
    async with running(addresses, config()) as engine, working(engine, "phi-4"):

        async def breaker() -> str:
            return (await engine.limiter.snapshot(["phi-4"]))["phi-4"].breaker

        opened_by = time.monotonic() + 15
        while await breaker() == "closed":
            assert time.monotonic() < opened_by
            await asyncio.sleep(0.02)
        await until(lambda: solved(addresses) > 10, 30)
        assert await breaker() == "closed"
        assert calls(addresses, "outcome = 'error'") < 100


async def test_unknown_model_is_recorded_as_its_error(addresses: Addresses) -> None:
    settings = config()
    unknown = {**settings.models, "no-such-model": ModelSettings(target="3000/min", ranks={"general": 1})}
    insert(addresses, 20)
    async with running(addresses, settings.model_copy(update={"models": unknown})) as engine:
        async with working(engine, "no-such-model", "phi-4"):
            await until(lambda: solved(addresses) == 20)
            errors = "SELECT trouble FROM roster WHERE model = 'no-such-model' AND trouble IS NOT NULL"
            await until(lambda: bool(ask(addresses, errors)))
        assert "last: unknown_model" in ask(addresses, errors)[0]["trouble"]


async def test_call_larger_than_its_token_window_fails_with_the_reason(addresses: Addresses) -> None:
    ask(addresses, "INSERT INTO tasks (prompt) VALUES (repeat('word ', 500))")
    settings = config(**dict.fromkeys(MODELS, "3000/min, 1k tokens/min"))
    async with running(addresses, settings) as engine, working(engine):
        await until(lambda: bool(ask(addresses, "SELECT FROM tasks WHERE status = 'failed'")))
    failure = ask(addresses, "SELECT failure FROM tasks")[0]["failure"]
    assert failure.startswith("the prompt is too long for every model: 2500 bytes are about 500 tokens")
    assert "the most that a model takes is 1000 tokens" in failure
    assert ask(addresses, "SELECT FROM model_calls") == []


async def test_prompt_too_long_for_most_models_goes_to_the_one_that_takes_it(addresses: Addresses) -> None:
    """The others are never asked, and no attempt is lost."""
    settings = config()
    large = settings.models["phi-4"].model_copy(update={"context_tokens": 131_072})
    models = {**settings.models, "phi-4": large}  # the other has the default of 8,192
    ask(addresses, "INSERT INTO tasks (prompt) SELECT repeat('word', 9000 + n) FROM generate_series(1, 20) n")
    insert(addresses, 20)
    settings = settings.model_copy(update={"models": models})
    calls_of = "SELECT DISTINCT c.task_id, c.model FROM model_calls c JOIN tasks t ON t.id = c.task_id"
    long_calls = f"{calls_of} WHERE octet_length(t.prompt) > 30000 AND c.outcome IS NOT NULL"
    async with running(addresses, settings) as engine, working(engine):
        await until(lambda: len(ask(addresses, long_calls)) == 20 and solved(addresses) > 20)
    assert {row["model"] for row in ask(addresses, long_calls)} == {"phi-4"}
    assert ask(addresses, "SELECT FROM model_calls WHERE outcome IN ('too_long', 'rejected')") == []


async def test_prompt_edited_in_flight_is_solved_again(addresses: Addresses) -> None:
    insert(addresses, 1)
    async with running(addresses, config()) as engine, working(engine, "phi-4"):
        await until(lambda: calls(addresses) == 1)
        ask(addresses, "UPDATE tasks SET prompt = 'another question'")
        await until(lambda: solved(addresses) == 1)
        await until(lambda: engine.in_flight() == 0)
    settled = ask(addresses, "SELECT settlement FROM model_calls ORDER BY call_id")
    assert settled[0]["settlement"] == "stale"
    assert settled[-1]["settlement"] == "solved"


async def test_deleted_task_leaves_nothing_behind(addresses: Addresses) -> None:
    insert(addresses, 3)
    async with running(addresses, config()) as engine, working(engine, "phi-4"):
        await until(lambda: calls(addresses) >= 1)
        ask(addresses, "DELETE FROM tasks")
        await until(lambda: calls(addresses, "outcome IS NULL") == 0)
        await until(lambda: engine.in_flight() == 0)
        assert ask(addresses, "SELECT * FROM queue") == []


async def test_raised_target_takes_effect_within_a_second(addresses: Addresses) -> None:
    insert(addresses, 2000)
    async with running(addresses, config(**{"phi-4": "6/min"})) as engine, working(engine, "phi-4"):
        await until(lambda: calls(addresses) >= 1)
        await asyncio.sleep(1)
        before = calls(addresses)
        await set_targets(engine, 10, phi_4="1200/min")
        assert await until(lambda: calls(addresses) >= before + 3) < 1.5


async def test_warm_worker_sends_a_new_task_immediately(addresses: Addresses, backend: Backend) -> None:
    delays = []
    async with running(addresses, config()) as engine, working(engine):
        await asyncio.sleep(1)
        for number in range(1, 11):
            insert(addresses, 1)
            at = time.monotonic()
            await until(lambda: len(backend.arrivals()) >= number)  # noqa: B023 - used within the turn
            delays.append(max(a["at"] for a in backend.arrivals()) - at)
            await until(lambda: solved(addresses) == number)  # noqa: B023 - the same
    assert sorted(delays)[5] <= 0.15, delays


async def test_first_worker_of_a_run_pulls_for_those_still_starting(addresses: Addresses) -> None:
    insert(addresses, 300)
    async with running(addresses, config()) as engine:
        first = asyncio.create_task(Worker(engine, "phi-4", "run-1", frozenset(MODELS)).run())
        await until(lambda: calls(addresses, "model = 'llama-3.1-8b'") > 2, 5)
        second = asyncio.create_task(Worker(engine, "llama-3.1-8b", "run-1", frozenset(MODELS)).run())
        await until(lambda: not engine.handover.covers("llama-3.1-8b"), 2)
        second.cancel()  # like a worker that is marked failed: its model pauses
        await asyncio.gather(second, return_exceptions=True)
        await asyncio.sleep(0.5)
        before = calls(addresses, "model = 'llama-3.1-8b'")
        await until(lambda: calls(addresses, "model = 'phi-4'") > before + 10, 10)
        assert calls(addresses, "model = 'llama-3.1-8b'") == before
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


async def test_engine_reads_variables_only_without_a_watcher(addresses: Addresses) -> None:
    reads: list[list[str]] = []

    async def read(models: list[str]) -> dict[str, str | None]:
        reads.append(models)
        return {"phi-4": "7/min"}

    with connect(addresses.database_url) as connection:
        sync_roster(connection, config())
    engine = Engine(addresses, config(), read)
    ask(addresses, "SELECT watcher_heartbeat()")
    await engine.start()
    await engine._variables_step()
    assert reads == []
    ask(addresses, "UPDATE solving SET watched_at = clock_timestamp() - interval '1 minute'")
    await until(lambda: engine.state is not None and not engine.state.watched)
    await engine._variables_step()
    assert reads == [sorted(MODELS)]
    traffic = await engine.limiter.snapshot(["phi-4"])
    assert traffic["phi-4"].target == "7/min"
    await engine.stop()


async def test_waiting_for_work_lets_the_engine_pull_until_workers_start(addresses: Addresses) -> None:
    async with running(addresses, config()) as engine:
        waiting = asyncio.create_task(wait_for_work(engine))
        await asyncio.sleep(0.5)
        assert not waiting.done()
        assert not engine.idle
        insert(addresses, 200)
        await asyncio.wait_for(waiting, 2)
        for model in MODELS:
            await until(lambda: calls(addresses, f"model = '{model}'") > 2, 3)  # noqa: B023 - within the turn
        async with working(engine):
            await until(lambda: not any(engine.handover.covers(model) for model in MODELS), 3)
            await until(lambda: solved(addresses) == 200, 30)


async def test_exhausted_client_delays_no_other_and_is_not_claimed_again(
    addresses: Addresses, backend: Backend
) -> None:
    settings = config().model_copy(update={"clients": {"alice": ClientSettings(limit="5/min, burst")}})
    with connect(addresses.database_url) as connection:
        rows(
            connection,
            "INSERT INTO tasks (prompt, client)"
            " SELECT 'prompt ' || g, CASE g %% 2 WHEN 0 THEN 'alice' ELSE 'bob' END"
            " FROM generate_series(1, 60) g",
        )
    claims: list[str] = []
    async with running(addresses, settings) as engine:
        claim = engine.queue.claim

        async def counted(*arguments: Any, **options: Any) -> Any:
            claimed = await claim(*arguments, **options)
            if claimed is not None:
                claims.append(claimed.client)
            return claimed

        engine.queue.claim = counted  # type: ignore[method-assign]
        workers = [asyncio.create_task(Worker(engine, m, "run-1", frozenset(MODELS)).run()) for m in MODELS]
        await until(lambda: solved(addresses) == 35, 40)
        await asyncio.sleep(1.0)
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    found = ask(
        addresses, "SELECT client, count(*) AS n FROM model_calls WHERE outcome = 'answered' GROUP BY 1"
    )
    assert {row["client"]: row["n"] for row in found} == {"alice": 5, "bob": 30}
    assert claims.count("alice") < 5 + 30, "its tasks are claimed again and again"
    assert ask(addresses, ATTEMPTS)[0]["n"] == 0
