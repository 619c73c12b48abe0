"""Targets and the pause are applied, also with a wrong clock or without Redis."""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator

import asyncpg
import pytest
import redis.asyncio

from router.database import open_pool
from router.limiter.limiter import TrafficLimiter
from router.limiter.script import redis_client as redis_client_of
from router.models.targets import TargetSync

MODEL = "phi-4"


@pytest.fixture
async def pool(database: str) -> AsyncIterator[asyncpg.Pool]:
    opened = await open_pool(database, connections=2)
    yield opened
    await opened.close()


async def test_older_edit_is_applied_once_its_version_is_newer(
    pool: asyncpg.Pool, redis_client: redis.asyncio.Redis
) -> None:
    """A reader whose clock was ahead has set the target before."""
    async with TrafficLimiter(redis_client) as limiter:
        ahead = int((time.time() + 60) * 1e6)
        await limiter.set_target(MODEL, "5/min", version=ahead)
        targets = TargetSync(pool, limiter)
        await targets.apply({MODEL: "0"}, version=ahead - 1_000_000)
        assert (await limiter.shared_snapshot(MODEL)).target == "5/min"
        await targets.apply({MODEL: "0"}, version=ahead + 1_000_000)  # the same line, read later
        assert (await limiter.shared_snapshot(MODEL)).target == "0"


async def test_error_of_a_deleted_variable_is_cleared(
    pool: asyncpg.Pool, redis_client: redis.asyncio.Redis
) -> None:
    async with TrafficLimiter(redis_client) as limiter:
        targets = TargetSync(pool, limiter)
        for version, lines in enumerate([{MODEL: "12/mn"}, {MODEL: "12/mn", "gpt-4o-mini": "1/s"}], start=1):
            await targets.apply(lines, version=version)
            await targets.clear_errors(lines)
            assert await pool.fetchval("SELECT count(*) FROM traffic_troubles") == 1
        await targets.clear_errors({MODEL: None})
        assert await pool.fetchval("SELECT count(*) FROM traffic_troubles") == 0


async def test_pause_is_applied_without_redis(pool: asyncpg.Pool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections and never replies
        client = redis_client_of(f"redis://127.0.0.1:{silent.getsockname()[1]}/0")
        targets = TargetSync(pool, TrafficLimiter(client))
        for paused in (True, False):
            began = time.monotonic()
            await targets.sync({MODEL: "5/min"}, paused=paused, version=time.time_ns() // 1000)
            assert await pool.fetchval("SELECT held FROM solving") is paused
            assert time.monotonic() - began < 2
        await client.aclose()
