"""Guarantees of the limiter, one per test, on a real Redis."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import redis.asyncio

from local.redis import RedisServer, start_redis
from router.errors import InputError, LimiterError, LimiterUnavailable, PermitExpired
from router.limiter import LimiterSettings, PastCall, Permit, TrafficLimiter, Wait, WaitReason
from router.traffic import TrafficTarget


@pytest.fixture
async def limiter(redis_client: redis.asyncio.Redis) -> AsyncIterator[TrafficLimiter]:
    async with TrafficLimiter(redis_client) as one:
        yield one


@pytest.fixture
async def another(redis_client: redis.asyncio.Redis) -> AsyncIterator[TrafficLimiter]:
    """Limiter of another process."""
    async with TrafficLimiter(redis_client) as one:
        yield one


async def apply_target(limiter: TrafficLimiter, line: str, model: str = "llama") -> None:
    assert await limiter.set_target(model, TrafficTarget.parse(line))


async def granted(limiter: TrafficLimiter, tokens: int = 0, model: str = "llama") -> Permit:
    answer = await limiter.reserve(model, tokens)
    assert isinstance(answer, Permit), answer
    return answer


async def refused(limiter: TrafficLimiter, tokens: int = 0, model: str = "llama") -> Wait:
    answer = await limiter.reserve(model, tokens)
    assert isinstance(answer, Wait), answer
    return answer


async def reserve_many(limiter: TrafficLimiter, count: int) -> tuple[list[Permit], Wait]:
    """Reserves in one round trip."""
    return await limiter._reservations.reserve_many(limiter._tracker.state("llama"), (0, 0) * count)


async def eventually(true: Callable[[], bool], seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "did not come true"
        await asyncio.sleep(0.005)


async def test_used_up_window_says_when_to_retry(limiter: TrafficLimiter):
    await apply_target(limiter, "3/min, burst")
    for _ in range(3):
        await granted(limiter)
    wait = await refused(limiter)
    assert wait.reason is WaitReason.WINDOW
    assert 59 < (wait.again_seconds or 0) <= 60.25


async def test_paced_sends_keep_their_gap_and_idle_time_gives_no_credit(limiter: TrafficLimiter):
    await apply_target(limiter, "20/s")
    first = await granted(limiter)
    await asyncio.sleep(0.2)
    second, third = await granted(limiter), await granted(limiter)
    assert second.send_at - first.send_at >= 0.19
    assert third.send_at - second.send_at == pytest.approx(0.045, abs=0.02)


async def test_burst_removes_the_gap(limiter: TrafficLimiter):
    await apply_target(limiter, "20/s, burst")
    assert [(await granted(limiter)).wait_seconds for _ in range(20)] == [0.0] * 20


async def test_denied_call_uses_no_limit(limiter: TrafficLimiter):
    await apply_target(limiter, "10/min, 100 tokens/min, 5 at once, burst")
    await granted(limiter, 60)
    assert (await refused(limiter, 50)).reason is WaitReason.TOKENS
    now = (await limiter.snapshot(["llama"]))["llama"]
    assert (now.sent, now.tokens, now.in_flight) == ({"10/min": 1}, {"100 tokens/min": 60}, 1)
    await granted(limiter, 40)


async def test_first_release_replaces_the_reserved_tokens(limiter: TrafficLimiter):
    await apply_target(limiter, "100 tokens/min")
    permit = await granted(limiter, 80)
    await limiter.release(permit, 30)
    permit.returned = False  # as in a process that does not know of the first release
    await limiter.release(permit, 0)
    assert (await limiter.snapshot(["llama"]))["llama"].tokens == {"100 tokens/min": 30}
    await granted(limiter, 70)
    await refused(limiter, 1)


async def test_tokens_used_beyond_the_reservation_count(limiter: TrafficLimiter):
    await apply_target(limiter, "100 tokens/min")
    await limiter.release(await granted(limiter, 10), 95)
    assert (await refused(limiter, 6)).reason is WaitReason.TOKENS
    await granted(limiter, 5)


async def test_call_larger_than_a_window_fails_and_blocks_no_other(limiter: TrafficLimiter):
    await apply_target(limiter, "100 tokens/min")
    too_large = asyncio.create_task(limiter.acquire("llama", 101))
    await limiter.acquire("llama", 5, timeout_seconds=5)
    with pytest.raises(LimiterError, match="101 tokens are more"):
        await too_large


async def test_releasing_twice_frees_one_slot(limiter: TrafficLimiter):
    await apply_target(limiter, "2 at once")
    first, _ = await granted(limiter), await granted(limiter)
    assert (await refused(limiter)).reason is WaitReason.CONCURRENCY
    await limiter.release(first)
    first.returned = False
    await limiter.release(first)
    await granted(limiter)
    await refused(limiter)


async def test_unreleased_slot_is_freed_at_the_end_of_the_longest_call(limiter: TrafficLimiter):
    await apply_target(limiter, "1 at once")
    await limiter.reserve("llama", holder_seconds=0.3)
    wait = await refused(limiter)
    assert 0 < (wait.again_seconds or 0) <= 0.3
    await limiter.acquire("llama", timeout_seconds=2)


async def test_first_cancel_returns_the_whole_permit(limiter: TrafficLimiter):
    await apply_target(limiter, "3/min, 30 tokens/min, 3 at once, burst")
    permits = [await granted(limiter, 10) for _ in range(3)]
    await limiter.cancel(permits[1])
    permits[1].returned = False
    await limiter.cancel(permits[1])
    await granted(limiter, 10)
    await refused(limiter, 0)
    now = (await limiter.snapshot(["llama"]))["llama"]
    assert (now.sent, now.tokens, now.in_flight) == ({"3/min": 3}, {"30 tokens/min": 30}, 3)


async def test_released_permit_cannot_be_cancelled(limiter: TrafficLimiter):
    await apply_target(limiter, "1/min, burst")
    permit = await granted(limiter)
    await limiter.release(permit)
    permit.returned = False
    await limiter.cancel(permit)
    await refused(limiter)


async def test_cancelling_the_latest_permit_frees_its_send_time(limiter: TrafficLimiter):
    await apply_target(limiter, "10/s")
    await granted(limiter)
    second = await granted(limiter)
    await limiter.cancel(second)
    again = await granted(limiter)
    assert again.send_at == pytest.approx(second.send_at, abs=0.02)


async def test_permit_expires_after_its_send_slack(limiter: TrafficLimiter):
    await apply_target(limiter, "5/s, burst")
    permit = await granted(limiter)
    permit.check()
    await asyncio.sleep(LimiterSettings().second_slacks.send + 0.005)
    with pytest.raises(PermitExpired):
        permit.check()


async def test_zero_stops_a_model_and_a_new_target_restarts_it(
    limiter: TrafficLimiter, another: TrafficLimiter
):
    await apply_target(limiter, "100/s")
    await limiter.acquire("llama")
    await apply_target(limiter, "0")
    assert (await refused(limiter)).reason is WaitReason.STOPPED
    waiting = asyncio.create_task(limiter.acquire("llama"))
    near = asyncio.create_task(limiter.wait_until_available("llama"))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    assert not near.done()
    started = time.monotonic()
    await apply_target(another, "100/s")
    await asyncio.wait_for(asyncio.gather(waiting, near), 1)
    assert time.monotonic() - started < 0.3


async def test_raised_target_wakes_waiters_of_a_distant_send_time(
    limiter: TrafficLimiter, another: TrafficLimiter
):
    await apply_target(limiter, "1/min")
    await limiter.acquire("llama")
    waiting = asyncio.create_task(limiter.acquire("llama"))
    near = asyncio.create_task(limiter.wait_until_available("llama"))
    await eventually(lambda: limiter.queue_length("llama") == 1)
    await asyncio.sleep(0.2)
    assert not near.done()
    await apply_target(another, "600/min")
    await asyncio.wait_for(asyncio.gather(waiting, near), 1)


async def test_wait_until_available_reserves_nothing(limiter: TrafficLimiter):
    await apply_target(limiter, "1/min")
    for _ in range(5):
        await asyncio.wait_for(limiter.wait_until_available("llama"), 2)
    await granted(limiter)


async def test_release_in_another_process_wakes_the_queue(limiter: TrafficLimiter, another: TrafficLimiter):
    await apply_target(limiter, "1 at once")
    held = await another.acquire("llama")
    waiting = asyncio.create_task(limiter.acquire("llama"))
    near = asyncio.create_task(limiter.wait_until_available("llama"))
    await asyncio.sleep(0.3)
    assert not near.done()
    started = time.monotonic()
    await another.release(held)
    await asyncio.wait_for(waiting, 1)
    assert time.monotonic() - started < 0.25
    await limiter.release(waiting.result())
    await asyncio.wait_for(near, 1)


async def test_queue_is_fifo(limiter: TrafficLimiter):
    await apply_target(limiter, "12000/min")
    order: list[int] = []

    async def wait(number: int) -> None:
        await limiter.acquire("llama")
        order.append(number)

    await asyncio.gather(*[wait(number) for number in range(150)])
    assert order == list(range(150))


async def test_queue_is_fifo_among_equal_send_times(limiter: TrafficLimiter):
    await apply_target(limiter, "150/s, burst")
    await asyncio.gather(*[limiter.acquire("llama") for _ in range(150)])
    order: list[int] = []

    async def wait(number: int) -> None:
        await limiter.acquire("llama")
        order.append(number)

    await asyncio.gather(*[wait(number) for number in range(150)])  # the window frees them all together
    assert order == list(range(150))


async def test_cancelled_waiter_returns_its_permit(limiter: TrafficLimiter):
    await apply_target(limiter, "4/s")
    await limiter.acquire("llama")
    leaving = asyncio.create_task(limiter.acquire("llama"))
    await eventually(lambda: limiter.queue_length("llama") == 0)  # granted, and asleep until its send time
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    await eventually(lambda: not limiter._tracker.tasks)
    assert (await limiter.snapshot(["llama"]))["llama"].sent == {"4/s": 1}


async def test_timeout_names_the_reason(limiter: TrafficLimiter):
    await apply_target(limiter, "1/min")
    await limiter.acquire("llama")
    with pytest.raises(LimiterError, match=r"within 0\.1 s: request window used up"):
        await limiter.acquire("llama", timeout_seconds=0.1)
    assert limiter.queue_length("llama") == 0


async def test_older_version_of_a_target_is_ignored(limiter: TrafficLimiter):
    new, old = TrafficTarget.parse("10/min"), TrafficTarget.parse("99/min")
    assert await limiter.set_target("llama", new, version=2_000)
    assert not await limiter.set_target("llama", old, version=1_999)
    assert await limiter.set_target("llama", new, version=2_000)
    assert (await limiter.snapshot(["llama"]))["llama"].target == "10/min"
    assert await limiter.set_target("llama", old)
    assert (await limiter.snapshot(["llama"]))["llama"].target == "99/min"


async def test_new_concurrency_limit_counts_calls_in_flight(limiter: TrafficLimiter):
    await apply_target(limiter, "100/min, burst")
    first, _, third = [await granted(limiter) for _ in range(3)]
    await limiter.release(third)
    await apply_target(limiter, "100/min, 2 at once, burst")
    assert (await refused(limiter)).reason is WaitReason.CONCURRENCY
    await limiter.release(first)
    await granted(limiter)


async def test_new_token_limit_counts_earlier_sends(limiter: TrafficLimiter):
    await apply_target(limiter, "100/min, burst")
    await granted(limiter, 70)
    await apply_target(limiter, "100/min, 100 tokens/min, burst")
    await refused(limiter, 31)
    await granted(limiter, 30)


async def test_longer_window_counts_sends_of_the_shorter_one(limiter: TrafficLimiter):
    await apply_target(limiter, "1000/s, burst")
    for _ in range(60):
        await granted(limiter)
    await apply_target(limiter, "50/min, burst")
    assert (await refused(limiter)).reason is WaitReason.WINDOW
    await apply_target(limiter, "61/min, burst")
    await granted(limiter)
    await refused(limiter)


async def test_sends_in_many_chunks_all_count(limiter: TrafficLimiter):
    await apply_target(limiter, "6000/min, burst")
    got = 0
    while (part := await reserve_many(limiter, 250))[0]:
        got += len(part[0])
    assert got == 6000
    assert (await limiter.snapshot(["llama"]))["llama"].sent == {"6000/min": 6000}


async def test_old_chunks_are_dropped(limiter: TrafficLimiter, redis_client: redis.asyncio.Redis):
    await apply_target(limiter, "1000000/s, burst")
    while len(await redis_client.keys("router:*:m:*")) < 12:
        await reserve_many(limiter, 250)
    for number in range(12):
        key = f"router:{{llama}}:m:{number}"
        await redis_client.setrange(key, 125, struct.pack("<1000d", *[1.0] * 1000))  # sent long ago
    for _ in range(8):
        await reserve_many(limiter, 250)
    assert len(await redis_client.keys("router:*:m:*")) <= 7
    await granted(limiter)


async def test_cooldown_blocks_all_processes_until_it_ends(limiter: TrafficLimiter, another: TrafficLimiter):
    await apply_target(limiter, "100/s")
    await granted(limiter)
    await limiter.cool_down("llama", 0.6, "429 with Retry-After")
    wait = await refused(another)
    assert wait.reason is WaitReason.COOLING_DOWN
    now = (await another.snapshot(["llama"]))["llama"]
    assert now.cooldown_reason == "429 with Retry-After"
    assert 0 < now.cooldown_seconds <= 0.6
    started = time.monotonic()
    await another.acquire("llama", timeout_seconds=3)
    assert time.monotonic() - started == pytest.approx(wait.again_seconds, abs=0.15)


async def test_model_without_a_target_waits_for_one(limiter: TrafficLimiter, another: TrafficLimiter):
    assert (await refused(limiter)).reason is WaitReason.NO_TARGET
    waiting = asyncio.create_task(limiter.acquire("llama"))
    await asyncio.sleep(0.1)
    await apply_target(another, "10/s")
    await asyncio.wait_for(waiting, 1)


@pytest.mark.parametrize("model", ["", "a b", "{x}", "-x", "é", "x" * 101])
async def test_invalid_model_names_are_rejected(limiter: TrafficLimiter, model: str):
    with pytest.raises(InputError):
        await limiter.reserve(model)


async def test_clock_never_goes_backwards(limiter: TrafficLimiter, redis_client: redis.asyncio.Redis):
    await apply_target(limiter, "2/min, burst")
    await granted(limiter)
    await granted(limiter)
    await _move_back_redis_clock(redis_client, 3600.0)
    wait = await refused(limiter)
    assert 59 < (wait.again_seconds or 0) <= 60.25  # the hour is not waited for, and the window is kept


async def _move_back_redis_clock(client: redis.asyncio.Redis, seconds: float) -> None:
    """Moves the stored state `seconds` ahead, which is the same as a clock set back."""
    packed = bytearray(await client.hget("router:{llama}", "state"))
    clock, sent = struct.unpack_from("<d", packed, 8)[0], struct.unpack_from("<d", packed, 40)[0]
    struct.pack_into("<d", packed, 8, clock + seconds * 1e6)
    struct.pack_into("<d", packed, 40, sent + seconds * 1e6)
    await client.hset("router:{llama}", "state", bytes(packed))
    chunk = bytearray(await client.get("router:{llama}:m:0"))
    for number in range(2):
        send_at = struct.unpack_from("<d", chunk, 125 + 8 * number)[0]
        struct.pack_into("<d", chunk, 125 + 8 * number, send_at + seconds * 1e6)
    await client.set("router:{llama}:m:0", bytes(chunk))


# -- lost state ------------------------------------------------------------------------------------------


async def test_flushed_model_without_history_is_blocked_for_its_window(
    limiter: TrafficLimiter, redis_client: redis.asyncio.Redis
):
    await apply_target(limiter, "5/s, burst")
    for _ in range(5):
        await granted(limiter)
    lost_at = time.monotonic()
    await redis_client.flushall()
    wait = await refused(limiter)
    assert wait.reason is WaitReason.REBUILDING
    assert 1.0 < (wait.again_seconds or 0) < 1.5
    await limiter.acquire("llama", timeout_seconds=5)
    assert time.monotonic() - lost_at > 1.35


async def test_setting_a_target_does_not_end_recovery(
    limiter: TrafficLimiter, redis_client: redis.asyncio.Redis
):
    await apply_target(limiter, "5/min, burst")
    await granted(limiter)
    await redis_client.flushall()
    await apply_target(limiter, "500/min, burst")
    assert (await refused(limiter)).reason is WaitReason.REBUILDING


async def test_blind_start_is_revoked_by_a_client_that_knew_more(
    limiter: TrafficLimiter, another: TrafficLimiter, redis_client: redis.asyncio.Redis
):
    await apply_target(limiter, "5/min, burst")
    await granted(limiter)
    await redis_client.flushall()
    await apply_target(another, "5/min, burst")
    await granted(another)
    assert (await refused(limiter)).reason is WaitReason.REBUILDING
    assert (await refused(another)).reason is WaitReason.REBUILDING


async def test_new_client_does_not_start_a_model_that_is_known_to_be_lost(
    limiter: TrafficLimiter, another: TrafficLimiter, redis_client: redis.asyncio.Redis
):
    await apply_target(limiter, "5/min, burst")
    await granted(limiter)
    await redis_client.flushall()
    assert (await refused(limiter)).reason is WaitReason.REBUILDING
    assert (await refused(another)).reason is WaitReason.REBUILDING


async def test_state_older_than_seen_counts_as_lost(
    limiter: TrafficLimiter, redis_client: redis.asyncio.Redis
):
    await apply_target(limiter, "50/min, burst")
    await granted(limiter)
    old = await redis_client.hget("router:{llama}", "state")
    await granted(limiter)
    await redis_client.hset("router:{llama}", "state", old)
    assert (await refused(limiter)).reason is WaitReason.REBUILDING


async def test_lost_chunk_counts_as_lost_state(limiter: TrafficLimiter, redis_client: redis.asyncio.Redis):
    await apply_target(limiter, "1/min, burst")
    await granted(limiter)
    await redis_client.delete("router:{llama}:m:0")
    assert (await refused(limiter)).reason is WaitReason.REBUILDING


async def test_windows_are_rebuilt_from_the_history(redis_client: redis.asyncio.Redis):
    requested: list[tuple[str, float]] = []
    calls: list[PastCall] = []

    async def history(model: str, seconds: float) -> list[PastCall]:
        requested.append((model, seconds))
        return calls

    async with TrafficLimiter(redis_client, history) as limiter:
        await apply_target(limiter, "5/min, 100 tokens/min, 3 at once, burst")
        await granted(limiter)  # the history is empty: it starts at once
        calls += [
            PastCall(10.0, 50),
            PastCall(1.0, 20, open=True),
            PastCall(58.5, 5),
            PastCall(30.0, 5, open=True),
        ]
        await redis_client.flushall()
        wait = await refused(limiter)
        assert wait.reason is WaitReason.REBUILDING
        assert 0 < (wait.again_seconds or 0) <= 0.36
        await limiter.acquire("llama", 20, timeout_seconds=2)
        assert requested[-1][0] == "llama"
        assert requested[-1][1] >= 60.25
        now = (await limiter.snapshot(["llama"]))["llama"]
        assert (now.sent, now.tokens, now.in_flight) == ({"5/min": 5}, {"100 tokens/min": 100}, 3)
        assert (await refused(limiter)).reason is WaitReason.CONCURRENCY


async def test_failed_history_grants_nothing(redis_client: redis.asyncio.Redis):
    async def history(model: str, seconds: float) -> list[PastCall]:
        raise OSError("no log")

    async with TrafficLimiter(redis_client, history) as limiter:
        await apply_target(limiter, "5/min")
        with pytest.raises(LimiterUnavailable, match="no log"):
            await limiter.reserve("llama")


async def test_nothing_is_sent_without_redis_and_the_queue_recovers(tmp_path: Path):
    server = start_redis(tmp_path)
    client = redis.asyncio.Redis.from_url(server.url, retry=None, socket_timeout=1)
    try:
        async with TrafficLimiter(client) as limiter:
            await apply_target(limiter, "5/s, burst")
            await limiter.acquire("llama")
            server.stop()
            with pytest.raises(LimiterUnavailable):
                await limiter.reserve("llama")
            waiting = asyncio.create_task(limiter.acquire("llama"))
            await asyncio.sleep(0.2)
            assert not waiting.done()
            server = start_redis(tmp_path, port=server.port)
            back_at = time.monotonic()
            await asyncio.wait_for(waiting, 10)
            assert time.monotonic() - back_at > 1.0  # the new Redis does not know the last second
    finally:
        await client.aclose()
        server.stop()


async def test_older_copy_after_a_restart_is_detected(tmp_path: Path):
    server = start_redis(tmp_path)
    client = redis.asyncio.Redis.from_url(server.url)
    try:
        async with TrafficLimiter(client) as limiter:
            await apply_target(limiter, "5/min, burst")
            await granted(limiter)
            await client.save()
            await granted(limiter)
        server.stop()
        server = start_redis(tmp_path, port=server.port)
        await client.aclose()
        client = redis.asyncio.Redis.from_url(server.url)
        async with TrafficLimiter(client) as newcomer:
            assert await client.hget("router:{llama}", "target") == b"5/min, burst"
            assert (await refused(newcomer)).reason is WaitReason.REBUILDING
    finally:
        await client.aclose()
        server.stop()


async def test_client_with_decode_responses_works(redis_server: RedisServer):
    client = redis.asyncio.Redis.from_url(redis_server.url, decode_responses=True)
    await client.flushall()
    async with TrafficLimiter(client) as limiter:
        await apply_target(limiter, "5/s")
        await limiter.release(await limiter.acquire("llama"))
        waiting = asyncio.create_task(limiter.wait_until_available("llama"))
        await asyncio.wait_for(waiting, 1)
        now = (await limiter.snapshot(["llama"]))["llama"]
        assert (now.target, now.sent) == ("5/s", {"5/s": 1})
    await client.aclose()


async def test_usage_counts_no_send_before_its_time(limiter: TrafficLimiter):
    """A permit that was granted ahead of its send time is not usage yet."""
    await apply_target(limiter, "4/s, 40 tokens/s, burst")
    for _ in range(9):
        await limiter.acquire("llama", tokens=10, timeout_seconds=5)
        now = (await limiter.snapshot(["llama"]))["llama"]
        assert now.sent["4/s"] <= 4
        assert now.tokens["40 tokens/s"] <= 40
        ahead = await limiter.reserve("llama", tokens=10)
        now = (await limiter.snapshot(["llama"]))["llama"]
        assert now.sent["4/s"] <= 4, ahead
        assert now.tokens["40 tokens/s"] <= 40, ahead
