"""The limiter, by example: a target is a line, a permit has a moment, and nothing passes the window."""

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


async def test_an_operator_writes_one_line_and_it_holds_from_the_next_decision(limiter: TrafficLimiter):
    await limiter.set_target("llama", TrafficTarget.parse("2/min, burst"))

    assert await limiter.reserve("llama")
    assert await limiter.reserve("llama")
    refusal = await limiter.reserve("llama")  # not yes or no, but when
    assert not refusal
    assert refusal.reason is WaitReason.WINDOW
    assert refusal.again_seconds == pytest.approx(60.25, abs=1)

    await limiter.set_target("llama", TrafficTarget.parse("3/min, burst"))
    assert await limiter.reserve("llama")  # one more: the two before are not forgotten
    assert not await limiter.reserve("llama")


async def test_acquire_returns_at_the_moment_and_sends_are_spread(limiter: TrafficLimiter):
    await limiter.set_target("llama", TrafficTarget.parse("10/s"))
    moments = []
    for _ in range(4):
        permit = await limiter.acquire("llama")
        permit.check()  # just before the socket write
        moments.append(permit.send_at)
        await limiter.release(permit)
    gaps = [later - sooner for sooner, later in itertools.pairwise(moments)]
    assert min(gaps) > 0.08  # 0.9 of a second over ten


async def test_a_permit_that_waits_too_long_is_dead_and_can_be_given_back(limiter: TrafficLimiter):
    await limiter.set_target("llama", TrafficTarget.parse("1/s, burst"))
    permit = await limiter.acquire("llama")
    await asyncio.sleep(permit.expires_at - time.monotonic() + 0.001)
    with pytest.raises(PermitExpired):
        permit.check()
    await limiter.cancel(permit)
    assert await limiter.reserve("llama")


async def test_tokens_are_reserved_before_and_corrected_after(limiter: TrafficLimiter):
    await limiter.set_target("llama", TrafficTarget.parse("1k tokens/min"))
    permit = await limiter.acquire("llama", tokens=900)  # a bound: the prompt and max_tokens
    assert not await limiter.reserve("llama", tokens=200)
    await limiter.release(permit, tokens=412)  # what the backend said it used
    assert await limiter.reserve("llama", tokens=200)


async def test_a_place_at_once_is_free_when_the_call_ends(limiter: TrafficLimiter):
    await limiter.set_target("llama", TrafficTarget.parse("1 at once"))
    permit = await limiter.acquire("llama")
    waiting = asyncio.create_task(limiter.acquire("llama"))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await limiter.release(permit)
    await asyncio.wait_for(waiting, 1)
