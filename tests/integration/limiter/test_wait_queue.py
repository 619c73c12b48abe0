"""Many waiters in one process: in order, in few round trips, and no faster than the process can use."""

from __future__ import annotations

import asyncio
import time

import pytest
import redis.asyncio

from router.limiter import TrafficLimiter


@pytest.mark.alone
async def test_a_line_asks_for_no_more_than_its_process_can_use(redis_client: redis.asyncio.Redis):
    async with TrafficLimiter(redis_client) as limiter:
        await limiter.set_target("llama", "100000/s, burst")  # a permit lives for 25 ms

        async def use() -> None:
            await limiter.acquire("llama")
            time.sleep(0.002)  # the whole process is busy with each of them: 12 at a time are alive

        await asyncio.gather(*[use() for _ in range(250)])
        await limiter._tasks.wait()
        granted = limiter._tracker.state("llama").head
        assert granted < 250 * 4


async def test_a_thousand_waiters_take_less_than_a_round_trip_each(redis_client: redis.asyncio.Redis):
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
