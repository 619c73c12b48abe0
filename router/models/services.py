"""Opens and closes the connections that a process needs to call models."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial

import asyncpg

from router.background import close_with_timeout
from router.database import DedicatedConnection, fetch, open_pool
from router.limiter import CallEnd, LimiterSettings, PastCall, TrafficLimiter, redis_client
from router.models.backend import ModelsBackend
from router.models.targets import TargetSync, newest_target
from router.settings import Addresses, RouterConfig
from router.traffic import TrafficTarget

CLOSE_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Services:
    """Postgres pool, connection of the lease, limiter, Models Backend client, and the sync of targets."""

    pool: asyncpg.Pool
    lease: DedicatedConnection
    limiter: TrafficLimiter
    backend: ModelsBackend
    targets: TargetSync


@contextlib.asynccontextmanager
async def open_services(
    addresses: Addresses,
    config: RouterConfig,
    *,
    connections: int | None = None,
    redis_seconds: float = 5.0,
    needs_postgres: bool = True,
) -> AsyncIterator[Services]:
    """Opens the services of one event loop and closes them on exit, each within CLOSE_SECONDS.

    `connections` limits the pool (default: `worker.pool_connections`), `redis_seconds` a reply of Redis.
    Raises DatabaseError if Postgres is unavailable, unless `needs_postgres` is false.
    """
    async with contextlib.AsyncExitStack() as stack:
        pool = await open_pool(
            addresses.database_url,
            connections=connections or config.worker.pool_connections,
            min_connections=1 if needs_postgres else 0,
        )
        stack.push_async_callback(close_with_timeout, CLOSE_SECONDS, pool.close, pool.terminate)
        lease = DedicatedConnection(addresses.database_url, seconds=config.worker.lease_seconds / 3)
        stack.push_async_callback(lease.expire_connections)
        client = redis_client(addresses.redis_url, seconds=redis_seconds)
        stack.push_async_callback(client.aclose)
        limiter = TrafficLimiter(
            client, partial(past_calls, pool), call_ends=partial(call_ends, pool),
            stored_target=partial(newest_target, pool), settings=LimiterSettings.of(config),
            client_limit=partial(client_limit, config), client_history=partial(past_client_calls, pool),
        )  # fmt: skip
        stack.push_async_callback(close_with_timeout, CLOSE_SECONDS, limiter.aclose)
        backend = ModelsBackend(addresses.backend_url, config.backend, token=addresses.backend_token)
        await stack.enter_async_context(backend)
        yield Services(pool, lease, limiter, backend, TargetSync(pool, limiter))


async def past_calls(pool: asyncpg.Pool, model: str, seconds: float) -> list[PastCall]:
    """Reads the calls of the last `seconds` from the log, for a limiter that lost its state.

    Ages are by Postgres's clock. Each call counts as sent at the latest possible time.
    """
    found = await fetch(pool, "SELECT * FROM past_calls($1, $2)", model, float(seconds))
    return [PastCall(*row.values()) for row in found]


async def past_client_calls(pool: asyncpg.Pool, client: str, seconds: float) -> list[PastCall]:
    """Reads the calls of a client over all models, as `past_calls` does those of a model."""
    found = await fetch(pool, "SELECT * FROM past_client_calls($1, $2)", client, float(seconds))
    return [PastCall(*row.values()) for row in found]


def client_limit(config: RouterConfig, client: str) -> TrafficTarget | None:
    """Returns the limit of a client in `models.yaml`."""
    line = config.client(client).limit
    return None if line is None else TrafficTarget.parse(line)


async def call_ends(pool: asyncpg.Pool, call_ids: Sequence[uuid.UUID]) -> list[CallEnd]:
    """Returns those of the calls that have ended at the backend, or were never sent."""
    found = await fetch(pool, "SELECT * FROM call_ends($1)", list(call_ids))
    return [CallEnd(*row.values()) for row in found]
