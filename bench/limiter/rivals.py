"""The limiters that bench/limiter measures side by side, each used as its documentation advises.

Of several algorithms that a library has, the one is taken that promises most in a rolling window: the log of
`limits` (its moving window) and of pyrate-limiter, the sliding window of throttled-py. token-throttle has a
bucket only. All speak to the same Redis through redis-py's asyncio client, with as many connections.

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
from router.traffic import RequestLimit, TokenLimit, TrafficTarget

CONNECTIONS = 300  # at most, a process: one for each that waits, where a library asks for each
MODEL = "bench"
PATIENCE_SECONDS = 600.0
LOCK_SECONDS = 60.0
MOST_AT_ONCE = 1_000_000


@dataclass(frozen=True)
class Limits:
    """At most `count` requests, and `tokens` of tokens if not 0, in any `window_seconds`."""

    count: int
    window_seconds: int
    tokens: int = 0

    @property
    def target(self) -> TrafficTarget:
        """The same as a target, for the judge: without a pace, which no promise depends on."""
        tokens = (TokenLimit(self.tokens, self.window_seconds),) if self.tokens else ()
        return TrafficTarget((RequestLimit(self.count, self.window_seconds),), tokens, burst=True)


class Gate(ABC):
    """One limiter in one process. `can_wait`: the library itself waits for a free place."""

    can_wait = True
    own_cost_of_tokens = True  # memory is measured with fewer sends where each token costs something

    def __init__(self, url: str, limits: Limits) -> None:
        self.limits = limits
        self.url = url
        pool: Any = redis.asyncio.BlockingConnectionPool.from_url(
            url, max_connections=CONNECTIONS, timeout=PATIENCE_SECONDS
        )
        self.redis: Any = redis.asyncio.Redis.from_pool(pool)

    @abstractmethod
    async def open(self) -> None:
        """Connect, and put the limits in force."""

    @abstractmethod
    async def decide(self, tokens: int = 0) -> Any:
        """One decision, without waiting: the leave to send one call, which there must be."""

    @abstractmethod
    async def enter(self) -> Any:
        """Wait for the leave to send one call."""

    def may_send(self, leave: Any) -> bool:  # noqa: ARG002 - only ours can say no
        """Whether the leave still holds; asked immediately before sending."""
        return True

    async def unused(self, leave: Any) -> None:  # noqa: B027 - most have nothing to say then
        """Nothing was sent by the leave."""

    async def leave(self, leave: Any) -> None:  # noqa: B027 - the same
        """The call ended."""

    async def close(self) -> None:
        """End what the limiter has under way, and close its connections."""
        await self.redis.aclose()


class Router(Gate):
    """Ours. `dimensions` 3: tokens and calls at once are limited too, so high that they never bind."""

    own_cost_of_tokens = False

    def __init__(
        self, url: str, limits: Limits, *, paced: bool, late: float = 0, dimensions: int = 1
    ) -> None:
        super().__init__(url, limits)
        slacks = Slacks(send=late, transit=0.150)
        told = LimiterSettings(minute_slacks=slacks, second_slacks=slacks) if late else LimiterSettings()
        self.limiter = TrafficLimiter(self.redis, settings=told)
        several = dimensions > 1
        self._tokens = 100 if several else 0
        self.target = TrafficTarget(
            limits.target.requests,
            (TokenLimit(limits.count * 1000, limits.window_seconds),) if several else limits.target.tokens,
            at_once=MOST_AT_ONCE if several else None,
            burst=not paced,
        )

    @property
    def transit_slack(self) -> float:
        return self.limiter.settings.slacks(self.limits.window_seconds).transit

    async def open(self) -> None:
        await self.limiter.set_target(MODEL, self.target)

    async def decide(self, tokens: int = 0) -> Permit:
        permit = await self.limiter.reserve(MODEL, tokens or self._tokens)
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
    """`limits`: its moving window, a log. It does not wait; whoever must asks it when a place gets free."""

    can_wait = False

    async def open(self) -> None:
        from limits import RateLimitItemPerSecond  # noqa: PLC0415 - a rival's library, wanted here only
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
    """throttled-py: its sliding window, a counter weighted with that of the window before."""

    async def open(self) -> None:
        import throttled.asyncio as throttled  # noqa: PLC0415 - a rival's library, wanted here only

        pool = {"max_connections": CONNECTIONS, "timeout": PATIENCE_SECONDS}
        named = "redis.asyncio.BlockingConnectionPool"
        options = {"CONNECTION_POOL_CLASS": named, "CONNECTION_POOL_KWARGS": pool}
        self._store: Any = throttled.RedisStore(server=self.url, options=options)

        def limit(count: int) -> Any:
            quota = throttled.per_duration(timedelta(seconds=self.limits.window_seconds), count)
            return throttled.Throttled(
                using="sliding_window", quota=quota, store=self._store, timeout=PATIENCE_SECONDS
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
        client: Any = self._store._backend.get_client()  # noqa: SLF001 - it offers no close
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
    """token-throttle: a bucket that fills continuously; what was reserved is settled when the call ended."""

    own_cost_of_tokens = False

    async def open(self) -> None:
        import token_throttle  # noqa: PLC0415 - a rival's library, wanted here only

        logging.getLogger("token_throttle").setLevel(logging.CRITICAL)  # a line for each that waits
        window, one = self.limits.window_seconds, {"requests": self.limits.count}
        counted = {**one, "tokens": self.limits.tokens} if self.limits.tokens else one
        quotas = [token_throttle.Quota(metric=m, limit=n, per_seconds=window) for m, n in counted.items()]
        self._limiter: Any = token_throttle.RateLimiter(
            token_throttle.PerModelConfig(quotas=token_throttle.UsageQuotas(quotas)),
            backend=token_throttle.RedisBackendBuilder(
                self.redis,
                key_prefix="bench",
                lock_blocking_timeout_seconds=LOCK_SECONDS,  # its own advice when many wait
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
    """Why a rival cannot be measured here, or None."""
    if importlib.util.find_spec(_RIVALS[rival][1]) is not None:
        return None
    if rival == "token-throttle" and sys.version_info < (3, 12):
        return f"{rival} needs Python 3.12 or later; this is {'.'.join(map(str, sys.version_info[:2]))}"
    return f"{rival} is not installed: pip install -e '.[bench]'"


def rival_gate(rival: str, url: str, limits: Limits) -> Gate:
    """The rival's gate, not open yet."""
    return _RIVALS[rival][0](url, limits)
