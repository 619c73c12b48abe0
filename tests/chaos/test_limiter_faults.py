"""Whatever happens to Redis, its clock or a process: no window at the door is broken, and sending resumes.

Two limiters with a backlog each send to a real HTTP door, which stamps what arrives; the judge reads its log.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
import redis.asyncio

from bench.judge import Arrival, ModelVerdict, TargetChange, judge
from local.redis import start_redis
from models_backend.process import BackendServer, free_port, start_backend
from router.errors import PermitExpired
from router.limiter import LimiterSettings, PastCall, Slacks, TrafficLimiter
from router.limiter.limiter import SCRIPT
from router.traffic import TrafficTarget
from tests.support.slow_link import SlowLink

pytestmark = pytest.mark.alone

TARGET = "12/s, 900 tokens/s, 8 at once"
WIDE = Slacks(send=0.1, transit=0.25)  # a busy test machine is a slow way to the door
SETTINGS = LimiterSettings(second_slacks=WIDE, minute_slacks=WIDE, max_call_seconds=1.5)
RESUMES_SECONDS = 2.0
SENDERS = 8
CLOCK = "redis.call('TIME')"
SKEWED = (
    "(function() local t = redis.call('TIME') t[1] = t[1] + (redis.call('GET', 'skew') or 0) return t end)()"
)


class Drain:
    """Two limiters that share a log of calls, as the processes of a deployment share Postgres."""

    def __init__(self, folder: Path, door: BackendServer, model: str) -> None:
        self.folder, self.door, self.model = folder, door, model
        self.redis = start_redis(folder)
        self.link = SlowLink(self.redis.port)
        self.calls: list[tuple[float, float | None]] = []  # sent at, ended at; on the monotonic clock
        self.stall_seconds = 0.0
        self.dead = 0
        self.ending = False

    def restart(self, *, kill: bool = True) -> None:
        """kill -9, and another run of Redis with whatever its folder holds."""
        (self.redis.process.kill if kill else self.redis.process.terminate)()
        self.redis.process.wait()
        self.redis = start_redis(self.folder, port=self.redis.port)

    async def do(self, *command: str) -> None:
        client = redis.asyncio.Redis.from_url(self.redis.url)
        await client.execute_command(*command)
        await client.aclose()

    async def history(self, _model: str, seconds: float) -> list[PastCall]:
        now = time.monotonic()
        recent = [(sent, ended) for sent, ended in self.calls if ended is None or sent > now - seconds]
        return [PastCall(now - sent, 75, ended is None) for sent, ended in recent]

    async def send_on(self, limiter: TrafficLimiter, session: aiohttp.ClientSession) -> None:
        while True:
            permit = await limiter.acquire(self.model, 75)
            if self.ending:
                return
            if self.stall_seconds:
                stall, self.stall_seconds = self.stall_seconds, 0.0
                time.sleep(stall)  # the whole loop stands still between permit and send
            number = len(self.calls)
            self.calls.append((time.monotonic(), None))
            try:
                permit.check()
            except PermitExpired:
                self.calls[number] = (float("-inf"), float("-inf"))
                self.dead += 1
                await limiter.cancel(permit)
                continue
            body = {"model": self.model, "prompt": "hello", "tokens_reserved": 75, "request_id": str(number)}
            async with session.post(f"{self.door.url}/single", json=body) as reply:
                await reply.read()
            self.calls[number] = (self.calls[number][0], time.monotonic())
            await limiter.release(permit)

    @property
    def in_flight(self) -> int:
        return sum(ended is None for _, ended in self.calls)

    def sent(self, since: float) -> int:
        return sum(at >= since for at, _ in self.calls)

    async def until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
            await asyncio.sleep(0.02)

    async def verdict(self) -> ModelVerdict:
        """The judge's word, from the door's own log."""
        async with aiohttp.ClientSession() as session:
            rows, since = [], 0
            while True:
                async with session.get(f"{self.door.url}/arrivals?since={since}&limit=1000") as reply:
                    page = await reply.json()
                rows += page["arrivals"]
                if page["next"] == since or not page["arrivals"]:
                    break
                since = page["next"]
        arrivals = [
            Arrival(row["at"], row["ended_at"], row["model"], str(row["request_id"]), row["tokens_reserved"])
            for row in rows
            if row["model"] == self.model
        ]
        change = TargetChange(0.0, self.model, TrafficTarget.parse(TARGET))
        return judge(arrivals, [change], backlog_from=None, backlog_until=None, tokens="reserved").models[
            self.model
        ]


@asynccontextmanager
async def draining(drain: Drain) -> AsyncIterator[list[TrafficLimiter]]:
    """Senders on two limiters, at full traffic."""
    url = f"redis://127.0.0.1:{await drain.link.start()}/0"
    clients = [
        redis.asyncio.Redis.from_url(url, socket_timeout=2, socket_connect_timeout=2) for _ in range(2)
    ]
    limiters = [TrafficLimiter(client, drain.history, settings=SETTINGS) for client in clients]
    assert SCRIPT.count(CLOCK) == 1
    for limiter in limiters:
        limiter._script.text = SCRIPT.replace(CLOCK, SKEWED)
    async with aiohttp.ClientSession() as session:
        await limiters[0].set_target(drain.model, TARGET)
        senders = [asyncio.create_task(drain.send_on(limiter, session)) for limiter in limiters * SENDERS]
        try:
            yield limiters
        finally:
            drain.ending = True
            await drain.until(lambda: drain.in_flight == 0, 5, "the calls in flight have ended")
            for sender in senders:
                sender.cancel()
            await asyncio.gather(*senders, return_exceptions=True)
            for limiter in limiters:
                await limiter.aclose()
            for client in clients:
                await client.aclose()
            await drain.link.stop()


Fault = Callable[[Drain], Awaitable[None]]


async def flushed(drain: Drain) -> None:
    await drain.do("FLUSHALL")


async def killed(drain: Drain) -> None:
    drain.restart()


async def an_old_copy(drain: Drain) -> None:
    await drain.do("SAVE")
    before = time.monotonic()
    await drain.until(lambda: drain.sent(before) > 4, 5, "more sends after the copy")
    drain.restart()


async def failed_over(drain: Drain) -> None:
    old, drain.redis = drain.redis, start_redis(drain.folder / "replica")  # one that had not been synced
    await drain.link.turn_to(drain.redis.port)
    old.stop()


async def away(drain: Drain) -> None:
    drain.redis.stop()
    gone = time.monotonic()
    await asyncio.sleep(2.5)
    assert drain.sent(gone + SETTINGS.look_ahead_seconds + WIDE.send) == 0, "nothing is sent without Redis"
    drain.redis = start_redis(drain.folder, port=drain.redis.port)


async def read_only(drain: Drain) -> None:
    await drain.do("REPLICAOF", "127.0.0.1", str(free_port()))
    await asyncio.sleep(1.0)
    await drain.do("REPLICAOF", "NO", "ONE")


async def out_of_memory(drain: Drain) -> None:
    await drain.do("CONFIG", "SET", "maxmemory-policy", "noeviction")
    await drain.do("CONFIG", "SET", "maxmemory", "1")
    await asyncio.sleep(1.0)
    await drain.do("CONFIG", "SET", "maxmemory", "0")


async def scripts_flushed(drain: Drain) -> None:
    await drain.do("SCRIPT", "FLUSH")


async def a_slow_link(drain: Drain) -> None:
    drain.link.delay_seconds = 0.2  # each way: a permit of a quarter second ahead comes back too late
    await asyncio.sleep(1.5)
    drain.link.delay_seconds = 0.0


async def a_stalled_loop(drain: Drain) -> None:
    drain.stall_seconds = 2.0
    await drain.until(lambda: drain.dead > 0, 5, "a permit that died")


async def clock_back(drain: Drain) -> None:
    await drain.do("SET", "skew", "-7200")


async def clock_ahead(drain: Drain) -> None:
    await drain.do("SET", "skew", "86400")


async def clock_to_and_fro(drain: Drain) -> None:
    for skew in ("3600", "-3600", "7200", "0"):
        await drain.do("SET", "skew", skew)
        await asyncio.sleep(0.15)


FAULTS: list[Fault] = [
    flushed,
    killed,
    an_old_copy,
    failed_over,
    away,
    read_only,
    out_of_memory,
    scripts_flushed,
    a_slow_link,
    a_stalled_loop,
    clock_back,
    clock_ahead,
    clock_to_and_fro,
]


@pytest.fixture(scope="module")
def door() -> Iterator[BackendServer]:
    folder = Path(tempfile.mkdtemp(prefix="router-door-"))
    also = [word for fault in FAULTS for turn in range(6) for word in ("--also", f"{fault.__name__}-{turn}")]
    server = start_backend(folder, "--time-scale", "10", "--latency", "even:1:4", *also)
    yield server
    server.stop()
    shutil.rmtree(folder, ignore_errors=True)


async def go_through(fault: Fault, turn: int, door: BackendServer, folder: Path) -> None:
    """A drain with the fault in its middle."""
    drain = Drain(folder, door, f"{fault.__name__}-{turn}")
    started = time.monotonic()
    try:
        async with draining(drain):
            await drain.until(lambda: drain.sent(started) >= 10, 10, "the first sends")
            await fault(drain)
            over = time.monotonic()
            await drain.until(lambda: drain.sent(over) >= 3, RESUMES_SECONDS + 0.5, "sending again")
            first = min(at for at, _ in drain.calls if at >= over)
            assert first - over < RESUMES_SECONDS
            await drain.until(lambda: drain.sent(over) >= 18, 6, "a window and a half of sends")
        verdict = await drain.verdict()
    finally:
        drain.redis.stop()
    assert verdict.sent >= 28
    assert verdict.breaches == []


async def test_no_window_is_broken_and_sending_resumes(door: BackendServer, tmp_path: Path) -> None:
    """All faults side by side, each with a Redis and a model of its own."""
    beside = [fault for fault in FAULTS if fault is not a_stalled_loop]
    ends = await asyncio.gather(
        *[go_through(fault, 0, door, tmp_path / fault.__name__) for fault in beside], return_exceptions=True
    )
    failed = {fault.__name__: end for fault, end in zip(beside, ends, strict=True) if end is not None}
    assert failed == {}


async def test_a_loop_that_stalls_between_permit_and_send(door: BackendServer, tmp_path: Path) -> None:
    await go_through(a_stalled_loop, 0, door, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("turn", range(1, 6))
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
async def test_each_fault_five_times(fault: Fault, turn: int, door: BackendServer, tmp_path: Path) -> None:
    await go_through(fault, turn, door, tmp_path)
