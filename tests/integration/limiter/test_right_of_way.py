"""Right of way of interactive requests: in simulated drains, and between real processes' limiters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import pytest
import redis.asyncio

from local.redis import RedisServer
from router.errors import LimiterError
from router.limiter import Permit, TrafficLimiter, Wait, WaitReason
from router.settings import InteractiveShare
from router.traffic import TrafficTarget
from tests.support.limiter.drain import Drain, Sent, gaps
from tests.support.limiter.redis import Connection

MINUTE = "40/min"
GAP = TrafficTarget.parse(MINUTE).gap_seconds
PERIOD = 60.25  # a minute and its slacks
SHARES = [0.2, 0.5, 0.9]
ASKS = tuple(10.3 + 7.1 * number for number in range(15))


@pytest.fixture
def connection(redis_server: RedisServer) -> Iterator[Connection]:
    opened = Connection(redis_server)
    yield opened
    opened.close()


def batch_of(sends: list[Sent]) -> list[Sent]:
    return [one for one in sends if one.asked_at is None]


def asks_of(sends: list[Sent]) -> list[Sent]:
    return [one for one in sends if one.asked_at is not None]


# -- simulated drains ----


@pytest.mark.parametrize("line", ["40/min", "80/min, 4/s", "4/s", "55/min, 3/s"])
async def test_request_over_a_drain_is_sent_next(connection: Connection, line: str):
    drain, gap = Drain(connection), TrafficTarget.parse(line).gap_seconds
    drain.batch(), drain.batch()
    drain.asker(*ASKS)
    waits = [one.waited / gap for one in asks_of(await drain.run(line, 130))]
    assert len(waits) == len(ASKS)
    assert sorted(waits)[len(waits) // 2] <= 1.1
    assert max(waits) <= 2


async def test_batch_calls_use_what_requests_leave(connection: Connection):
    quiet = Drain(connection)
    quiet.batch()
    alone = await quiet.run(MINUTE, 2 * PERIOD)
    asked = Drain(connection)
    asked.batch()
    asked.asker(*ASKS)
    assert len(await asked.run(MINUTE, 2 * PERIOD)) >= len(alone) - 1


async def test_nobody_asks_and_batch_keeps_the_pacing_gap(connection: Connection):
    drain = Drain(connection)
    drain.batch()
    sends = await drain.run(MINUTE, PERIOD - 1)
    assert len(sends) == 40
    assert gaps(sends) == pytest.approx([GAP] * 39, abs=1e-4)


@pytest.mark.parametrize("at_most", SHARES)
async def test_flood_of_requests_leaves_batch_its_share(connection: Connection, at_most: float):
    drain = Drain(connection, InteractiveShare(at_most=at_most))
    drain.batch()
    drain.flood()
    sends = await drain.run("2/s", 120)
    share = len(asks_of(sends)) / len(sends)
    assert share == pytest.approx(at_most, abs=0.03)
    assert len(sends) >= 220


@pytest.mark.parametrize("at_most", [1.0])
async def test_whole_share_lets_a_flood_take_everything(connection: Connection, at_most: float):
    drain = Drain(connection, InteractiveShare(at_most=at_most))
    drain.batch()
    drain.flood()
    assert len(batch_of(await drain.run("2/s", 60))) <= 2


async def test_flood_takes_what_batch_leaves(connection: Connection):
    """The share only counts while batch calls wait."""
    drain = Drain(connection)
    drain.flood()
    drain.batch().dies_at = 30
    sends = await drain.run("2/s", 90)
    assert len(asks_of(sends)) >= 0.97 * (len(sends) - len(batch_of(sends)))
    assert max(gaps(sends)) <= 1.06 + 0.06  # half of 2/s in each padded second


@pytest.mark.parametrize("line", ["40/min", "40/min, burst", "10/s, 300/min"])
@pytest.mark.parametrize("reserved", [0.1, 0.5])
async def test_reserved_share_stays_free_though_nobody_asks(
    connection: Connection, line: str, reserved: float
):
    drain = Drain(connection, InteractiveShare(reserved=reserved))
    drain.batch(), drain.batch()
    sends = await drain.run(line, 2 * PERIOD)
    for limit in TrafficTarget.parse(line).requests:
        free = (1 - reserved) * limit.count
        for first in sends:
            within = [one for one in sends if first.at <= one.at < first.at + limit.window_seconds]
            assert len(within) <= free + 1
    assert len(sends) >= 2 * (1 - reserved) * min(
        limit.count * 60 / limit.window_seconds for limit in TrafficTarget.parse(line).requests
    ) * 0.97  # fmt: skip


@pytest.mark.parametrize("reserved", [0.2, 0.8])
async def test_flood_uses_all_that_batch_may_not_have(connection: Connection, reserved: float):
    drain = Drain(connection, InteractiveShare(reserved=reserved))
    drain.batch()
    drain.flood()
    sends = await drain.run("60/min", 2 * PERIOD)
    assert len(sends) >= 0.95 * 120
    assert len(batch_of(sends)) >= 0.95 * min(0.5, 1 - reserved) * 120


async def test_reserved_share_is_for_several_requests_in_a_row(connection: Connection):
    drain = Drain(connection, InteractiveShare(reserved=0.2))
    drain.batch()
    drain.asker(30.0, 30.0, 30.0)
    waits = [one.waited / GAP for one in asks_of(await drain.run(MINUTE, 60))]
    assert max(waits) <= 3.3


@pytest.mark.parametrize("line", [MINUTE, "4/s", "30/s", "20/s, burst"])
async def test_process_that_died_costs_no_send(connection: Connection, line: str):
    async def total(dies_at: float) -> tuple[int, list[float]]:
        drain = Drain(connection)
        drain.batch(), drain.batch()
        drain.asker(*(5 + 3 * number for number in range(15)), dies_at=dies_at)
        sends = await drain.run(line, PERIOD)
        return len(sends), gaps([one for one in sends if one.at > 26.01])

    alive, between = await total(1e9)
    died, after = await total(26.01)
    assert died >= alive - 2
    assert max(after) <= max(between) + 0.1


# -- real limiters ----


@pytest.fixture
async def limiters(redis_client: redis.asyncio.Redis) -> AsyncIterator[list[TrafficLimiter]]:
    """Limiters of three processes."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(TrafficLimiter(redis_client)) for _ in range(3)]


async def order_of(*calls: tuple[str, TrafficLimiter, bool]) -> list[str]:
    """Lets the calls wait one after the other; returns their names in the order of their permits."""
    order: list[str] = []

    async def wait(name: str, limiter: TrafficLimiter, interactive: bool) -> None:
        await limiter.release(await limiter.acquire("m", interactive=interactive))
        order.append(name)

    tasks = []
    for name, limiter, interactive in calls:
        tasks.append(asyncio.create_task(wait(name, limiter, interactive)))
        while not limiter.queue_length("m"):
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)  # its request arrives
    await asyncio.gather(*tasks)
    return order


async def test_requests_precede_batch_calls_that_wait_longer(limiters: list[TrafficLimiter]):
    one, two, three = limiters
    await one.set_target("m", "1/s")
    await one.acquire("m")
    order = await order_of(
        ("b1", one, False), ("b2", two, False), ("i1", one, True), ("i2", one, True), ("b3", three, False)
    )
    assert order[:2] == ["i1", "i2"]
    assert order.index("b1") < order.index("b2") or {"b1", "b2", "b3"} == set(order[2:])


async def test_slot_that_is_released_goes_to_a_request(limiters: list[TrafficLimiter]):
    batch, asker, other = limiters
    await batch.set_target("m", "1 at once")
    held = await other.acquire("m")
    waiting = asyncio.create_task(order_of(("b", batch, False), ("i", asker, True)))
    while not asker.queue_length("m"):
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.05)
    await batch.release(held)  # the batch process learns of it first
    assert await waiting == ["i", "b"]


async def test_canceled_request_leaves_no_ask(
    limiters: list[TrafficLimiter], redis_client: redis.asyncio.Redis
):
    batch, asker, _ = limiters
    await batch.set_target("m", "1/s")
    await batch.acquire("m")
    with pytest.raises(LimiterError, match="paced"):
        await asker.acquire("m", timeout_seconds=0.3, interactive=True)
    while await redis_client.hexists("router:{m}", "asks"):  # type: ignore[misc]
        await asyncio.sleep(0.005)


async def test_reply_to_a_call_that_yields_names_the_reason(limiters: list[TrafficLimiter]):
    batch, asker, _ = limiters
    await batch.set_target("m", "1/s")
    await batch.acquire("m")
    waiting = asyncio.create_task(asker.acquire("m", interactive=True))
    while not isinstance(reply := await batch.reserve("m"), Wait) or reply.reason is not WaitReason.PRIORITY:
        assert not isinstance(reply, Permit)
        await asyncio.sleep(0.02)
    assert "interactive requests go first" in reply.reason.text
    await waiting
