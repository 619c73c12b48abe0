"""A new ranking reaches a running worker: bounded models pull no more than their share."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from local.redis import RedisServer
from models_backend.process import start_backend
from router.database import connect, rows
from router.models.roster import sync_roster
from router.settings.environment import Addresses
from router.settings.models import ModelSettings
from router.settings.router import RouterConfig, WorkerSettings
from router.workers.engine import Engine
from router.workers.worker import Worker

FIRST, LOW = "llama-3.1-8b", "phi-4"
SHARE = 0.05


async def test_bounded_model_pulls_its_share_and_no_more(
    bare_database: str, redis_server: RedisServer, redis_client: Any, tmp_path: Path
) -> None:
    models = {
        name: ModelSettings(target="3000/min", ranks={"general": place})
        for place, name in enumerate((LOW, FIRST), start=1)
    }
    config = RouterConfig(models=models, worker=WorkerSettings(idle_leave_seconds=1.0))
    backend = start_backend(tmp_path, "--time-scale", "50", "--latency", "even:1:2")

    def ask(statement: str, *arguments: Any) -> list[dict[str, Any]]:
        with connect(bare_database) as connection:
            return rows(connection, statement, arguments)

    with connect(bare_database) as connection:
        sync_roster(connection, config)
    insertion = (
        "INSERT INTO tasks (prompt, category) SELECT 'prompt ' || g, 'general' FROM generate_series(1, %s) g"
    )
    ask(insertion, 400)
    engine = Engine(
        Addresses(database_url=bare_database, redis_url=redis_server.url, backend_url=backend.url), config
    )
    await engine.start()
    try:
        running = [
            asyncio.create_task(Worker(engine, model, "run-1", frozenset(models)).run(), name=model)
            for model in models
        ]
        while not ask("SELECT FROM model_calls WHERE model = %s", LOW):  # it is not bounded yet
            await asyncio.sleep(0.05)
        ask("UPDATE rankings SET quality = 0.8, place = 1")
        ask(
            "UPDATE rankings SET quality = 0.2, place = 2, standing = 'low',"
            " least_share = %s, most_share = %s WHERE model = %s", SHARE, SHARE, LOW,
        )  # fmt: skip
        changed_at = time.monotonic()
        while LOW not in engine.plan.bounds:
            assert time.monotonic() - changed_at < 5
            await asyncio.sleep(0.02)
        (before,) = ask(
            "SELECT count(*) FILTER (WHERE model = %s) AS low, count(*) AS calls FROM model_calls", LOW
        )
        await asyncio.wait_for(asyncio.gather(*running), 60)
    finally:
        await engine.stop()
        backend.stop()
    (after,) = ask(
        "SELECT count(*) FILTER (WHERE model = %s) AS low, count(*) AS calls FROM model_calls", LOW
    )
    assert ask("SELECT count(*) AS n FROM tasks WHERE status <> 'solved'") == [{"n": 0}]
    pulled, calls = after["low"] - before["low"], after["calls"] - before["calls"]
    assert calls > 100
    assert 0 < pulled <= SHARE * calls + 4  # two calls of credit, and the claims ahead
