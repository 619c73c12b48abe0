"""A process with many clients of one limiter, which wait for permits and may send to a backend.

    python -m bench.limiter.clients

Reads jobs from stdin until it ends: a line with a `Job` as JSON, answered with `ready`; then a line with the
start time (monotonic clock, seconds), answered with the results.
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

ENDING_SECONDS = 2.0  # for calls in flight at the end
ONE, THREE = "router, one dimension", "router, three dimensions"
CLIENT = "router, four dimensions and a client's four"
PACED, BURST = "router", "router, burst"
SLACK = "router, slack for delays"  # its send slack is the longest delay
OURS = (ONE, THREE, CLIENT, PACED, BURST, SLACK)
BODY = {"prompt": "Say one word.", "max_tokens": 1}


@dataclass(frozen=True)
class Job:
    """Work of the clients. `delay_ms` is the range of random delays between grant and send."""

    contender: str
    redis_url: str
    limits: Limits
    clients: int
    seconds: float
    number: int = 0
    backend_url: str | None = None
    backend_model: str = MODEL
    delay_ms: tuple[float, float] = (0.0, 0.0)

    def as_line(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, line: str) -> Job:
        """Parses the line of a job."""
        values = json.loads(line)
        limits, delay = Limits(**values.pop("limits")), tuple(values.pop("delay_ms"))
        return cls(limits=limits, delay_ms=delay, **values)


def gate_of(contender: str, url: str, limits: Limits, *, late_seconds: float = 0.0) -> Gate:
    """Returns the gate of a limiter in the tables: a variant of ours, or a rival."""
    if contender not in OURS:
        return rival_gate(contender, url, limits)
    late = late_seconds if contender == SLACK else 0.0
    return Router(
        url, limits, paced=contender in (PACED, SLACK), late=late,
        dimensions={THREE: 3, CLIENT: 4}.get(contender, 1), client="client" if contender == CLIENT else "",
    )  # fmt: skip


class Clients:
    """Clients of this process and their results."""

    def __init__(self, job: Job, gate: Gate, start_at: float) -> None:
        self._job = job
        self._gate = gate
        self._end_at = start_at + job.seconds
        self._random = random.Random(job.number)
        self._tickets = self._newest = 0
        self._session: aiohttp.ClientSession | None = None
        self._waiting: set[asyncio.Task[None]] = set()
        self.grants = self.overtaken = self.unused = 0
        self.sent: list[tuple[str, float]] = []

    async def run(self) -> None:
        """Runs all clients until the end."""
        if self._job.backend_url is not None:
            connector = aiohttp.TCPConnector(limit=0)
            self._session = aiohttp.ClientSession(self._job.backend_url, connector=connector)
        clients = [asyncio.create_task(self._client(), name=f"client {n}") for n in range(self._job.clients)]
        left = self._end_at - time.monotonic()
        done, busy = await asyncio.wait(clients, timeout=left, return_when=asyncio.FIRST_EXCEPTION)
        for client in self._waiting:
            client.cancel()
        if busy:
            await asyncio.wait(busy, timeout=ENDING_SECONDS)
        for client in busy:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
        for client in done:
            client.result()  # raises if the limiter failed

    async def _client(self) -> None:
        me = asyncio.current_task()
        assert me is not None
        while True:
            self._tickets += 1
            ticket = self._tickets
            self._waiting.add(me)
            leave = await self._gate.enter()
            self._waiting.discard(me)
            if time.monotonic() >= self._end_at:
                return
            self.grants += 1
            if ticket < self._newest:
                self.overtaken += 1
            self._newest = max(self._newest, ticket)
            if self._session is not None and not await self._send(self._session, leave):
                continue
            await self._gate.leave(leave)

    async def _send(self, backend: aiohttp.ClientSession, leave: Any) -> bool:
        """Sends after the delay; False if the permit expired or the time is over."""
        await asyncio.sleep(self._random.uniform(*self._job.delay_ms) / 1000)
        sent_at = time.monotonic()
        if sent_at >= self._end_at or not self._gate.may_send(leave):
            self.unused += 1
            await self._gate.unused(leave)
            return False
        request_id = f"{self._job.number}-{len(self.sent)}"
        self.sent.append((request_id, sent_at))
        call = {**BODY, "model": self._job.backend_model, "request_id": request_id}
        async with backend.post("/single", json=call) as reply:
            await reply.read()
        return True

    def results(self) -> dict[str, Any]:
        """Returns the results for the parent."""
        counts = {"grants": self.grants, "overtaken": self.overtaken, "unused": self.unused}
        return {**counts, "sent": self.sent}


async def do(job: Job) -> dict[str, Any]:
    """Opens the gate, waits for the start time, runs the clients."""
    gate = gate_of(job.contender, job.redis_url, job.limits, late_seconds=job.delay_ms[1] / 1000)
    await gate.open()
    try:
        print("ready", flush=True)
        start_at = float(await asyncio.to_thread(sys.stdin.readline))
        await asyncio.sleep(max(0.0, start_at - time.monotonic()))
        clients = Clients(job, gate, start_at)
        await clients.run()
        return clients.results()
    finally:
        await gate.close()


if __name__ == "__main__":
    while line := sys.stdin.readline():
        print(json.dumps(asyncio.run(do(Job.of(line)))), flush=True)
