"""Steps of Redis's clock: windows age with real time, and no model is blocked for longer."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import AsyncIterator

import pytest
import redis.asyncio

from router.limiter import Permit, TrafficLimiter, Wait, WaitReason
from router.limiter.limiter import SCRIPT

HOUR = 3600
PERIOD = 1.06  # of a window of 1 s, slacks included
SEND_SLACK = 0.025
CLOCK = "redis.call('TIME')"
ADJUSTABLE = (
    "(function() local t = redis.call('TIME') t[1] = t[1] + (redis.call('GET', 'skew') or 0) return t end)()"
)


class Client:
    """A process with its own limiter, on a Redis whose clock the test sets."""

    def __init__(self, connection: redis.asyncio.Redis) -> None:
        self.redis = connection
        self.limiter = TrafficLimiter(connection)
        assert SCRIPT.count(CLOCK) == 1
        self.limiter._script.text = SCRIPT.replace(CLOCK, ADJUSTABLE)

    async def set_clock(self, skew_seconds: int) -> None:
        await self.redis.set("skew", skew_seconds)

    async def fill(self) -> float:
        """Uses up the window and returns the time."""
        while isinstance(await self.limiter.reserve("llama"), Permit):
            pass
        return time.monotonic()

    async def refused(self) -> float:
        """Returns in how many seconds to retry."""
        answer = await self.limiter.reserve("llama")
        assert isinstance(answer, Wait)
        assert answer.again_seconds is not None
        return answer.again_seconds


@pytest.fixture
async def client(redis_client: redis.asyncio.Redis) -> AsyncIterator[Client]:
    one = Client(redis_client)
    await one.limiter.set_target("llama", "5/s, burst")
    yield one
    await one.limiter.aclose()


@pytest.fixture
async def other(redis_client: redis.asyncio.Redis) -> AsyncIterator[Client]:
    one = Client(redis_client)
    yield one
    await one.limiter.aclose()


@pytest.mark.parametrize("skews", [[HOUR], [-HOUR], [-HOUR, HOUR], [HOUR, 0], [30 * HOUR, -HOUR, HOUR, 0]])
async def test_window_ages_with_real_time_whatever_the_clock_is_set_to(
    client: Client, other: Client, skews: list[int]
):
    started_at = time.monotonic()
    await other.limiter.reserve("llama")
    full_at = await client.fill()
    for skew in skews:
        await client.set_clock(skew)
        for one in (other, client):
            assert await one.refused() >= started_at + PERIOD - time.monotonic() - SEND_SLACK - 0.01
    await asyncio.wait_for(client.limiter.acquire("llama"), 2 * PERIOD)
    assert started_at + PERIOD - SEND_SLACK - 0.01 <= time.monotonic() <= full_at + 2 * PERIOD


async def test_denied_requests_advance_a_clock_set_back(client: Client):
    full_at = await client.fill()
    await client.set_clock(-HOUR)
    while isinstance(await client.limiter.reserve("llama"), Wait):
        assert time.monotonic() < full_at + 2 * PERIOD
        await asyncio.sleep(0.02)


async def test_pause_of_the_only_client_counts_as_elapsed_time(client: Client):
    await client.limiter.set_target("llama", "5/s")
    await client.fill()
    await asyncio.sleep(PERIOD + 0.1)
    assert isinstance(await client.limiter.reserve("llama"), Permit)


async def test_cooldown_after_a_clock_step_keeps_its_length(client: Client):
    await client.fill()
    await client.set_clock(HOUR)
    await client.limiter.cool_down("llama", 0.5, "429")
    await client.set_clock(0)
    assert await client.refused() <= max(0.5, PERIOD) + SEND_SLACK


async def test_releases_and_targets_after_a_clock_step_age_no_window(client: Client):
    await client.limiter.set_target("llama", "5/s, 100 tokens/s, 3 at once, burst")
    permits = [await client.limiter.reserve("llama", 30) for _ in range(3)]
    await client.set_clock(HOUR)
    assert isinstance(permits[0], Permit)
    await client.limiter.release(permits[0], 25)
    await client.limiter.set_target("llama", "5/s, 90 tokens/s, 3 at once, burst")
    answer = await client.limiter.reserve("llama", 6)
    assert isinstance(answer, Wait)
    assert answer.reason is WaitReason.TOKENS
    assert (answer.again_seconds or 0) > 0.5
    assert isinstance(await client.limiter.reserve("llama", 5), Permit)
    assert (await client.limiter.reserve("llama")).reason is WaitReason.CONCURRENCY


async def test_slow_request_is_not_a_clock_step_for_other_clients(client: Client, other: Client):
    """A delayed request looks like a clock step; grants of other clients prove that time passed."""
    await client.limiter.set_target("llama", "20/s")
    await client.limiter.reserve("llama")
    seen = client.limiter._tracker.state("llama")
    assert seen.clock_offset is not None
    for _ in range(10):
        await other.limiter.acquire("llama")
    seen.clock_offset -= 400_000  # as if this request had been in transit for 0.4 s
    before = await _offset(client)
    assert isinstance(await client.limiter.reserve("llama"), Permit)
    assert before - await _offset(client) < 100_000


async def _offset(client: Client) -> float:
    """Returns the offset of the corrected clock from Redis's own, in microseconds."""
    packed = await client.redis.hget("router:{llama}", "state")
    return float(struct.unpack_from("<d", packed, 16)[0])
