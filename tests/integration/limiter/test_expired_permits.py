"""A permit that died unused costs nobody its moment."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from router.errors import PermitExpired
from router.limiter import Permit, TrafficLimiter

STALL_SECONDS = 0.3  # longer than the send slack of a minute's window
GAP_SECONDS = 0.9  # of 60/min


async def test_a_loop_that_stalled_past_a_moment_sends_as_soon_as_it_runs_again(redis_client: Any) -> None:
    async with TrafficLimiter(redis_client) as limiter:
        await limiter.set_target("m", "60/min")
        await limiter.acquire("m")
        first_at = time.monotonic()
        stall_in = GAP_SECONDS - STALL_SECONDS / 3
        asyncio.get_running_loop().call_later(stall_in, time.sleep, STALL_SECONDS)
        await limiter.acquire("m")
        waited = time.monotonic() - first_at
    assert GAP_SECONDS + STALL_SECONDS / 2 < waited < GAP_SECONDS * 1.8, waited


async def test_a_permit_that_was_too_late_at_the_socket_is_followed_by_one_for_now(redis_client: Any) -> None:
    async with TrafficLimiter(redis_client) as limiter:
        await limiter.set_target("m", "60/min")
        await limiter.acquire("m")
        late = await limiter.acquire("m")
        await stall(late)
        began = time.monotonic()
        await limiter.cancel(late)
        await limiter.acquire("m")
        assert time.monotonic() - began < GAP_SECONDS / 2


async def stall(permit: Permit) -> None:
    """Let the permit die."""
    await asyncio.sleep(STALL_SECONDS)
    with pytest.raises(PermitExpired):
        permit.check()
