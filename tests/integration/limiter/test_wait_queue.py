"""Many waiters in one process: few round trips, and no more permits than the process can use."""

from __future__ import annotations

import asyncio
import time

import pytest
import redis.asyncio

from router.limiter import TrafficLimiter


@pytest.mark.alone
async def test_queue_requests_no_more_than_its_process_can_use(redis_client: redis.asyncio.Redis):
    async with TrafficLimiter(redis_client) as limiter:
        await limiter.set_target("llama", "100000/s, burst")  # permits are valid for 25 ms

        async def use() -> None:
            await limiter.acquire("llama")
            time.sleep(0.002)  # blocks the process: 12 permits at a time stay valid

        await asyncio.gather(*[use() for _ in range(250)])
        await limiter._tasks.wait()
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
