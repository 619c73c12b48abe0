"""What the limiter holds at this moment, for people who look: a short-lived connection to Redis each time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from redis.exceptions import RedisError

from router.errors import LimiterError, first_line
from router.limiter.limiter import ModelTraffic, TrafficLimiter
from router.limiter.script import redis_client

REDIS_SECONDS = 2.0
POLL_SECONDS = 0.05


def read_limiter(
    redis_url: str | None, models: Sequence[str]
) -> tuple[dict[str, ModelTraffic] | None, str | None]:
    """What the limiter holds for each model, or None and a sentence that says why it cannot be known."""
    if not redis_url:
        return None, "ROUTER_REDIS_URL is not set."
    try:
        return asyncio.run(asyncio.wait_for(_snapshot(redis_url, models), 2 * REDIS_SECONDS)), None
    except asyncio.TimeoutError:
        return None, "Redis does not answer."
    except (LimiterError, RedisError, OSError, ValueError) as error:
        return None, f"Redis is away: {first_line(str(error.__cause__ or error)).rstrip('.')}."


async def _snapshot(redis_url: str, models: Sequence[str]) -> dict[str, ModelTraffic]:
    client = redis_client(redis_url, seconds=REDIS_SECONDS)
    try:
        async with TrafficLimiter(client) as limiter:
            return await limiter.snapshot(models)
    finally:
        await client.aclose()


def seconds_until_in_force(
    redis_url: str, model: str, target: str, *, at_most_seconds: float
) -> float | None:
    """Wait until the limiter works by this target (its canonical line); None if it does not in time."""
    try:
        return asyncio.run(_until_in_force(redis_url, model, target, at_most_seconds))
    except (LimiterError, RedisError, OSError, ValueError):
        return None


async def _until_in_force(redis_url: str, model: str, target: str, at_most_seconds: float) -> float | None:
    client = redis_client(redis_url, seconds=REDIS_SECONDS)
    started = time.monotonic()
    try:
        async with TrafficLimiter(client) as limiter:
            while True:
                in_force = (await limiter.snapshot([model]))[model].target
                waited = time.monotonic() - started
                if in_force == target:
                    return waited
                if waited >= at_most_seconds:
                    return None
                await asyncio.sleep(POLL_SECONDS)
    finally:
        await client.aclose()
