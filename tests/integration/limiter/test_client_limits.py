"""Limits of clients, checked with the model's in one decision, on a real Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import datetime, timezone

import pytest
import redis.asyncio

from router.errors import ClientLimited, LimiterError
from router.limiter import LimiterSettings, PastCall, Permit, TrafficLimiter, Wait, WaitReason
from router.traffic import TrafficTarget

OPEN = "100000/s, burst"  # a model that limits nothing here
LIMIT_OF_ALICE = "3/min, $1/day, 500 tokens/min, 3 at once"


async def no_calls(_name: str, _seconds: float) -> list[PastCall]:
    return []


@pytest.fixture
async def limiter(redis_client: redis.asyncio.Redis) -> AsyncIterator[TrafficLimiter]:
    async with TrafficLimiter(redis_client, no_calls, client_history=no_calls) as opened:
        for model in ("m1", "m2"):
            await opened.set_target(model, OPEN)
        yield opened


@pytest.fixture
async def another(redis_client: redis.asyncio.Redis) -> AsyncIterator[TrafficLimiter]:
    async with TrafficLimiter(redis_client, no_calls, client_history=no_calls) as opened:
        yield opened


async def usage(limiter: TrafficLimiter, client: str = "alice") -> dict[str, int]:
    traffic = (await limiter.snapshot_clients([client]))[client]
    return {**traffic.sent, **traffic.tokens, **traffic.money, "in flight": traffic.in_flight}


@pytest.mark.parametrize(
    ("limit", "needs", "reason"),
    [
        ("3/min", {}, WaitReason.WINDOW),
        ("30 tokens/min", {"tokens": 10}, WaitReason.TOKENS),
        ("$0.30/day", {"cost": 100_000}, WaitReason.BUDGET),
        ("$0.30/calendar day", {"cost": 100_000}, WaitReason.BUDGET),
        ("3 at once", {}, WaitReason.CONCURRENCY),
    ],
)
async def test_limit_holds_over_all_models_and_processes(
    limiter: TrafficLimiter, another: TrafficLimiter, limit: str, needs: dict[str, int], reason: WaitReason
) -> None:
    for process in (limiter, another):
        await process.set_client_limit("alice", limit)
    for process, model in ((limiter, "m1"), (another, "m2"), (limiter, "m2")):
        assert await process.reserve(model, client="alice", **needs)
    denied = await another.reserve("m1", client="alice", **needs)
    assert isinstance(denied, Wait)
    assert (denied.client, denied.reason) == ("alice", reason)
    assert denied.again_seconds is not None
    assert await another.reserve("m1", client="bob", **needs), "another client is not limited"
    assert await another.reserve("m1", **needs), "nor is a call without a client"


async def test_call_that_the_model_denies_counts_for_nobody(limiter: TrafficLimiter) -> None:
    await limiter.set_client_limit("alice", LIMIT_OF_ALICE)
    await limiter.set_target("m1", "1/min")
    await limiter.set_target("m2", "5 at once")
    assert await limiter.reserve("m1", 10, cost=5, client="alice")
    denied = await limiter.reserve("m1", 10, cost=5, client="alice")
    assert isinstance(denied, Wait)
    assert denied.client is None
    assert await usage(limiter) == {"3/min": 1, "500 tokens/min": 10, "$1/d": 5, "in flight": 1}


async def test_call_that_the_client_may_not_make_counts_for_nobody(limiter: TrafficLimiter) -> None:
    await limiter.set_client_limit("alice", "1/min")
    await limiter.set_target("m1", "90/min, 900 tokens/min, 5 at once")
    assert await limiter.reserve("m1", 10, client="alice")
    assert not await limiter.reserve("m1", 10, client="alice")
    traffic = (await limiter.snapshot(["m1"]))["m1"]
    assert (traffic.sent, traffic.tokens, traffic.in_flight) == ({"90/min": 1}, {"900 tokens/min": 10}, 1)
    assert traffic.waiting_for is not WaitReason.CLIENT


@pytest.mark.parametrize("end", ["release", "cancel"])
async def test_end_of_a_call_is_the_end_for_both(limiter: TrafficLimiter, end: str) -> None:
    await limiter.set_client_limit("alice", LIMIT_OF_ALICE)
    await limiter.set_target("m1", "90/min, 900 tokens/min, $5/day, 5 at once, burst")
    permit = await limiter.acquire("m1", 100, cost=900_000, client="alice")
    if end == "release":
        await limiter.release(permit, 20, cost=300_000)
        expected = (1, 20, 300_000)
    else:
        await limiter.cancel(permit)
        expected = (0, 0, 0)
    assert tuple((await usage(limiter)).values()) == (*expected, 0)
    traffic = (await limiter.snapshot(["m1"]))["m1"]
    found = (*traffic.sent.values(), *traffic.tokens.values(), *traffic.money.values(), traffic.in_flight)
    assert found == (*expected, 0)


async def test_waiting_call_blocks_no_other_client_and_no_permit(limiter: TrafficLimiter) -> None:
    await limiter.set_client_limit("alice", "1/min")
    await limiter.set_client_limit("carol", "9/min")
    await limiter.set_target("m1", "3 at once")
    await limiter.acquire("m1", client="alice")
    waiting = [asyncio.create_task(limiter.acquire("m1", client="alice")) for _ in range(50)]
    await asyncio.sleep(0.05)
    for client in ("carol", ""):
        await asyncio.wait_for(limiter.acquire("m1", client=client), 1)
    assert not any(task.done() for task in waiting)
    assert limiter.queue_length("m1") == 50
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_waiting_calls_go_on_in_order_once_another_process_makes_room(
    redis_client: redis.asyncio.Redis, another: TrafficLimiter
) -> None:
    never_polls = LimiterSettings(fallback_poll_seconds=600.0)
    async with TrafficLimiter(redis_client, no_calls, settings=never_polls) as limiter:
        for model in ("m1", "m2"):
            await limiter.set_target(model, OPEN)
        await go_on_in_order(limiter, another)


async def go_on_in_order(limiter: TrafficLimiter, another: TrafficLimiter) -> None:
    for process in (limiter, another):
        await process.set_client_limit("alice", "2 at once")
    held = [await another.acquire("m2", client="alice") for _ in range(2)]
    order: list[int] = []

    async def one(number: int) -> None:
        await limiter.acquire("m1", client="alice")
        order.append(number)

    waiting = [asyncio.create_task(one(number)) for number in range(3)]
    await asyncio.sleep(0.1)
    for permit in held:
        await another.release(permit)
    await asyncio.wait_for(asyncio.gather(*waiting[:2]), 30)
    assert order == [0, 1]
    waiting[2].cancel()


async def test_call_that_cannot_be_in_time_is_refused_at_once(limiter: TrafficLimiter) -> None:
    await limiter.set_client_limit("alice", "1/min")
    await limiter.acquire("m1", client="alice")
    for _ in range(2):
        with pytest.raises(ClientLimited, match="client 'alice' in time: request window") as caught:
            await limiter.acquire("m1", client="alice", timeout_seconds=30)
    assert caught.value.client == "alice"
    assert 50 < (caught.value.again_seconds or 0) <= 61


async def test_call_beyond_a_whole_budget_is_refused(limiter: TrafficLimiter) -> None:
    await limiter.set_client_limit("alice", "$1/day")
    with pytest.raises(LimiterError, match=r"may cost \$1.50 exceeds a budget of client 'alice'"):
        await limiter.acquire("m1", cost=1_500_000, client="alice", timeout_seconds=5)


async def test_a_limit_of_the_config_is_read_once(redis_client: redis.asyncio.Redis) -> None:
    asked: list[str] = []

    def limit_of(client: str) -> TrafficTarget | None:
        asked.append(client)
        return TrafficTarget.parse("1/min") if client in {"alice", ""} else None

    async with TrafficLimiter(redis_client, no_calls, client_limit=limit_of) as limiter:
        await limiter.set_target("m1", OPEN)
        for client, granted in (("alice", True), ("alice", False), ("bob", True), ("bob", True), ("", True)):
            assert bool(await limiter.reserve("m1", client=client)) is granted
        assert not await limiter.reserve("m1"), "the empty client is one, too"
    assert asked.count("alice") == 1
    assert not await redis_client.keys("*client:bob*"), "a client without a limit has no key"


@pytest.mark.parametrize("lost", ["both", "the client"])
async def test_lost_state_of_a_client_is_rebuilt_from_its_calls(
    redis_client: redis.asyncio.Redis, lost: str
) -> None:
    sent: list[float] = []

    async def calls(name: str, seconds: float) -> list[PastCall]:
        assert name == "alice"
        assert seconds >= 86_400
        return [PastCall(time.monotonic() - at, 10, False, None, 300_000) for at in sent]

    async with TrafficLimiter(redis_client, no_calls, client_history=calls) as limiter:
        await limiter.set_target("m1", OPEN)
        await limiter.set_client_limit("alice", "$1/day")
        for _ in range(2):
            await limiter.acquire("m1", 10, cost=300_000, client="alice")
            sent.append(time.monotonic())
        if lost == "both":
            await redis_client.flushall()
        else:
            await redis_client.delete("router:{client:alice}")
        await asyncio.wait_for(limiter.acquire("m1", 10, cost=300_000, client="alice"), 3)
        assert not await limiter.reserve("m1", cost=300_000, client="alice")
        assert isinstance(await limiter.reserve("m1", cost=100_000, client="alice"), Permit)


async def test_snapshot_has_the_recent_part_of_a_budget(limiter: TrafficLimiter) -> None:
    await limiter.set_client_limit("alice", "$1/day, $20/calendar month")
    for _ in range(2):
        await limiter.acquire("m1", cost=100_000, client="alice")
    traffic = (await limiter.snapshot_clients(["alice"]))["alice"]
    assert traffic.recent_money == traffic.money == {"$1/d": 200_000, "$20/calendar month": 200_000}
    assert traffic.forecast(datetime.now(timezone.utc))["$1/d"] == 24 * 200_000
