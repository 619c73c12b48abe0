"""A process full of senders that always have something to send, with clocks that are wrong by hours."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from dataclasses import dataclass

import redis.asyncio

from bench.limiter.arrival_server import RECORD
from router.background import freeze_garbage_collector
from router.errors import PermitExpired
from router.limiter import TrafficLimiter

MODELS = ("minute", "second", "mixed")
WRONG_BY_HOURS = (0.0, 5.0, -3.0, 26.0, 0.5, -2.0, 1000.0, 0.0)
LATE_SHARE, LATE_SECONDS = 0.01, 2.0
CALL_SECONDS = (0.01, 0.06)  # where calls at once are limited
TOKENS = (1, 1000)


@dataclass(frozen=True)
class Crew:
    """What one process does; times are of the machine's true monotonic clock. `waiters`: of each model."""

    url: str
    port: int
    number: int
    start_at: float
    seconds: float
    late: bool
    seed: int
    waiters: int


def run_crew(crew: Crew) -> tuple[int, dict[str, int]]:
    """Send until the time is over: how many were sent, and how many permits died."""
    return asyncio.run(_Senders(crew).run())


class _Senders:
    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._chance = random.Random(crew.seed * 1000 + crew.number)
        self._wrong_by = 3600 * WRONG_BY_HOURS[crew.number % len(WRONG_BY_HOURS)]
        self._sent = 0
        self._died = dict.fromkeys(MODELS, 0)
        self._door = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._door.connect(("127.0.0.1", crew.port))

    async def run(self) -> tuple[int, dict[str, int]]:
        client = redis.asyncio.Redis.from_url(self._crew.url)
        await asyncio.sleep(max(0.0, self._crew.start_at - time.monotonic()))
        async with TrafficLimiter(client, clock=self._wrong_clock) as limiter:
            tasks = [
                asyncio.create_task(self._send_on(limiter, model, index), name=f"sender of {model}")
                for index, model in enumerate(MODELS)
                for _ in range(self._crew.waiters)
            ]
            freeze_garbage_collector()  # as an engine does
            await asyncio.sleep(self._crew.seconds)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await client.aclose()
        self._door.close()
        return self._sent, self._died

    def _wrong_clock(self) -> float:
        return time.monotonic() + self._wrong_by

    async def _send_on(self, limiter: TrafficLimiter, model: str, index: int) -> None:
        while True:
            tokens = self._chance.randint(*TOKENS)
            permit = await limiter.acquire(model, tokens)
            if self._crew.late and self._chance.random() < LATE_SHARE:
                await asyncio.sleep(LATE_SECONDS)
            number = self._sent
            checked_at = time.monotonic_ns()
            try:
                permit.check()
            except PermitExpired:
                self._died[model] += 1
                await limiter.cancel(permit)
                continue
            self._door.send(RECORD.pack(0, index, number, checked_at, tokens))
            self._sent += 1
            if model == "mixed":
                await asyncio.sleep(self._chance.uniform(*CALL_SECONDS))
                self._door.send(RECORD.pack(1, index, number, checked_at, 0))
                await limiter.release(permit)
