"""Failures and refusals cool a model down in all processes; single probes end the cool-down."""

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
    """Limiter of another process."""
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
    """Returns the only permit of a half-open model; all other requests in all processes are denied."""
    answers = [await limiter.reserve("llama") for limiter in (*limiters, *limiters)]
    permits = [answer for answer in answers if isinstance(answer, Permit)]
    assert len(permits) == 1
    assert [a.reason for a in answers if isinstance(a, Wait)] == [WaitReason.HALF_OPEN] * (len(answers) - 1)
    return permits[0]


async def opened(limiter: TrafficLimiter) -> None:
    await granted(limiter)
    await fail(limiter, times=BREAKER.failure_threshold)
    assert (await refused(limiter)).reason is WaitReason.COOLING_DOWN


async def cooldown_over(limiter: TrafficLimiter) -> None:
    await asyncio.sleep((await limiter.snapshot(["llama"]))["llama"].cooldown_seconds + 0.002)


async def test_failures_in_a_row_over_all_processes_open_the_breaker(
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


async def test_success_resets_the_failure_count(limiter: TrafficLimiter, another: TrafficLimiter):
    await fail(limiter, times=2)
    await granted(another)
    await another.record_outcome("llama", Outcome.ANSWERED)
    await fail(limiter, times=2)
    await granted(limiter)
    assert (await limiter.snapshot(["llama"]))["llama"].failures == 2


async def test_rejected_prompt_is_not_a_failure(limiter: TrafficLimiter):
    for outcome in (Outcome.REJECTED, Outcome.UNSENT, Outcome.LOST):
        await fail(limiter, outcome, times=5)
    await granted(limiter)


async def test_half_open_admits_one_probe_whose_success_closes_the_breaker(
    limiter: TrafficLimiter, another: TrafficLimiter
):
    await opened(limiter)
    await cooldown_over(limiter)
    waiting = [asyncio.create_task(another.acquire("llama")) for _ in range(3)]
    await asyncio.sleep(0.1)
    assert sum(task.done() for task in waiting) == 1
    probe = next(task.result() for task in waiting if task.done())
    assert (await refused(limiter)).reason is WaitReason.HALF_OPEN
    assert (await limiter.snapshot(["llama"]))["llama"].breaker == "half-open"
    started = time.monotonic()
    await limiter.record_outcome("llama", Outcome.ANSWERED, permit=probe)
    await asyncio.wait_for(asyncio.gather(*waiting), 1)
    assert time.monotonic() - started < 0.5  # woken by a notification, not by polling
    assert (await limiter.snapshot(["llama"]))["llama"].breaker == "closed"


async def test_failed_probe_doubles_the_cooldown_up_to_the_maximum(
    limiter: TrafficLimiter, another: TrafficLimiter
):
    await opened(limiter)
    for longest in (0.6, 0.6):
        await cooldown_over(limiter)
        probe = await probe_of(limiter, another)
        await another.record_outcome("llama", Outcome.ERROR, permit=probe)
        wait = await refused(limiter)
        assert wait.reason is WaitReason.COOLING_DOWN
        assert longest - 0.1 < (wait.again_seconds or 0) <= longest


async def test_calls_sent_before_opening_do_not_affect_the_breaker(limiter: TrafficLimiter):
    early = [await granted(limiter) for _ in range(6)]
    for permit in early[:3]:
        await limiter.record_outcome("llama", Outcome.ERROR, permit=permit)
    await limiter.record_outcome("llama", Outcome.ERROR, permit=early[3])
    await limiter.record_outcome("llama", Outcome.ANSWERED, permit=early[4])
    now = (await limiter.snapshot(["llama"]))["llama"]
    assert (now.breaker, now.trips) == ("open", 1)
    await cooldown_over(limiter)
    await limiter.record_outcome("llama", Outcome.ANSWERED, permit=early[5])
    await probe_of(limiter)


async def test_cancelled_probe_is_replaced(limiter: TrafficLimiter, another: TrafficLimiter):
    await opened(limiter)
    await cooldown_over(limiter)
    await limiter.cancel(await probe_of(limiter, another))
    probe = await probe_of(another, limiter)
    await another.release(probe)  # no outcome recorded
    await probe_of(limiter, another)


async def test_abandoned_probe_is_replaced(limiter: TrafficLimiter, another: TrafficLimiter):
    await fail(limiter, times=3)
    await asyncio.sleep(0.35)
    probe = await probe_of(limiter, another)
    await limiter.record_outcome("llama", Outcome.ABANDONED, permit=probe)
    await probe_of(another, limiter)
    assert (await limiter.snapshot(["llama"]))["llama"].breaker == "half-open"


async def test_probe_of_a_dead_process_blocks_for_at_most_the_longest_call(
    limiter: TrafficLimiter, another: TrafficLimiter
):
    await opened(limiter)
    await cooldown_over(limiter)
    assert isinstance(await limiter.reserve("llama", holder_seconds=0.4), Permit)
    wait = await refused(another)
    assert wait.reason is WaitReason.HALF_OPEN
    assert 0.3 < (wait.again_seconds or 0) <= 0.4
    await asyncio.wait_for(another.acquire("llama"), 1)


@pytest.mark.parametrize("outcome", [Outcome.RATE_LIMITED, Outcome.OVERLOADED])
async def test_retry_after_cools_down_all_processes_without_opening_the_breaker(
    limiter: TrafficLimiter, another: TrafficLimiter, outcome: Outcome
):
    for _ in range(BREAKER.failure_threshold + 1):
        await limiter.record_outcome("llama", outcome, 0.5)
    wait = await refused(another)
    assert wait.reason is WaitReason.COOLING_DOWN
    assert 0.3 < (wait.again_seconds or 0) <= 0.5
    now = (await another.snapshot(["llama"]))["llama"]
    assert (now.breaker, now.failures) == ("closed", 0)


async def test_503_without_retry_after_is_a_failure(limiter: TrafficLimiter):
    await fail(limiter, Outcome.OVERLOADED, times=BREAKER.failure_threshold)
    assert (await limiter.snapshot(["llama"]))["llama"].breaker == "open"


async def test_429s_are_counted_and_reported(limiter: TrafficLimiter, another: TrafficLimiter):
    assert (await limiter.snapshot(["llama"]))["llama"].quota_warning is None
    for where in (limiter, another, limiter):
        await where.record_outcome("llama", Outcome.RATE_LIMITED, 0.05)
    now = (await another.snapshot(["llama"]))["llama"]
    assert now.refused == 3
    assert now.refused_seconds == pytest.approx(0, abs=1)
    assert "3 of its calls refused (429)" in (now.quota_warning or "")
    assert "above what the provider allows" in (now.quota_warning or "")


async def test_429_count_ends_after_an_hour_without_another(
    limiter: TrafficLimiter, redis_client: redis.asyncio.Redis
):
    await limiter.record_outcome("llama", Outcome.RATE_LIMITED, 0.05)
    refused_at = float(await redis_client.hget("router:{llama}", "refused_at"))
    await redis_client.hset("router:{llama}", "refused_at", f"{refused_at - 3601e6:.0f}")
    assert (await limiter.snapshot(["llama"]))["llama"].refused == 0
    await limiter.record_outcome("llama", Outcome.RATE_LIMITED, 0.05)
    assert (await limiter.snapshot(["llama"]))["llama"].refused == 1


async def test_unknown_model_cools_down(limiter: TrafficLimiter):
    await fail(limiter, Outcome.UNKNOWN_MODEL)
    assert (await limiter.snapshot(["llama"]))["llama"].cooldown_seconds == pytest.approx(30, abs=1)
    await limiter.cool_down("llama", 0, "operator")
    await granted(limiter)


async def test_success_of_a_healthy_model_costs_no_round_trip(
    limiter: TrafficLimiter, redis_client: redis.asyncio.Redis
):
    await granted(limiter)
    before = (await redis_client.info("commandstats"))["cmdstat_evalsha"]["calls"]
    await limiter.record_outcome("llama", Outcome.ANSWERED)
    assert (await redis_client.info("commandstats"))["cmdstat_evalsha"]["calls"] == before


async def _no_calls(_model: str, _seconds: float) -> list[PastCall]:
    return []


async def test_cooldown_survives_lost_redis_state(redis_client: redis.asyncio.Redis):
    async with (
        TrafficLimiter(redis_client, _no_calls, settings=SETTINGS) as knows,
        TrafficLimiter(redis_client, _no_calls, settings=SETTINGS) as rebuilds,
    ):
        await knows.set_target("llama", LINE)
        await granted(rebuilds)
        await rebuilds._tasks.wait()  # it has learned the target
        await knows.record_outcome("llama", Outcome.RATE_LIMITED, 20)
        await redis_client.flushall()
        await rebuilds.acquire("llama", timeout_seconds=3)  # it does not know of the cool-down
        assert await knows.reserve("llama")  # it sees a new generation, and restores the cool-down

        async def cools_down() -> bool:
            return (await rebuilds.snapshot(["llama"]))["llama"].cooldown_seconds > 10

        for _ in range(100):
            if await cools_down():
                break
            await asyncio.sleep(0.01)
        assert await cools_down()
        await redis_client.flushall()
        with pytest.raises(Exception, match="cooling down after a 429"):
            await knows.acquire("llama", timeout_seconds=1.5)
