"""A drain with interactive requests, in simulated time on a real Redis.

Clients ask again when the limiter's replies say so, as `WaitQueue` does; a send is at its send time.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from router.limiter import LimiterSettings, Permit, TrafficLimiter, Wait
from router.limiter.limiter import SCRIPT
from router.settings import InteractiveShare
from tests.support.limiter.redis import Connection, ScriptRedis, with_our_clock

MODEL = "m"
MICRO = 1_000_000
EPOCH = 1_700_000_000 * MICRO


@dataclass(frozen=True)
class Sent:
    """One send, in seconds since the start; batch calls have no `asked_at`."""

    at: float
    asked_at: float | None = None

    @property
    def waited(self) -> float:
        assert self.asked_at is not None
        return self.at - self.asked_at


@dataclass
class Client:
    """A process: it sends all the time, or each of `asks` once. At `dies_at` it stops without a word."""

    limiter: TrafficLimiter
    asks: tuple[float, ...] | None = None
    flood: bool = False
    dies_at: float = float("inf")
    waiting: list[float] = field(default_factory=list)

    @property
    def interactive(self) -> bool:
        return self.flood or self.asks is not None


class Drain:
    """Simulates clients of one model."""

    def __init__(self, connection: Connection, share: InteractiveShare | None = None) -> None:
        self.now = self._start = 1_000 * MICRO
        self._redis: Any = ScriptRedis(connection, lambda: EPOCH + self.now, lambda: self.now, lambda: None)
        self._redis.do("FLUSHALL")
        self._settings = replace(LimiterSettings(), interactive=share or InteractiveShare())
        self._clients: list[Client] = []

    def batch(self) -> Client:
        """Adds a process that drains a backlog."""
        return self._add(Client(self._limiter()))

    def asker(self, *asks: float, dies_at: float = float("inf")) -> Client:
        """Adds a process that asks at these seconds."""
        return self._add(Client(self._limiter(), asks, dies_at=dies_at))

    def flood(self) -> Client:
        """Adds a process in which two interactive requests wait at any time."""
        return self._add(Client(self._limiter(), flood=True))

    async def run(self, line: str, seconds: float) -> list[Sent]:
        """Runs all clients; returns what was sent, in order."""
        await self._clients[0].limiter.set_target(MODEL, line)
        sent: list[Sent] = []
        events = [(self._start + round(at * MICRO), number) for number, at in self._first_steps()]
        heapq.heapify(events)
        while events and events[0][0] <= self._start + seconds * MICRO:
            at, number = heapq.heappop(events)
            self.now = max(self.now, at)
            client = self._clients[number]
            if self._seconds < client.dies_at:
                again = await self._step(client, sent)
                if again is not None:
                    heapq.heappush(events, (self.now + max(1, round(again * MICRO)), number))
        return sorted(sent, key=lambda one: one.at)

    @property
    def _seconds(self) -> float:
        return (self.now - self._start) / MICRO

    def _add(self, client: Client) -> Client:
        self._clients.append(client)
        return client

    def _limiter(self) -> TrafficLimiter:
        limiter = TrafficLimiter(self._redis, settings=self._settings, clock=lambda: self.now / MICRO)
        limiter._script.text = with_our_clock(SCRIPT)
        return limiter

    def _first_steps(self) -> list[tuple[int, float]]:
        return [(number, at) for number, one in enumerate(self._clients) for at in one.asks or (0.0,)]

    async def _step(self, client: Client, sent: list[Sent]) -> float | None:
        """Requests permits; returns after how many seconds the client does so again."""
        if client.asks is not None:
            due = [at for at in client.asks if at <= self._seconds + 1e-9]
            client.waiting += due
            client.asks = tuple(at for at in client.asks if at not in due)
            if not client.waiting:
                return None
        elif client.flood:
            client.waiting += [self._seconds] * (2 - len(client.waiting))
        asked = client.waiting if client.interactive else [None]
        permits, wait = await self._reserve(client, len(asked))
        sent += [Sent(self._seconds + permit.wait_seconds, asked.pop(0)) for permit in permits]
        if not asked:
            return None if client.asks is not None else 0.001
        early = wait.ahead_seconds * (0.8 if client.interactive else 0.5)
        return max(0.001, min(2.0, (wait.again_seconds or 0.0) - early))

    async def _reserve(self, client: Client, count: int) -> tuple[list[Permit], Wait]:
        limiter = client.limiter
        return await limiter._reservations.reserve_many(
            limiter._tracker.state(MODEL), (0, 0) * count, waits=True, interactive=client.interactive
        )


def gaps(sends: Sequence[Sent]) -> list[float]:
    """Returns the seconds between consecutive sends."""
    return [after.at - before.at for before, after in itertools.pairwise(sends)]
