"""The compared limiters, each used as its documentation advises.

Of a library's algorithms the strictest one in a rolling window is used: the log of `limits` (its moving
window) and of pyrate-limiter, the sliding window of throttled-py. token-throttle has only a bucket. All use
redis-py's asyncio client with the same number of connections.

    gate = await open_gate("limits", url, Limits(100, 2))
    while not gate.may_send(leave := await gate.enter()):
        await gate.unused(leave)
    ...  # send
    await gate.leave(leave)
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import redis.asyncio

from router.limiter import LimiterSettings, Permit, Slacks, TrafficLimiter
from router.traffic import MoneyLimit, RequestLimit, TokenLimit, TrafficTarget

CONNECTIONS = 300  # maximum per process; some libraries use one per waiter
MODEL = "bench"
TIMEOUT_SECONDS = 600.0
LOCK_SECONDS = 60.0
MAX_CONCURRENCY = 1_000_000


@dataclass(frozen=True)
class Limits:
    """At most `count` requests, and `tokens` tokens if not 0, in any `window_seconds`."""

    count: int
    window_seconds: int
    tokens: int = 0

    @property
    def target(self) -> TrafficTarget:
        """Target for the judge, without pacing."""
        tokens = (TokenLimit(self.tokens, self.window_seconds),) if self.tokens else ()
        return TrafficTarget((RequestLimit(self.count, self.window_seconds),), tokens, burst=True)


class Gate(ABC):
    """One limiter in one process. `can_wait`: the library itself waits for a permit."""

    can_wait = True
    own_cost_of_tokens = True  # each token costs memory, so fewer sends are measured

    def __init__(self, url: str, limits: Limits) -> None:
        self.limits = limits
        self.url = url
        pool: Any = redis.asyncio.BlockingConnectionPool.from_url(
            url, max_connections=CONNECTIONS, timeout=TIMEOUT_SECONDS
        )
        self.redis: Any = redis.asyncio.Redis.from_pool(pool)

    @abstractmethod
    async def open(self) -> None:
        """Connects and applies the limits."""

    @abstractmethod
    async def decide(self, tokens: int = 0) -> Any:
        """Reserves one permit, which must be available, without waiting."""

    @abstractmethod
    async def enter(self) -> Any:
        """Waits for a permit."""

    def may_send(self, leave: Any) -> bool:  # noqa: ARG002 - only our permits expire
        """Whether the permit is still valid; called immediately before sending."""
        return True

    async def unused(self, leave: Any) -> None:  # noqa: B027 - optional
        """Cancels a permit by which nothing was sent."""

    async def leave(self, leave: Any) -> None:  # noqa: B027 - optional
        """Releases the permit of a call that ended."""

    async def close(self) -> None:
        """Ends the limiter's tasks and closes its connections."""
        await self.redis.aclose()


class Router(Gate):
    """Our limiter. With 3 `dimensions`, tokens and concurrency have limits too, with 4 money: none binds.

    A `client` has the same limits.
    """

    own_cost_of_tokens = False

    def __init__(
        self, url: str, limits: Limits, *, paced: bool, late: float = 0, dimensions: int = 1,
        client: str = "",
    ) -> None:  # fmt: skip
        super().__init__(url, limits)
        slacks = Slacks(send=late, transit=0.150)
        settings = LimiterSettings(minute_slacks=slacks, second_slacks=slacks) if late else LimiterSettings()
        self.limiter = TrafficLimiter(self.redis, settings=settings)
        several = dimensions > 1
        self._tokens = 100 if several else 0
        self._cost = 10 if dimensions > 3 else 0
        self._client = client
        self.target = TrafficTarget(
            limits.target.requests,
            (TokenLimit(limits.count * 1000, limits.window_seconds),) if several else limits.target.tokens,
            at_once=MAX_CONCURRENCY if several else None,
            burst=not paced,
            money=(MoneyLimit(10**12, limits.window_seconds),) if self._cost else (),
        )

    @property
    def transit_slack(self) -> float:
        return self.limiter.settings.slacks(self.limits.window_seconds).transit

    async def open(self) -> None:
        await self.limiter.set_target(MODEL, self.target)
        if self._client:
            await self.limiter.set_client_limit(self._client, self.target)

    async def decide(self, tokens: int = 0) -> Permit:
        permit = await self.limiter.reserve(
            MODEL, tokens or self._tokens, cost=self._cost, client=self._client
        )
        assert isinstance(permit, Permit), permit
        return permit

    async def enter(self) -> Permit:
        return await self.limiter.acquire(MODEL)

    def may_send(self, leave: Permit) -> bool:
        return not leave.expired

    async def unused(self, leave: Permit) -> None:
        await self.limiter.cancel(leave)

    async def leave(self, leave: Permit) -> None:
        await self.limiter.release(leave)

    async def close(self) -> None:
        await self.limiter.aclose()
        await super().close()


class LimitsGate(Gate):
    """`limits`: its moving window, a log. It does not wait; callers ask it when a slot gets free."""

    can_wait = False

    async def open(self) -> None:
        from limits import RateLimitItemPerSecond  # noqa: PLC0415 - a rival's library, needed here only
        from limits.aio.storage import RedisStorage  # noqa: PLC0415
        from limits.aio.strategies import MovingWindowRateLimiter  # noqa: PLC0415

        pool: Any = self.redis.connection_pool
        storage = RedisStorage(f"async+{self.url}", implementation="redispy", connection_pool=pool)
        self._limiter: Any = MovingWindowRateLimiter(storage)
        window = self.limits.window_seconds
        self._requests = RateLimitItemPerSecond(self.limits.count, window)
        self._tokens = RateLimitItemPerSecond(self.limits.tokens, window) if self.limits.tokens else None

    async def decide(self, tokens: int = 0) -> None:
        assert await self._limiter.hit(self._requests, MODEL)
        if self._tokens is not None:
            assert await self._limiter.hit(self._tokens, MODEL, "tokens", cost=tokens)

    async def enter(self) -> None:
        while not await self._limiter.hit(self._requests, MODEL):
            free = await self._limiter.get_window_stats(self._requests, MODEL)
            await asyncio.sleep(max(0.0, free.reset_time - time.time()))


class ThrottledGate(Gate):
    """throttled-py: its sliding window, a counter weighted with that of the previous window."""

    async def open(self) -> None:
        import throttled.asyncio as throttled  # noqa: PLC0415 - a rival's library, needed here only

        pool = {"max_connections": CONNECTIONS, "timeout": TIMEOUT_SECONDS}
        named = "redis.asyncio.BlockingConnectionPool"
        options = {"CONNECTION_POOL_CLASS": named, "CONNECTION_POOL_KWARGS": pool}
        self._store: Any = throttled.RedisStore(server=self.url, options=options)

        def limit(count: int) -> Any:
            quota = throttled.per_duration(timedelta(seconds=self.limits.window_seconds), count)
            return throttled.Throttled(
                using="sliding_window", quota=quota, store=self._store, timeout=TIMEOUT_SECONDS
            )

        self._requests = limit(self.limits.count)
        self._tokens = limit(self.limits.tokens) if self.limits.tokens else None

    async def decide(self, tokens: int = 0) -> None:
        assert not (await self._requests.limit(MODEL, timeout=-1)).limited
        if self._tokens is not None:
            assert not (await self._tokens.limit(f"{MODEL}:tokens", tokens, timeout=-1)).limited

    async def enter(self) -> None:
        while (await self._requests.limit(MODEL)).limited:
            pass

    async def close(self) -> None:
        client: Any = self._store._backend.get_client()  # noqa: SLF001 - it has no close
        await client.connection_pool.disconnect()
        await super().close()


class PyrateGate(Gate):
    """pyrate-limiter: a log as a sorted set."""

    async def open(self) -> None:
        from pyrate_limiter import Limiter, Rate, RedisBucket  # noqa: PLC0415 - a rival's library

        async def limit(count: int, key: str) -> Any:
            rate = Rate(count, self.limits.window_seconds * 1000)
            bucket: Any = RedisBucket.init([rate], self.redis, key)
            return Limiter(await bucket)

        self._requests = await limit(self.limits.count, MODEL)
        self._tokens = await limit(self.limits.tokens, f"{MODEL}:tokens") if self.limits.tokens else None

    async def decide(self, tokens: int = 0) -> None:
        assert await self._requests.try_acquire_async(MODEL, blocking=False)
        if self._tokens is not None:
            assert await self._tokens.try_acquire_async(MODEL, tokens, blocking=False)

    async def enter(self) -> None:
        while not await self._requests.try_acquire_async(MODEL):
            pass

    async def close(self) -> None:
        for limiter in filter(None, (self._requests, self._tokens)):
            limiter.close()
        await super().close()


class TokenThrottleGate(Gate):
    """token-throttle: a bucket that refills continuously; reservations are corrected after the call."""

    own_cost_of_tokens = False

    async def open(self) -> None:
        import token_throttle  # noqa: PLC0415 - a rival's library, needed here only

        logging.getLogger("token_throttle").setLevel(logging.CRITICAL)  # it logs a line per waiter
        window, one = self.limits.window_seconds, {"requests": self.limits.count}
        counted = {**one, "tokens": self.limits.tokens} if self.limits.tokens else one
        quotas = [token_throttle.Quota(metric=m, limit=n, per_seconds=window) for m, n in counted.items()]
        self._limiter: Any = token_throttle.RateLimiter(
            token_throttle.PerModelConfig(quotas=token_throttle.UsageQuotas(quotas)),
            backend=token_throttle.RedisBackendBuilder(
                self.redis,
                key_prefix="bench",
                lock_blocking_timeout_seconds=LOCK_SECONDS,  # as it advises for many waiters
            ),
            close_drain_timeout_seconds=0.1,
        )

    async def decide(self, tokens: int = 0) -> Any:
        usage = {"requests": 1, "tokens": tokens} if self.limits.tokens else {"requests": 1}
        return await self._limiter.acquire_capacity(usage, MODEL, timeout=0)

    async def enter(self) -> Any:
        return await self._limiter.acquire_capacity({"requests": 1}, MODEL)

    async def leave(self, leave: Any) -> None:
        await self._limiter.refund_capacity(dict(leave.usage), leave)

    async def close(self) -> None:
        await self._limiter.aclose()
        await super().close()


_RIVALS: Mapping[str, tuple[type[Gate], str]] = {
    "limits": (LimitsGate, "limits"),
    "throttled-py": (ThrottledGate, "throttled"),
    "pyrate-limiter": (PyrateGate, "pyrate_limiter"),
    "token-throttle": (TokenThrottleGate, "token_throttle"),
}
RIVALS = tuple(_RIVALS)


def missing(rival: str) -> str | None:
    """Returns why a rival cannot be measured here, or None."""
    if importlib.util.find_spec(_RIVALS[rival][1]) is not None:
        return None
    if rival == "token-throttle" and sys.version_info < (3, 12):
        return f"{rival} needs Python 3.12 or later; this is {'.'.join(map(str, sys.version_info[:2]))}"
    return f"{rival} is not installed: pip install -e '.[bench]'"


def rival_gate(rival: str, url: str, limits: Limits) -> Gate:
    """Returns the rival's gate, not opened yet."""
    return _RIVALS[rival][0](url, limits)
