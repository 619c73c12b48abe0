"""A model that fails or refuses is rested for everyone, tried out with single calls, and trusted again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
import redis.asyncio

from router.limiter import LimiterSettings, PastCall, Permit, TrafficLimiter, Wait, WaitReason
from router.limiter.breaker import BreakerSettings
from router.task import Outcome

BREAKER = BreakerSettings(failure_threshold=3, initial_cooldown_seconds=0.3, max_cooldown_seconds=0.6)
SETTINGS = LimiterSettings(breaker=BREAKER, max_call_seconds=30)
LINE = "1000/s, burst"


@pytest.fixture
async def limiter(redis_client: redis.asyncio.Redis) -> AsyncIterator[TrafficLimiter]:
    async with TrafficLimiter(redis_client, settings=SETTINGS) as one:
        await one.set_target("llama", LINE)
        await granted(one)
        yield one


@pytest.fixture
async def another(redis_client: redis.asyncio.Redis) -> AsyncIterator[TrafficLimiter]:
    """A limiter as another process would have it."""
    async with TrafficLimiter(redis_client, settings=SETTINGS) as one:
        yield one


async def granted(limiter: TrafficLimiter) -> Permit:
    answer = await limiter.reserve("llama")
    assert isinstance(answer, Permit), answer
    return answer


async def refused(limiter: TrafficLimiter) -> Wait:
    answer = await limiter.reserve("llama")
    assert isinstance(answer, Wait), answer
    return answer


async def fail(limiter: TrafficLimiter, outcome: Outcome = Outcome.ERROR, times: int = 1) -> None:
    for _ in range(times):
        await limiter.record_outcome("llama", outcome, why="it broke")


async def probe_of(*limiters: TrafficLimiter) -> Permit:
    """The one permit of a half-open model; whoever else asks, in any process, waits for what comes of it."""
    answers = [await limiter.reserve("llama") for limiter in (*limiters, *limiters)]
    permits = [answer for answer in answers if isinstance(answer, Permit)]
    assert len(permits) == 1
    assert [a.reason for a in answers if isinstance(a, Wait)] == [WaitReason.HALF_OPEN] * (len(answers) - 1)
    return permits[0]


async def opened(limiter: TrafficLimiter) -> None:
    await granted(limiter)
    await fail(limiter, times=BREAKER.failure_threshold)
    assert (await refused(limiter)).reason is WaitReason.COOLING_DOWN


async def rested(limiter: TrafficLimiter) -> None:
    await asyncio.sleep((await limiter.snapshot(["llama"]))["llama"].cooldown_seconds + 0.002)


async def test_failures_in_a_row_over_all_processes_open_the_breaker_for_everyone(
    limiter: TrafficLimiter, another: TrafficLimiter
):
    for outcome, where in [(Outcome.ERROR, limiter), (Outcome.TIMEOUT, another), (Outcome.GARBAGE, limiter)]:
        await granted(another)
        await fail(where, outcome)
    for where in (limiter, another):
        wait = await refused(where)
        assert wait.reason is WaitReason.COOLING_DOWN
        assert 0 < (wait.again_seconds or 0) <= 0.3
    now = (await another.snapshot(["llama"]))["llama"]
    assert (now.breaker, now.trips, now.cooldown_reason) == ("open", 1, "garbage: it broke")


async def test_a_success_in_between_begins_the_count_anew(limiter: TrafficLimiter, another: TrafficLimiter):
    await fail(limiter, times=2)
    await granted(another)
    await another.record_outcome("llama", Outcome.ANSWERED)
    await fail(limiter, times=2)
    await granted(limiter)
    assert (await limiter.snapshot(["llama"]))["llama"].failures == 2


async def test_a_prompt_that_is_refused_says_nothing_against_the_model(limiter: TrafficLimiter):
    for outcome in (Outcome.REJECTED, Outcome.UNSENT, Outcome.LOST):
        await fail(limiter, outcome, times=5)
    await granted(limiter)


async def test_half_open_lets_one_probe_through_and_its_success_closes(
    limiter: TrafficLimiter, another: TrafficLimiter
):
    await opened(limiter)
    await rested(limiter)
    waiting = [asyncio.create_task(another.acquire("llama")) for _ in range(3)]
    await asyncio.sleep(0.1)
    assert sum(task.done() for task in waiting) == 1
    probe = next(task.result() for task in waiting if task.done())
    assert (await refused(limiter)).reason is WaitReason.HALF_OPEN
    assert (await limiter.snapshot(["llama"]))["llama"].breaker == "half-open"
    started = time.monotonic()
    await limiter.record_outcome("llama", Outcome.ANSWERED, permit=probe)
    await asyncio.wait_for(asyncio.gather(*waiting), 1)
    assert time.monotonic() - started < 0.5  # woken, not found out by looking
    assert (await limiter.snapshot(["llama"]))["llama"].breaker == "closed"


async def test_a_probe_that_fails_opens_for_longer_up_to_the_cap(
    limiter: TrafficLimiter, another: TrafficLimiter
):
    await opened(limiter)
    for longest in (0.6, 0.6):
        await rested(limiter)
        probe = await probe_of(limiter, another)
        await another.record_outcome("llama", Outcome.ERROR, permit=probe)
        wait = await refused(limiter)
        assert wait.reason is WaitReason.COOLING_DOWN
        assert longest - 0.1 < (wait.again_seconds or 0) <= longest


async def test_what_was_sent_before_it_opened_neither_closes_nor_prolongs_it(limiter: TrafficLimiter):
    early = [await granted(limiter) for _ in range(6)]
    for permit in early[:3]:
        await limiter.record_outcome("llama", Outcome.ERROR, permit=permit)
    await limiter.record_outcome("llama", Outcome.ERROR, permit=early[3])
    await limiter.record_outcome("llama", Outcome.ANSWERED, permit=early[4])
    now = (await limiter.snapshot(["llama"]))["llama"]
    assert (now.breaker, now.trips) == ("open", 1)
    await rested(limiter)
    await limiter.record_outcome("llama", Outcome.ANSWERED, permit=early[5])
    await probe_of(limiter)


async def test_a_probe_that_was_not_used_is_another_ones(limiter: TrafficLimiter, another: TrafficLimiter):
    await opened(limiter)
    await rested(limiter)
    await limiter.cancel(await probe_of(limiter, another))
    probe = await probe_of(another, limiter)
    await another.release(probe)  # it ended, and nobody said how
    await probe_of(limiter, another)


async def test_a_probe_that_was_given_up_is_another_ones(limiter: TrafficLimiter, another: TrafficLimiter):
    await fail(limiter, times=3)
    await asyncio.sleep(0.35)
    probe = await probe_of(limiter, another)
    await limiter.record_outcome("llama", Outcome.ABANDONED, permit=probe)
    await probe_of(another, limiter)
    assert (await limiter.snapshot(["llama"]))["llama"].breaker == "half-open"


async def test_a_probe_whose_process_died_blocks_until_the_longest_call_is_over(
    limiter: TrafficLimiter, another: TrafficLimiter
):
    await opened(limiter)
    await rested(limiter)
    assert isinstance(await limiter.reserve("llama", holder_seconds=0.4), Permit)
    wait = await refused(another)
    assert wait.reason is WaitReason.HALF_OPEN
    assert 0.3 < (wait.again_seconds or 0) <= 0.4
    await asyncio.wait_for(another.acquire("llama"), 1)


@pytest.mark.parametrize("outcome", [Outcome.RATE_LIMITED, Outcome.OVERLOADED])
async def test_retry_after_rests_the_model_for_everyone_and_opens_nothing(
    limiter: TrafficLimiter, another: TrafficLimiter, outcome: Outcome
):
    for _ in range(BREAKER.failure_threshold + 1):
        await limiter.record_outcome("llama", outcome, 0.5)
    wait = await refused(another)
    assert wait.reason is WaitReason.COOLING_DOWN
    assert 0.3 < (wait.again_seconds or 0) <= 0.5
    now = (await another.snapshot(["llama"]))["llama"]
    assert (now.breaker, now.failures) == ("closed", 0)


async def test_a_503_that_names_no_time_is_a_failure(limiter: TrafficLimiter):
    await fail(limiter, Outcome.OVERLOADED, times=BREAKER.failure_threshold)
    assert (await limiter.snapshot(["llama"]))["llama"].breaker == "open"


async def test_each_429_is_counted_and_said(limiter: TrafficLimiter, another: TrafficLimiter):
    assert (await limiter.snapshot(["llama"]))["llama"].quota_warning is None
    for where in (limiter, another, limiter):
        await where.record_outcome("llama", Outcome.RATE_LIMITED, 0.05)
    now = (await another.snapshot(["llama"]))["llama"]
    assert now.refused == 3
    assert now.refused_seconds == pytest.approx(0, abs=1)
    assert "3 of its calls refused (429)" in (now.quota_warning or "")
    assert "above what the provider allows" in (now.quota_warning or "")


async def test_an_old_429_is_forgotten_after_an_hour_without_another(
    limiter: TrafficLimiter, redis_client: redis.asyncio.Redis
):
    await limiter.record_outcome("llama", Outcome.RATE_LIMITED, 0.05)
    told = float(await redis_client.hget("router:{llama}", "refused_at"))
    await redis_client.hset("router:{llama}", "refused_at", f"{told - 3601e6:.0f}")
    assert (await limiter.snapshot(["llama"]))["llama"].refused == 0
    await limiter.record_outcome("llama", Outcome.RATE_LIMITED, 0.05)
    assert (await limiter.snapshot(["llama"]))["llama"].refused == 1


async def test_a_model_that_is_not_there_is_left_alone_for_a_while(limiter: TrafficLimiter):
    await fail(limiter, Outcome.UNKNOWN_MODEL)
    assert (await limiter.snapshot(["llama"]))["llama"].cooldown_seconds == pytest.approx(30, abs=1)
    await limiter.cool_down("llama", 0, "a person says so")
    await granted(limiter)


async def test_success_of_a_model_that_nobody_doubts_costs_no_round_trip(
    limiter: TrafficLimiter, redis_client: redis.asyncio.Redis
):
    await granted(limiter)
    before = (await redis_client.info("commandstats"))["cmdstat_evalsha"]["calls"]
    await limiter.record_outcome("llama", Outcome.ANSWERED)
    assert (await redis_client.info("commandstats"))["cmdstat_evalsha"]["calls"] == before


async def _no_calls(_model: str, _seconds: float) -> list[PastCall]:
    return []


async def test_a_rest_and_an_open_breaker_outlive_redis_losing_its_memory(redis_client: redis.asyncio.Redis):
    async with (
        TrafficLimiter(redis_client, _no_calls, settings=SETTINGS) as knows,
        TrafficLimiter(redis_client, _no_calls, settings=SETTINGS) as rebuilds,
    ):
        await knows.set_target("llama", LINE)
        await granted(rebuilds)
        await rebuilds._tasks.wait()  # it has learned the target
        await knows.record_outcome("llama", Outcome.RATE_LIMITED, 20)
        await redis_client.flushall()
        await rebuilds.acquire("llama", timeout_seconds=3)  # it had not heard of the rest
        assert await knows.reserve("llama")  # it learns that the memory is another one, and tells

        async def rests() -> bool:
            return (await rebuilds.snapshot(["llama"]))["llama"].cooldown_seconds > 10

        for _ in range(100):
            if await rests():
                break
            await asyncio.sleep(0.01)
        assert await rests()
        await redis_client.flushall()
        with pytest.raises(Exception, match="cooling down after a 429"):
            await knows.acquire("llama", timeout_seconds=1.5)
