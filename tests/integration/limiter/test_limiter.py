"""What the limiter promises, one promise a test, on a real Redis."""

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
    """A limiter as another process would have it."""
    async with TrafficLimiter(redis_client) as one:
        yield one


async def put(limiter: TrafficLimiter, line: str, model: str = "llama") -> None:
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
    return await limiter._reservations.reserve_many(limiter._tracker.state("llama"), (0,) * count)


async def eventually(true: Callable[[], bool], seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "did not come true"
        await asyncio.sleep(0.005)


async def test_a_window_that_is_used_up_says_when_to_ask_again(limiter: TrafficLimiter):
    await put(limiter, "3/min, burst")
    for _ in range(3):
        await granted(limiter)
    wait = await refused(limiter)
    assert wait.reason is WaitReason.WINDOW
    assert 59 < (wait.again_seconds or 0) <= 60.25


async def test_paced_sends_keep_their_gap_and_gain_no_credit_by_waiting(limiter: TrafficLimiter):
    await put(limiter, "20/s")
    first = await granted(limiter)
    await asyncio.sleep(0.2)
    second, third = await granted(limiter), await granted(limiter)
    assert second.send_at - first.send_at >= 0.19
    assert third.send_at - second.send_at == pytest.approx(0.045, abs=0.02)


async def test_burst_lifts_the_gap(limiter: TrafficLimiter):
    await put(limiter, "20/s, burst")
    assert [(await granted(limiter)).wait_seconds for _ in range(20)] == [0.0] * 20


async def test_a_refused_call_takes_nothing_of_any_limit(limiter: TrafficLimiter):
    await put(limiter, "10/min, 100 tokens/min, 5 at once, burst")
    await granted(limiter, 60)
    assert (await refused(limiter, 50)).reason is WaitReason.TOKENS
    now = (await limiter.snapshot(["llama"]))["llama"]
    assert (now.sent, now.tokens, now.in_flight) == ({"10/min": 1}, {"100 tokens/min": 60}, 1)
    await granted(limiter, 40)


async def test_release_corrects_the_tokens_into_the_reservation_and_only_once(limiter: TrafficLimiter):
    await put(limiter, "100 tokens/min")
    permit = await granted(limiter, 80)
    await limiter.release(permit, 30)
    permit.returned = False  # as a second process would, that does not know of the first
    await limiter.release(permit, 0)
    assert (await limiter.snapshot(["llama"]))["llama"].tokens == {"100 tokens/min": 30}
    await granted(limiter, 70)
    await refused(limiter, 1)


async def test_more_tokens_used_than_reserved_count_too(limiter: TrafficLimiter):
    await put(limiter, "100 tokens/min")
    await limiter.release(await granted(limiter, 10), 95)
    assert (await refused(limiter, 6)).reason is WaitReason.TOKENS
    await granted(limiter, 5)


async def test_a_call_larger_than_a_whole_window_is_an_error_and_holds_nobody_up(limiter: TrafficLimiter):
    await put(limiter, "100 tokens/min")
    too_large = asyncio.create_task(limiter.acquire("llama", 101))
    await limiter.acquire("llama", 5, timeout_seconds=5)
    with pytest.raises(LimiterError, match="101 tokens are more"):
        await too_large


async def test_releasing_twice_frees_one_place(limiter: TrafficLimiter):
    await put(limiter, "2 at once")
    first, _ = await granted(limiter), await granted(limiter)
    assert (await refused(limiter)).reason is WaitReason.CONCURRENCY
    await limiter.release(first)
    first.returned = False
    await limiter.release(first)
    await granted(limiter)
    await refused(limiter)


async def test_a_place_comes_free_at_the_holders_end_if_nobody_releases_it(limiter: TrafficLimiter):
    await put(limiter, "1 at once")
    await limiter.reserve("llama", holder_seconds=0.3)
    wait = await refused(limiter)
    assert 0 < (wait.again_seconds or 0) <= 0.3
    await limiter.acquire("llama", timeout_seconds=2)


async def test_a_cancelled_permit_is_given_back_whole_and_only_once(limiter: TrafficLimiter):
    await put(limiter, "3/min, 30 tokens/min, 3 at once, burst")
    permits = [await granted(limiter, 10) for _ in range(3)]
    await limiter.cancel(permits[1])
    permits[1].returned = False
    await limiter.cancel(permits[1])
    await granted(limiter, 10)
    await refused(limiter, 0)
    now = (await limiter.snapshot(["llama"]))["llama"]
    assert (now.sent, now.tokens, now.in_flight) == ({"3/min": 3}, {"30 tokens/min": 30}, 3)


async def test_a_released_permit_cannot_be_cancelled(limiter: TrafficLimiter):
    await put(limiter, "1/min, burst")
    permit = await granted(limiter)
    await limiter.release(permit)
    permit.returned = False
    await limiter.cancel(permit)
    await refused(limiter)


async def test_cancelling_the_latest_gives_its_moment_to_the_next(limiter: TrafficLimiter):
    await put(limiter, "10/s")
    await granted(limiter)
    second = await granted(limiter)
    await limiter.cancel(second)
    again = await granted(limiter)
    assert again.send_at == pytest.approx(second.send_at, abs=0.02)


async def test_a_permit_dies_after_its_slack(limiter: TrafficLimiter):
    await put(limiter, "5/s, burst")
    permit = await granted(limiter)
    permit.check()
    await asyncio.sleep(LimiterSettings().second_slacks.send + 0.005)
    with pytest.raises(PermitExpired):
        permit.check()


async def test_zero_stops_and_a_new_target_starts_again_at_once(
    limiter: TrafficLimiter, another: TrafficLimiter
):
    await put(limiter, "100/s")
    await limiter.acquire("llama")
    await put(limiter, "0")
    assert (await refused(limiter)).reason is WaitReason.STOPPED
    waiting = asyncio.create_task(limiter.acquire("llama"))
    near = asyncio.create_task(limiter.wait_until_available("llama"))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    assert not near.done()
    started = time.monotonic()
    await put(another, "100/s")
    await asyncio.wait_for(asyncio.gather(waiting, near), 1)
    assert time.monotonic() - started < 0.3


async def test_a_raise_wakes_those_who_wait_for_a_far_moment(
    limiter: TrafficLimiter, another: TrafficLimiter
):
    await put(limiter, "1/min")
    await limiter.acquire("llama")
    waiting = asyncio.create_task(limiter.acquire("llama"))
    near = asyncio.create_task(limiter.wait_until_available("llama"))
    await eventually(lambda: limiter.queue_length("llama") == 1)
    await asyncio.sleep(0.2)
    assert not near.done()
    await put(another, "600/min")
    await asyncio.wait_for(asyncio.gather(waiting, near), 1)


async def test_until_near_reserves_nothing(limiter: TrafficLimiter):
    await put(limiter, "1/min")
    for _ in range(5):
        await asyncio.wait_for(limiter.wait_until_available("llama"), 2)
    await granted(limiter)


async def test_a_release_elsewhere_wakes_the_line(limiter: TrafficLimiter, another: TrafficLimiter):
    await put(limiter, "1 at once")
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


async def test_the_line_keeps_its_order(limiter: TrafficLimiter):
    await put(limiter, "12000/min")
    order: list[int] = []

    async def stand(number: int) -> None:
        await limiter.acquire("llama")
        order.append(number)

    await asyncio.gather(*[stand(number) for number in range(150)])
    assert order == list(range(150))


async def test_the_line_keeps_its_order_among_equal_moments(limiter: TrafficLimiter):
    await put(limiter, "150/s, burst")
    await asyncio.gather(*[limiter.acquire("llama") for _ in range(150)])
    order: list[int] = []

    async def stand(number: int) -> None:
        await limiter.acquire("llama")
        order.append(number)

    await asyncio.gather(*[stand(number) for number in range(150)])  # all of the first become free together
    assert order == list(range(150))


async def test_a_waiter_that_leaves_gives_its_permit_back(limiter: TrafficLimiter):
    await put(limiter, "4/s")
    await limiter.acquire("llama")
    leaving = asyncio.create_task(limiter.acquire("llama"))
    await eventually(lambda: limiter.queue_length("llama") == 0)  # granted, and asleep until its moment
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    await eventually(lambda: not limiter._tasks)
    assert (await limiter.snapshot(["llama"]))["llama"].sent == {"4/s": 1}


async def test_a_timeout_says_why(limiter: TrafficLimiter):
    await put(limiter, "1/min")
    await limiter.acquire("llama")
    with pytest.raises(LimiterError, match=r"within 0\.1 s: request window used up"):
        await limiter.acquire("llama", timeout_seconds=0.1)
    assert limiter.queue_length("llama") == 0


async def test_the_older_version_of_a_target_loses(limiter: TrafficLimiter):
    new, old = TrafficTarget.parse("10/min"), TrafficTarget.parse("99/min")
    assert await limiter.set_target("llama", new, version=2_000)
    assert not await limiter.set_target("llama", old, version=1_999)
    assert await limiter.set_target("llama", new, version=2_000)
    assert (await limiter.snapshot(["llama"]))["llama"].target == "10/min"
    assert await limiter.set_target("llama", old)
    assert (await limiter.snapshot(["llama"]))["llama"].target == "99/min"


async def test_a_new_limit_at_once_counts_the_calls_that_are_in_flight_already(limiter: TrafficLimiter):
    await put(limiter, "100/min, burst")
    first, _, third = [await granted(limiter) for _ in range(3)]
    await limiter.release(third)
    await put(limiter, "100/min, 2 at once, burst")
    assert (await refused(limiter)).reason is WaitReason.CONCURRENCY
    await limiter.release(first)
    await granted(limiter)


async def test_a_new_limit_of_tokens_counts_what_was_sent_before(limiter: TrafficLimiter):
    await put(limiter, "100/min, burst")
    await granted(limiter, 70)
    await put(limiter, "100/min, 100 tokens/min, burst")
    await refused(limiter, 31)
    await granted(limiter, 30)


async def test_a_longer_window_knows_what_the_shorter_one_let_through(limiter: TrafficLimiter):
    await put(limiter, "1000/s, burst")
    for _ in range(60):
        await granted(limiter)
    await put(limiter, "50/min, burst")
    assert (await refused(limiter)).reason is WaitReason.WINDOW
    await put(limiter, "61/min, burst")
    await granted(limiter)
    await refused(limiter)


async def test_many_sends_over_many_chunks_are_all_remembered(limiter: TrafficLimiter):
    await put(limiter, "6000/min, burst")
    got = 0
    while (part := await reserve_many(limiter, 250))[0]:
        got += len(part[0])
    assert got == 6000
    assert (await limiter.snapshot(["llama"]))["llama"].sent == {"6000/min": 6000}


async def test_old_chunks_are_dropped(limiter: TrafficLimiter, redis_client: redis.asyncio.Redis):
    await put(limiter, "1000000/s, burst")
    while len(await redis_client.keys("router:*:m:*")) < 12:
        await reserve_many(limiter, 250)
    for number in range(12):
        key = f"router:{{llama}}:m:{number}"
        await redis_client.setrange(key, 125, struct.pack("<1000d", *[1.0] * 1000))  # sent long ago
    for _ in range(8):
        await reserve_many(limiter, 250)
    assert len(await redis_client.keys("router:*:m:*")) <= 7
    await granted(limiter)


async def test_a_rest_holds_for_everyone_until_it_ends(limiter: TrafficLimiter, another: TrafficLimiter):
    await put(limiter, "100/s")
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


async def test_a_model_without_a_target_waits_for_one(limiter: TrafficLimiter, another: TrafficLimiter):
    assert (await refused(limiter)).reason is WaitReason.NO_TARGET
    waiting = asyncio.create_task(limiter.acquire("llama"))
    await asyncio.sleep(0.1)
    await put(another, "10/s")
    await asyncio.wait_for(waiting, 1)


@pytest.mark.parametrize("model", ["", "a b", "{x}", "-x", "é", "x" * 101])
async def test_names_that_are_no_models_are_refused(limiter: TrafficLimiter, model: str):
    with pytest.raises(InputError):
        await limiter.reserve(model)


async def test_the_clock_never_goes_backwards(limiter: TrafficLimiter, redis_client: redis.asyncio.Redis):
    await put(limiter, "2/min, burst")
    await granted(limiter)
    await granted(limiter)
    await _move_back_redis_clock(redis_client, 3600.0)
    wait = await refused(limiter)
    assert 59 < (wait.again_seconds or 0) <= 60.25  # the hour is not waited for, and the window not forgotten


async def _move_back_redis_clock(client: redis.asyncio.Redis, seconds: float) -> None:
    """As seen from the memory: everything in it happened `seconds` later than Redis's clock now says."""
    packed = bytearray(await client.hget("router:{llama}", "now"))
    clock, sent = struct.unpack_from("<d", packed, 8)[0], struct.unpack_from("<d", packed, 40)[0]
    struct.pack_into("<d", packed, 8, clock + seconds * 1e6)
    struct.pack_into("<d", packed, 40, sent + seconds * 1e6)
    await client.hset("router:{llama}", "now", bytes(packed))
    chunk = bytearray(await client.get("router:{llama}:m:0"))
    for number in range(2):
        moment = struct.unpack_from("<d", chunk, 125 + 8 * number)[0]
        struct.pack_into("<d", chunk, 125 + 8 * number, moment + seconds * 1e6)
    await client.set("router:{llama}:m:0", bytes(chunk))


# -- loss of memory --------------------------------------------------------------------------------------


async def test_after_a_flush_a_model_without_history_stands_still_for_its_window(
    limiter: TrafficLimiter, redis_client: redis.asyncio.Redis
):
    await put(limiter, "5/s, burst")
    for _ in range(5):
        await granted(limiter)
    lost_at = time.monotonic()
    await redis_client.flushall()
    wait = await refused(limiter)
    assert wait.reason is WaitReason.REBUILDING
    assert 1.0 < (wait.again_seconds or 0) < 1.5
    await limiter.acquire("llama", timeout_seconds=5)
    assert time.monotonic() - lost_at > 1.35


async def test_setting_a_target_does_not_make_a_lost_model_fresh(
    limiter: TrafficLimiter, redis_client: redis.asyncio.Redis
):
    await put(limiter, "5/min, burst")
    await granted(limiter)
    await redis_client.flushall()
    await put(limiter, "500/min, burst")
    assert (await refused(limiter)).reason is WaitReason.REBUILDING


async def test_a_newcomer_that_starts_blindly_is_found_out_by_whoever_knew_more(
    limiter: TrafficLimiter, another: TrafficLimiter, redis_client: redis.asyncio.Redis
):
    await put(limiter, "5/min, burst")
    await granted(limiter)
    await redis_client.flushall()
    await put(another, "5/min, burst")
    await granted(another)
    assert (await refused(limiter)).reason is WaitReason.REBUILDING
    assert (await refused(another)).reason is WaitReason.REBUILDING


async def test_a_newcomer_does_not_start_a_model_that_others_know_to_be_lost(
    limiter: TrafficLimiter, another: TrafficLimiter, redis_client: redis.asyncio.Redis
):
    await put(limiter, "5/min, burst")
    await granted(limiter)
    await redis_client.flushall()
    assert (await refused(limiter)).reason is WaitReason.REBUILDING
    assert (await refused(another)).reason is WaitReason.REBUILDING


async def test_a_memory_older_than_what_was_seen_is_lost(
    limiter: TrafficLimiter, redis_client: redis.asyncio.Redis
):
    await put(limiter, "50/min, burst")
    await granted(limiter)
    old = await redis_client.hget("router:{llama}", "now")
    await granted(limiter)
    await redis_client.hset("router:{llama}", "now", old)
    assert (await refused(limiter)).reason is WaitReason.REBUILDING


async def test_a_lost_chunk_is_a_lost_memory(limiter: TrafficLimiter, redis_client: redis.asyncio.Redis):
    await put(limiter, "1/min, burst")
    await granted(limiter)
    await redis_client.delete("router:{llama}:m:0")
    assert (await refused(limiter)).reason is WaitReason.REBUILDING


async def test_the_window_is_rebuilt_from_the_history(redis_client: redis.asyncio.Redis):
    asked: list[tuple[str, float]] = []
    calls: list[PastCall] = []

    async def history(model: str, seconds: float) -> list[PastCall]:
        asked.append((model, seconds))
        return calls

    async with TrafficLimiter(redis_client, history) as limiter:
        await put(limiter, "5/min, 100 tokens/min, 3 at once, burst")
        await granted(limiter)  # the log says that there was nothing: it starts at once
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
        assert asked[-1][0] == "llama"
        assert asked[-1][1] >= 60.25
        now = (await limiter.snapshot(["llama"]))["llama"]
        assert (now.sent, now.tokens, now.in_flight) == ({"5/min": 5}, {"100 tokens/min": 100}, 3)
        assert (await refused(limiter)).reason is WaitReason.CONCURRENCY


async def test_a_history_that_fails_grants_nothing(redis_client: redis.asyncio.Redis):
    async def history(model: str, seconds: float) -> list[PastCall]:
        raise OSError("no log")

    async with TrafficLimiter(redis_client, history) as limiter:
        await put(limiter, "5/min")
        with pytest.raises(LimiterUnavailable, match="no log"):
            await limiter.reserve("llama")


async def test_nothing_is_sent_while_redis_is_away_and_the_line_goes_on_by_itself(tmp_path: Path):
    server = start_redis(tmp_path)
    client = redis.asyncio.Redis.from_url(server.url, retry=None, socket_timeout=1)
    try:
        async with TrafficLimiter(client) as limiter:
            await put(limiter, "5/s, burst")
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
            assert time.monotonic() - back_at > 1.0  # a new Redis knows nothing of the last second
    finally:
        await client.aclose()
        server.stop()


async def test_a_restart_that_brings_back_an_older_copy_is_found_out(tmp_path: Path):
    server = start_redis(tmp_path)
    client = redis.asyncio.Redis.from_url(server.url)
    try:
        async with TrafficLimiter(client) as limiter:
            await put(limiter, "5/min, burst")
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


async def test_a_client_that_decodes_replies_serves_as_well(redis_server: RedisServer):
    client = redis.asyncio.Redis.from_url(redis_server.url, decode_responses=True)
    await client.flushall()
    async with TrafficLimiter(client) as limiter:
        await put(limiter, "5/s")
        await limiter.release(await limiter.acquire("llama"))
        waiting = asyncio.create_task(limiter.wait_until_available("llama"))
        await asyncio.wait_for(waiting, 1)
        now = (await limiter.snapshot(["llama"]))["llama"]
        assert (now.target, now.sent) == ("5/s", {"5/s": 1})
    await client.aclose()
