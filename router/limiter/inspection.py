"""Synchronous reads of the limiter for the CLI and the console, each over a connection of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from redis.exceptions import RedisError

from router.errors import LimiterError, LimiterUnavailable, first_line
from router.limiter.limiter import TrafficLimiter
from router.limiter.script import redis_client
from router.limiter.snapshot import ModelTraffic

REDIS_SECONDS = 2.0
POLL_SECONDS = 0.05
_ERRORS = (LimiterError, RedisError, OSError, ValueError)


def read_limiter(
    redis_url: str | None, models: Sequence[str]
) -> tuple[dict[str, ModelTraffic] | None, str | None]:
    """Returns the snapshot of each model, or None and a sentence that says why there is none."""
    if not redis_url:
        return None, "ROUTER_REDIS_URL is not set."
    try:
        return asyncio.run(asyncio.wait_for(_snapshot(redis_url, models), 2 * REDIS_SECONDS)), None
    except asyncio.TimeoutError:
        return None, "Redis does not answer."
    except LimiterUnavailable as error:
        return None, first_line(error)
    except _ERRORS as error:
        return None, f"Redis is unavailable: {first_line(error).rstrip('.')}."


def read_client_limits(redis_url: str | None, clients: Sequence[str]) -> dict[str, ModelTraffic]:
    """Returns limit and usage of each of the clients that have a limit; none while Redis is unavailable."""
    if not redis_url or not clients:
        return {}
    try:
        return asyncio.run(asyncio.wait_for(_client_limits(redis_url, clients), 2 * REDIS_SECONDS))
    except (*_ERRORS, asyncio.TimeoutError):
        return {}


def seconds_until_applied(redis_url: str, model: str, target: str, *, timeout_seconds: float) -> float | None:
    """Waits until a target (its canonical line) is applied; None if it is not within the timeout."""
    try:
        return asyncio.run(_until_applied(redis_url, model, target, timeout_seconds))
    except _ERRORS:
        return None


@asynccontextmanager
async def _limiter(redis_url: str) -> AsyncIterator[TrafficLimiter]:
    client = redis_client(redis_url, seconds=REDIS_SECONDS)
    try:
        async with TrafficLimiter(client) as limiter:
            yield limiter
    finally:
        await client.aclose()


async def _snapshot(redis_url: str, models: Sequence[str]) -> dict[str, ModelTraffic]:
    async with _limiter(redis_url) as limiter:
        await limiter.check_writable()
        return await limiter.snapshot(models)


async def _client_limits(redis_url: str, clients: Sequence[str]) -> dict[str, ModelTraffic]:
    async with _limiter(redis_url) as limiter:
        return await limiter.snapshot_clients(clients)


async def _until_applied(redis_url: str, model: str, target: str, timeout_seconds: float) -> float | None:
    started = time.monotonic()
    async with _limiter(redis_url) as limiter:
        while True:
            applied = (await limiter.snapshot([model]))[model].target
            waited = time.monotonic() - started
            if applied == target:
                return waited
            if waited >= timeout_seconds:
                return None
            await asyncio.sleep(POLL_SECONDS)
