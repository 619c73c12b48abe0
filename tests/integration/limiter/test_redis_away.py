"""Redis is away, or comes back without its memory: nothing given back is lost, and one line says it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import redis.asyncio

from local.redis import RedisServer, start_redis
from router.errors import LimiterUnavailable
from router.limiter import LimiterSettings, PastCall, TrafficLimiter

SETTINGS = LimiterSettings(max_call_seconds=60)


async def no_calls(_model: str, _seconds: float) -> list[PastCall]:
    return []


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[RedisServer]:
    started = start_redis(tmp_path, arguments=("--maxmemory-policy", "noeviction"))
    yield started
    started.stop()


@pytest.fixture
async def client(server: RedisServer) -> AsyncIterator[redis.asyncio.Redis]:
    one = redis.asyncio.Redis.from_url(server.url, socket_timeout=1, retry=None)
    yield one
    await one.aclose()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "router.limiter"]


async def test_one_line_says_that_redis_is_away_and_one_that_it_is_back(
    server: RedisServer, client: redis.asyncio.Redis, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "router.limiter")
    async with TrafficLimiter(client, no_calls, settings=SETTINGS) as limiter:
        await limiter.set_target("llama", "100/s")
        await limiter.acquire("llama")
        server.stop()
        waiting = asyncio.create_task(limiter.acquire("llama"))
        for _ in range(5):
            with pytest.raises(LimiterUnavailable):
                await limiter.reserve("llama")
        again = start_redis(server.data_folder, port=server.port)
        back_at = time.monotonic()
        try:
            await asyncio.wait_for(waiting, 5)
            assert time.monotonic() - back_at < 2
        finally:
            again.stop()
    away, back, lost, counted = said(caplog)
    assert away.startswith("Redis is unavailable, nothing is sent until it recovers: ConnectionError")
    assert back.startswith("Redis recovered after")
    assert lost.startswith("Redis lost the sends of llama")
    assert counted == "rebuilt the sends of llama from 0 logged calls"


async def test_out_of_memory_grants_nothing_and_is_said_once(
    client: redis.asyncio.Redis, caplog: pytest.LogCaptureFixture
):
    async with TrafficLimiter(client, no_calls, settings=SETTINGS) as limiter:
        await limiter.set_target("llama", "100/s, 3 at once")
        await limiter.acquire("llama")
        await client.config_set("maxmemory", 1)
        for _ in range(3):
            with pytest.raises(LimiterUnavailable, match="OutOfMemory"):
                await limiter.reserve("llama")
        await client.config_set("maxmemory", 0)
        await limiter.acquire("llama", timeout_seconds=1)
        assert (await limiter.snapshot(["llama"]))["llama"].in_flight == 2
    assert len(said(caplog)) == 1


async def test_what_was_given_back_while_redis_could_not_take_it_arrives_later(client: redis.asyncio.Redis):
    async with TrafficLimiter(client, no_calls, settings=SETTINGS) as limiter:
        await limiter.set_target("llama", "100/min, 100 tokens/min, 1 at once, burst")
        permit = await limiter.acquire("llama", 90)
        await client.replicaof("127.0.0.1", "1")  # read-only, and knows what it knew
        with pytest.raises(LimiterUnavailable):
            await limiter.release(permit, tokens=10)
        await client.replicaof("NO", "ONE")
        await limiter.acquire("llama", 90, timeout_seconds=3)  # its place is free, and its tokens are


async def test_a_script_that_was_flushed_is_loaded_again_in_passing(client: redis.asyncio.Redis):
    async with TrafficLimiter(client, no_calls, settings=SETTINGS) as limiter:
        await limiter.set_target("llama", "2/min, burst")
        await limiter.reserve("llama")
        await client.script_flush()
        assert await limiter.reserve("llama")
        await client.script_flush()
        assert not await limiter.reserve("llama")  # and nothing was forgotten


async def test_a_cancelled_question_harms_no_other(client: redis.asyncio.Redis):
    async with TrafficLimiter(client, no_calls, settings=SETTINGS) as limiter:
        await limiter.set_target("llama", "100/min, burst")
        await limiter.reserve("llama")
        for _ in range(20):
            asking = asyncio.create_task(limiter.reserve("llama"))
            await asyncio.sleep(0)  # it has been asked
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        now = (await limiter.snapshot(["llama"]))["llama"]
        assert now.sent["100/min"] <= 21
        assert await limiter.reserve("llama")
