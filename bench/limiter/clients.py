"""A process full of clients of one limiter: they wait in line, and send to a door if the job names one.

    python -m bench.limiter.clients

Takes one job after the other from stdin, until it ends: a line that holds a `Job` as JSON, answered with
`ready`; then a line with the moment to begin at (monotonic clock, seconds), answered with what was seen.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp

from bench.limiter.rivals import MODEL, Gate, Limits, Router, rival_gate

ENDING_SECONDS = 2.0  # for what was sent before the end to come back
ONE, THREE = "router, one dimension", "router, three dimensions"
PACED, BURST = "router", "router, burst"
TOLD = "router, told of the delays"  # its slack for late sends is the longest delay
OURS = (ONE, THREE, PACED, BURST, TOLD)
BODY = {"prompt": "Say one word.", "max_tokens": 1}


@dataclass(frozen=True)
class Job:
    """What the clients do. `delay_ms`: drawn evenly, from the grant until the send."""

    contender: str
    redis_url: str
    limits: Limits
    clients: int
    seconds: float
    number: int = 0
    door_url: str | None = None
    door_model: str = MODEL
    delay_ms: tuple[float, float] = (0.0, 0.0)

    def as_line(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, line: str) -> Job:
        """The job of a line, which our own parent wrote."""
        values = json.loads(line)
        limits, delay = Limits(**values.pop("limits")), tuple(values.pop("delay_ms"))
        return cls(limits=limits, delay_ms=delay, **values)


def gate_of(contender: str, url: str, limits: Limits, *, late_seconds: float = 0.0) -> Gate:
    """The gate of a contender of the tables: ours in one of its variants, or a rival."""
    if contender not in OURS:
        return rival_gate(contender, url, limits)
    late = late_seconds if contender == TOLD else 0.0
    return Router(
        url, limits, paced=contender in (PACED, TOLD), late=late, dimensions=3 if contender == THREE else 1
    )


class Clients:
    """All clients of this process, and what they saw."""

    def __init__(self, job: Job, gate: Gate, start_at: float) -> None:
        self._job = job
        self._gate = gate
        self._end_at = start_at + job.seconds
        self._random = random.Random(job.number)
        self._tickets = self._newest = 0
        self._session: aiohttp.ClientSession | None = None
        self._in_line: set[asyncio.Task[None]] = set()
        self.grants = self.overtaken = self.unused = 0
        self.sent: list[tuple[str, float]] = []

    async def run(self) -> None:
        """Let all clients wait, send and wait again until the end."""
        if self._job.door_url is not None:
            connector = aiohttp.TCPConnector(limit=0)
            self._session = aiohttp.ClientSession(self._job.door_url, connector=connector)
        clients = [asyncio.create_task(self._client(), name=f"client {n}") for n in range(self._job.clients)]
        left = self._end_at - time.monotonic()
        done, busy = await asyncio.wait(clients, timeout=left, return_when=asyncio.FIRST_EXCEPTION)
        for client in self._in_line:
            client.cancel()
        if busy:
            await asyncio.wait(busy, timeout=ENDING_SECONDS)
        for client in busy:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
        for client in done:
            client.result()  # a limiter that failed is not a slow one

    async def _client(self) -> None:
        me = asyncio.current_task()
        assert me is not None
        while True:
            self._tickets += 1
            ticket = self._tickets
            self._in_line.add(me)
            leave = await self._gate.enter()
            self._in_line.discard(me)
            if time.monotonic() >= self._end_at:
                return
            self.grants += 1
            if ticket < self._newest:
                self.overtaken += 1
            self._newest = max(self._newest, ticket)
            if self._session is not None and not await self._send(self._session, leave):
                continue
            await self._gate.leave(leave)

    async def _send(self, door: aiohttp.ClientSession, leave: Any) -> bool:
        """Send after the delay; False if the leave was dead by then, or the time is over."""
        await asyncio.sleep(self._random.uniform(*self._job.delay_ms) / 1000)
        sent_at = time.monotonic()
        if sent_at >= self._end_at or not self._gate.may_send(leave):
            self.unused += 1
            await self._gate.unused(leave)
            return False
        request_id = f"{self._job.number}-{len(self.sent)}"
        self.sent.append((request_id, sent_at))
        call = {**BODY, "model": self._job.door_model, "request_id": request_id}
        async with door.post("/single", json=call) as reply:
            await reply.read()
        return True

    def seen(self) -> dict[str, Any]:
        """What the parent wants to know."""
        counts = {"grants": self.grants, "overtaken": self.overtaken, "unused": self.unused}
        return {**counts, "sent": self.sent}


async def do(job: Job) -> dict[str, Any]:
    """Open the gate, wait for the word, let the clients run."""
    gate = gate_of(job.contender, job.redis_url, job.limits, late_seconds=job.delay_ms[1] / 1000)
    await gate.open()
    try:
        print("ready", flush=True)
        start_at = float(await asyncio.to_thread(sys.stdin.readline))
        await asyncio.sleep(max(0.0, start_at - time.monotonic()))
        clients = Clients(job, gate, start_at)
        await clients.run()
        return clients.seen()
    finally:
        await gate.close()


if __name__ == "__main__":
    while line := sys.stdin.readline():
        print(json.dumps(asyncio.run(do(Job.of(line)))), flush=True)
