"""The limiter by example: targets, permits with a send time, and rolling windows."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator

import pytest
import redis.asyncio

from router.errors import PermitExpired
from router.limiter import TrafficLimiter, WaitReason
from router.traffic import TrafficTarget


@pytest.fixture
async def limiter(redis_client: redis.asyncio.Redis) -> AsyncIterator[TrafficLimiter]:
    async with TrafficLimiter(redis_client) as one:
        yield one


async def test_target_applies_from_the_next_decision(limiter: TrafficLimiter):
    await limiter.set_target("llama", TrafficTarget.parse("2/min, burst"))

    assert await limiter.reserve("llama")
    assert await limiter.reserve("llama")
    wait = await limiter.reserve("llama")  # a denial says when to retry
    assert not wait
    assert wait.reason is WaitReason.WINDOW
    assert wait.again_seconds == pytest.approx(60.25, abs=1)

    await limiter.set_target("llama", TrafficTarget.parse("3/min, burst"))
    assert await limiter.reserve("llama")  # one more: the two before still count
    assert not await limiter.reserve("llama")


async def test_acquire_returns_at_the_send_time_and_sends_are_paced(limiter: TrafficLimiter):
    await limiter.set_target("llama", TrafficTarget.parse("10/s"))
    send_times = []
    for _ in range(4):
        permit = await limiter.acquire("llama")
        permit.check()  # just before the socket write
        send_times.append(permit.send_at)
        await limiter.release(permit)
    gaps = [later - sooner for sooner, later in itertools.pairwise(send_times)]
    assert min(gaps) > 0.08  # 0.9 s / 10


async def test_expired_permit_can_be_cancelled(limiter: TrafficLimiter):
    await limiter.set_target("llama", TrafficTarget.parse("1/s, burst"))
    permit = await limiter.acquire("llama")
    await asyncio.sleep(permit.expires_at - time.monotonic() + 0.001)
    with pytest.raises(PermitExpired):
        permit.check()
    await limiter.cancel(permit)
    assert await limiter.reserve("llama")


async def test_tokens_are_reserved_before_and_corrected_after_the_call(limiter: TrafficLimiter):
    await limiter.set_target("llama", TrafficTarget.parse("1k tokens/min"))
    permit = await limiter.acquire("llama", tokens=900)  # upper bound: prompt and max_tokens
    assert not await limiter.reserve("llama", tokens=200)
    await limiter.release(permit, tokens=412)  # usage reported by the backend
    assert await limiter.reserve("llama", tokens=200)


async def test_slot_is_free_when_the_call_ends(limiter: TrafficLimiter):
    await limiter.set_target("llama", TrafficTarget.parse("1 at once"))
    permit = await limiter.acquire("llama")
    waiting = asyncio.create_task(limiter.acquire("llama"))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await limiter.release(permit)
    await asyncio.wait_for(waiting, 1)
