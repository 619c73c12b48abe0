"""What the operator wrote is put in force, also when a clock is wrong or Redis is away."""

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


async def test_an_edit_that_seems_older_is_in_force_as_soon_as_the_clock_says_so(
    pool: asyncpg.Pool, redis_client: redis.asyncio.Redis
) -> None:
    """Somebody whose clock was ahead set the target before."""
    async with TrafficLimiter(redis_client) as limiter:
        ahead = int((time.time() + 60) * 1e6)
        await limiter.set_target(MODEL, "5/min", version=ahead)
        watch = TargetSync(pool, limiter)
        await watch.apply({MODEL: "0"}, version=ahead - 1_000_000)
        assert (await limiter.shared_snapshot(MODEL)).target == "5/min"
        await watch.apply({MODEL: "0"}, version=ahead + 1_000_000)  # the same line, read later
        assert (await limiter.shared_snapshot(MODEL)).target == "0"


async def test_a_variable_that_is_gone_is_wrong_no_more(
    pool: asyncpg.Pool, redis_client: redis.asyncio.Redis
) -> None:
    async with TrafficLimiter(redis_client) as limiter:
        watch = TargetSync(pool, limiter)
        for version, lines in enumerate([{MODEL: "12/mn"}, {MODEL: "12/mn", "gpt-4o-mini": "1/s"}], start=1):
            await watch.apply(lines, version=version)
            await watch.clear_errors(lines)
            assert await pool.fetchval("SELECT count(*) FROM traffic_troubles") == 1
        await watch.clear_errors({MODEL: None})
        assert await pool.fetchval("SELECT count(*) FROM traffic_troubles") == 0


async def test_the_pause_needs_no_redis(pool: asyncpg.Pool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and never answers
        client = redis_client_of(f"redis://127.0.0.1:{silent.getsockname()[1]}/0")
        watch = TargetSync(pool, TrafficLimiter(client))
        for paused in (True, False):
            began = time.monotonic()
            await watch.step({MODEL: "5/min"}, paused=paused, version=time.time_ns() // 1000)
            assert await pool.fetchval("SELECT held FROM solving") is paused
            assert time.monotonic() - began < 2
        await client.aclose()
