"""Many waiters in one process: few round trips, and no more permits than the process can use."""

from __future__ import annotations

import asyncio
import time

import pytest
import redis.asyncio

from local.redis import RedisServer
from router.limiter import PastCall, TrafficLimiter, Wait, WaitReason


@pytest.mark.alone
async def test_queue_requests_no_more_than_its_process_can_use(redis_client: redis.asyncio.Redis):
    async with TrafficLimiter(redis_client) as limiter:
        await limiter.set_target("llama", "100000/s, burst")  # permits are valid for 25 ms

        async def use() -> None:
            await limiter.acquire("llama")
            time.sleep(0.002)  # blocks the process: 12 permits at a time stay valid

        await asyncio.gather(*[use() for _ in range(250)])
        await limiter._tracker.tasks.wait()
        granted = limiter._tracker.state("llama").head
        assert granted < 250 * 4


async def test_thousand_waiters_share_round_trips(redis_client: redis.asyncio.Redis):
    async with TrafficLimiter(redis_client) as limiter:
        await limiter.set_target("llama", "1000000/min, burst, 500 at once")

        async def use() -> None:
            await limiter.release(await limiter.acquire("llama"))

        await use()
        await redis_client.config_resetstat()
        await asyncio.gather(*[use() for _ in range(1000)])
        trips = (await redis_client.info("commandstats"))["cmdstat_evalsha"]["calls"]
        assert trips < 300
        assert (await limiter.snapshot(["llama"]))["llama"].in_flight == 0


async def test_large_call_is_not_starved_by_small_ones_of_other_processes(
    redis_server: RedisServer, redis_client: redis.asyncio.Redis
):
    """Eight processes use up the tokens in small calls; the window's throughput stays the same."""
    clients = [redis.asyncio.Redis.from_url(redis_server.url) for _ in range(9)]
    limiters = [TrafficLimiter(client) for client in clients]
    large, small = limiters[0], limiters[1:]
    await large.set_target("llama", "900 tokens/s, burst")
    used = 0

    async def use(limiter: TrafficLimiter) -> None:
        nonlocal used
        while True:
            await limiter.acquire("llama", 10)
            used += 10

    users = [asyncio.create_task(use(limiter)) for limiter in small for _ in range(4)]
    await asyncio.sleep(1.2)
    began, used = time.monotonic(), 0
    for _ in range(3):
        await large.acquire("llama", 600, timeout_seconds=6)
        used += 600
    rate = used / (time.monotonic() - began)
    for user in users:
        user.cancel()
    await asyncio.gather(*users, return_exceptions=True)
    for limiter, client in zip(limiters, clients, strict=True):
        await limiter.aclose()
        await client.aclose()
    assert rate > 0.7 * 900  # less than the whole window on a busy machine


@pytest.mark.alone
async def test_new_token_window_over_many_sends_blocks_redis_briefly(redis_client: redis.asyncio.Redis):
    async def history(_model: str, _seconds: float) -> list[PastCall]:
        return [PastCall(59 - number / 5100, 3) for number in range(300_000)]

    async with TrafficLimiter(redis_client, history) as limiter:
        await limiter.set_target("llama", "1000000/min, burst")
        await limiter.acquire("llama", timeout_seconds=20)
        await redis_client.config_set("slowlog-log-slower-than", 50_000)
        await redis_client.slowlog_reset()
        await limiter.set_target("llama", "1000000/min, 900100 tokens/min, 5 at once, burst")
        await limiter.acquire("llama", 50, timeout_seconds=5)
        wait = await limiter.reserve("llama", 300_000)
        assert isinstance(wait, Wait)
        assert wait.reason is WaitReason.TOKENS
        assert await redis_client.slowlog_get() == []
