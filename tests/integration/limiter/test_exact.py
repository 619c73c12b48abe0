"""In any window, at the backend's door, no more than the target: several processes, small windows."""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import pytest
import redis.asyncio

from local.redis import RedisServer
from router.errors import PermitExpired
from router.limiter import LimiterSettings, TrafficLimiter
from router.traffic import TrafficTarget

pytestmark = pytest.mark.alone

SETTINGS = LimiterSettings()
PROCESSES = 3


@dataclass(frozen=True)
class Arrival:
    """A call at the backend's door; times of the machine's monotonic clock, which all processes share."""

    at: float
    tokens: int
    ended_at: float


@dataclass(frozen=True)
class Load:
    """What one sender process does: `tasks` senders in parallel; none acquires after `seconds`."""

    url: str
    model: str
    tasks: int
    seconds: float
    window_seconds: int = 1
    tokens: int = 0
    call_seconds: float = 0.0
    seed: int = 0


async def send(limiter: TrafficLimiter, load: Load, chance: random.Random) -> list[Arrival]:
    arrivals: list[Arrival] = []
    until = time.monotonic() + load.seconds
    transit = SETTINGS.slacks(load.window_seconds).transit * 0.98
    while time.monotonic() < until:
        tokens = chance.randint(1, load.tokens) if load.tokens else 0
        permit = await limiter.acquire(load.model, tokens)
        await asyncio.sleep(
            chance.choices([0, 0.005, 0.03], [90, 8, 2])[0]
        )  # some are late at the socket, some too late
        try:
            permit.check()
        except PermitExpired:
            await limiter.cancel(permit)
            continue
        at = time.monotonic() + chance.uniform(0, transit)
        if load.call_seconds:
            await asyncio.sleep(chance.uniform(0, load.call_seconds) + transit)
        arrivals.append(Arrival(at, tokens, time.monotonic()))
        if chance.random() < 0.9 or load.call_seconds:
            await limiter.release(permit)
    return arrivals


async def send_in_parallel(load: Load) -> list[Arrival]:
    client = redis.asyncio.Redis.from_url(load.url)
    chance = random.Random(load.seed)
    try:
        async with TrafficLimiter(client) as limiter:
            parts = await asyncio.gather(*[send(limiter, load, chance) for _ in range(load.tasks)])
    finally:
        await client.aclose()
    return [arrival for part in parts for arrival in part]


def sender_process(load: Load) -> list[Arrival]:
    return asyncio.run(send_in_parallel(load))


def most_in_a_window(arrivals: list[Arrival], window_seconds: float) -> int:
    times = sorted(arrival.at for arrival in arrivals)
    most, first = 0, 0
    for last, at in enumerate(times):
        while times[first] <= at - window_seconds:
            first += 1
        most = max(most, last - first + 1)
    return most


def most_tokens_in_a_window(arrivals: list[Arrival], window_seconds: float) -> int:
    ordered = sorted(arrivals, key=lambda arrival: arrival.at)
    most, first, inside = 0, 0, 0
    for arrival in ordered:
        inside += arrival.tokens
        while ordered[first].at <= arrival.at - window_seconds:
            inside -= ordered[first].tokens
            first += 1
        most = max(most, inside)
    return most


def most_at_once(arrivals: list[Arrival]) -> int:
    events = sorted([(a.at, 1) for a in arrivals] + [(a.ended_at, -1) for a in arrivals])
    most = now = 0
    for _, change in events:
        now += change
        most = max(most, now)
    return most


@pytest.fixture(scope="module")
def senders() -> Iterator[ProcessPoolExecutor]:
    """Processes to send from."""
    with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


async def drive(
    senders: ProcessPoolExecutor,
    load: Load,
    *,
    processes: int = PROCESSES,
    targets: list[tuple[float, str]] | None = None,
) -> list[Arrival]:
    """Run sender processes while the target changes at the given seconds."""
    loop = asyncio.get_running_loop()
    client = redis.asyncio.Redis.from_url(load.url)
    running = [
        loop.run_in_executor(senders, sender_process, replace(load, seed=number))
        for number in range(processes)
    ]
    async with TrafficLimiter(client) as limiter:
        for after, line in targets or []:
            await asyncio.sleep(after)
            await limiter.set_target(load.model, TrafficTarget.parse(line))
        parts = await asyncio.gather(*running)
    await client.aclose()
    return [arrival for part in parts for arrival in part]


@pytest.mark.parametrize("line", ["50/s", "50/s, burst"])
async def test_three_processes_never_pass_fifty_a_second_and_come_close(
    redis_client: redis.asyncio.Redis, redis_server: RedisServer, senders: ProcessPoolExecutor, line: str
):
    async with TrafficLimiter(redis_client) as limiter:
        await limiter.set_target("llama", TrafficTarget.parse(line))
    arrivals = await drive(senders, Load(redis_server.url, "llama", tasks=20, seconds=2.2))
    assert most_in_a_window(arrivals, 1.0) <= 50
    since = min(a.at for a in arrivals) + 1.0
    assert len([a for a in arrivals if since <= a.at <= since + 2]) > 100 * 0.85  # some are late on purpose


@pytest.mark.soak
async def test_two_windows_hold_together(
    redis_client: redis.asyncio.Redis, redis_server: RedisServer, senders: ProcessPoolExecutor
):
    async with TrafficLimiter(redis_client) as limiter:
        await limiter.set_target("llama", TrafficTarget.parse("60/3s, 30/s, burst"))
    load = Load(redis_server.url, "llama", tasks=10, seconds=4.5, window_seconds=1)
    arrivals = await drive(senders, load, processes=2)
    assert most_in_a_window(arrivals, 1.0) <= 30
    assert most_in_a_window(arrivals, 3.0) <= 60
    assert len(arrivals) >= 75


@pytest.mark.soak
async def test_a_target_that_changes_holds_from_the_next_decision_and_forgets_nothing(
    redis_client: redis.asyncio.Redis, redis_server: RedisServer, senders: ProcessPoolExecutor
):
    async with TrafficLimiter(redis_client) as limiter:
        await limiter.set_target("llama", TrafficTarget.parse("20/s"))
    changed_at: list[float] = []
    lines = [(1.2, "80/s, burst"), (1.3, "10/s"), (1.5, "100/2s, 70/s")]
    load = Load(redis_server.url, "llama", tasks=15, seconds=6)
    started = time.monotonic()
    arrivals = await drive(senders, load, processes=2, targets=lines)
    for after, _ in lines:
        changed_at.append((changed_at[-1] if changed_at else started) + after)
    spans = [(0.0, 20), (changed_at[0], 80), (changed_at[1], 10), (changed_at[2], 70)]
    for number, (since, limit) in enumerate(spans):
        until = spans[number + 1][0] if number + 1 < len(spans) else float("inf")
        later = [a for a in arrivals if since + 0.45 <= a.at <= until]  # the look-ahead, and the way there
        for arrival in later:
            inside = [a for a in arrivals if arrival.at - 1.0 < a.at <= arrival.at]
            assert len(inside) <= limit, f"{len(inside)} at {arrival.at - started:.2f} s"
    assert len([a for a in arrivals if a.at > changed_at[2] + 0.5]) > 40


async def test_tokens_reserved_never_pass_their_window(
    redis_client: redis.asyncio.Redis, redis_server: RedisServer, senders: ProcessPoolExecutor
):
    async with TrafficLimiter(redis_client) as limiter:
        await limiter.set_target("llama", TrafficTarget.parse("10k tokens/s, 200/s, burst"))
    load = Load(redis_server.url, "llama", tasks=15, seconds=2.5, tokens=1000)
    arrivals = await drive(senders, load, processes=2)
    assert most_tokens_in_a_window(arrivals, 1.0) <= 10_000
    assert most_in_a_window(arrivals, 1.0) <= 200
    assert sum(a.tokens for a in arrivals) > 20_000


@pytest.mark.soak
async def test_calls_at_once_never_pass_their_number(
    redis_client: redis.asyncio.Redis, redis_server: RedisServer, senders: ProcessPoolExecutor
):
    async with TrafficLimiter(redis_client) as limiter:
        await limiter.set_target("llama", TrafficTarget.parse("7 at once"))
    load = Load(redis_server.url, "llama", tasks=10, seconds=2.5, call_seconds=0.1)
    arrivals = await drive(senders, load, processes=2)
    assert most_at_once(arrivals) <= 7
    assert len(arrivals) > 60
