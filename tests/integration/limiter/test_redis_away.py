"""Outages of Redis, with and without loss of state: no release is lost, and each outage is logged once."""

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


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "router.limiter"]


async def test_outage_and_recovery_are_logged_once(
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
    away, back, lost, rebuilt = logged(caplog)
    assert away.startswith("nothing is sent until Redis recovers: Redis is unavailable: ConnectionError")
    assert back.startswith("Redis recovered after")
    assert lost.startswith("Redis lost the sends of llama")
    assert rebuilt == "rebuilt the sends of llama from 0 logged calls"


async def test_out_of_memory_grants_nothing_and_is_logged_once(
    client: redis.asyncio.Redis, caplog: pytest.LogCaptureFixture
):
    async with TrafficLimiter(client, no_calls, settings=SETTINGS) as limiter:
        await limiter.set_target("llama", "100/s, 3 at once")
        await limiter.acquire("llama")
        await client.config_set("maxmemory", 1)
        for _ in range(3):
            with pytest.raises(LimiterUnavailable, match="out of memory"):
                await limiter.reserve("llama")
        await client.config_set("maxmemory", 0)
        await limiter.acquire("llama", timeout_seconds=1)
        assert (await limiter.snapshot(["llama"]))["llama"].in_flight == 2
    assert len([line for line in logged(caplog) if line.startswith("nothing is sent")]) == 1


async def test_releases_during_an_outage_arrive_later(client: redis.asyncio.Redis):
    async with TrafficLimiter(client, no_calls, settings=SETTINGS) as limiter:
        await limiter.set_target("llama", "100/min, 100 tokens/min, 1 at once, burst")
        permit = await limiter.acquire("llama", 90)
        await client.replicaof("127.0.0.1", "1")  # read-only, with its state
        with pytest.raises(LimiterUnavailable):
            await limiter.release(permit, tokens=10)
        await client.replicaof("NO", "ONE")
        await limiter.acquire("llama", 90, timeout_seconds=3)  # its slot and its tokens are free


async def test_flushed_script_is_loaded_again(client: redis.asyncio.Redis):
    async with TrafficLimiter(client, no_calls, settings=SETTINGS) as limiter:
        await limiter.set_target("llama", "2/min, burst")
        await limiter.reserve("llama")
        await client.script_flush()
        assert await limiter.reserve("llama")
        await client.script_flush()
        assert not await limiter.reserve("llama")  # and the log is kept


async def test_cancelled_request_affects_no_other(client: redis.asyncio.Redis):
    async with TrafficLimiter(client, no_calls, settings=SETTINGS) as limiter:
        await limiter.set_target("llama", "100/min, burst")
        await limiter.reserve("llama")
        for _ in range(20):
            pending = asyncio.create_task(limiter.reserve("llama"))
            await asyncio.sleep(0)  # the request was written
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)
        now = (await limiter.snapshot(["llama"]))["llama"]
        assert now.sent["100/min"] <= 21
        assert await limiter.reserve("llama")
