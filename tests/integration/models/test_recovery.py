"""A Redis that lost its state is restored from Postgres: newest target, windows, calls in flight."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import asyncpg
import pytest
import redis.asyncio

from router.database import open_pool
from router.limiter import LimiterSettings, TrafficLimiter, Wait, WaitReason
from router.models import CallRequest
from router.models.dispatch import availability
from router.models.services import call_ends, past_calls
from router.models.targets import TargetSync, newest_target
from router.task import CallResult, Outcome

MODEL = "phi-4"
SETTINGS = LimiterSettings(max_call_seconds=60)
RESUMES_SECONDS = 2.0


@pytest.fixture
async def pool(database: str) -> AsyncIterator[asyncpg.Pool]:
    opened = await open_pool(database, connections=3)
    yield opened
    await opened.close()


@pytest.fixture
async def process(pool: asyncpg.Pool, redis_client: redis.asyncio.Redis) -> AsyncIterator[TrafficLimiter]:
    async with limiter_of(pool, redis_client) as opened:
        yield opened


@pytest.fixture
async def another(pool: asyncpg.Pool, redis_client: redis.asyncio.Redis) -> AsyncIterator[TrafficLimiter]:
    async with limiter_of(pool, redis_client) as opened:
        yield opened


def limiter_of(pool: asyncpg.Pool, client: redis.asyncio.Redis) -> TrafficLimiter:
    return TrafficLimiter(
        client, partial(past_calls, pool), call_ends=partial(call_ends, pool),
        stored_target=partial(newest_target, pool), settings=SETTINGS,
    )  # fmt: skip


async def logged(pool: asyncpg.Pool) -> uuid.UUID:
    """Logs a call that is not sent yet."""
    call_id: uuid.UUID = await pool.fetchval("SELECT first_call_id(clock_timestamp())")
    call_id = uuid.UUID(bytes=call_id.bytes[:8] + uuid.uuid4().bytes[8:])
    await pool.execute("SELECT begin_call($1, $2, 'general', 'trial', 'w', 10)", call_id, MODEL)
    return call_id


async def end(pool: asyncpg.Pool, call_id: uuid.UUID, outcome: str) -> None:
    statement = "SELECT end_call($1, $2, 3, 4, NULL, 0.1, NULL, $3, 'general', 'trial', 'w', 10)"
    await pool.execute(statement, call_id, outcome, MODEL)


@pytest.mark.parametrize("newest", ["0", "1/min"])
async def test_first_process_to_ask_after_a_loss_restores_the_newest_target(
    pool: asyncpg.Pool, redis_client: redis.asyncio.Redis, process: TrafficLimiter, another: TrafficLimiter,
    newest: str,
) -> None:  # fmt: skip
    """Another process applied a newer target, which this one has not seen."""
    for limiter, line, version in ((process, "600/min, burst", 1_000), (another, newest, 2_000)):
        await TargetSync(pool, limiter).apply({MODEL: line}, version=version)
        await limiter.reserve(MODEL)
        await redis_client.flushall()
    assert (await process.shared_snapshot(MODEL)).target == newest
    await redis_client.flushall()
    until = time.monotonic() + 0.6
    granted = 0
    while time.monotonic() < until:
        granted += bool(await process.reserve(MODEL))
    assert granted <= (0 if newest == "0" else 1)
    assert (await another.snapshot([MODEL]))[MODEL].target == newest


async def test_reasserted_target_is_the_newest(
    pool: asyncpg.Pool, process: TrafficLimiter, another: TrafficLimiter, redis_client: redis.asyncio.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    older, newer = TargetSync(pool, process), TargetSync(pool, another)
    await older.apply({MODEL: "600/min"}, version=1_000)
    await newer.apply({MODEL: "0"}, version=2_000)
    await redis_client.flushall()
    monkeypatch.setattr("router.models.targets.REASSERT_SECONDS", -1.0)
    await older.apply({MODEL: None}, version=3_000)
    assert (await process.snapshot([MODEL]))[MODEL].target == "0"


async def test_lost_target_is_no_reason_to_give_up(
    pool: asyncpg.Pool, process: TrafficLimiter, redis_client: redis.asyncio.Redis
) -> None:
    await TargetSync(pool, process).apply({MODEL: "600/min, burst"}, version=1_000)
    await process.acquire(MODEL)
    await redis_client.flushall()
    assert (await availability(process, MODEL)).seconds == 0.0
    await process.acquire(MODEL, timeout_seconds=RESUMES_SECONDS)


async def test_logged_calls_that_were_not_sent_take_no_slots(
    pool: asyncpg.Pool, process: TrafficLimiter, another: TrafficLimiter, redis_client: redis.asyncio.Redis
) -> None:
    """Of two processes with waiting calls and one that has given up, with a single slot."""
    await TargetSync(pool, process).apply({MODEL: "600/min, burst, 1 at once"}, version=1_000)
    held = await process.acquire(MODEL)
    gave_up = await logged(pool)
    waiting = [
        asyncio.create_task(limiter.acquire(MODEL, call_id=await logged(pool)))
        for limiter in (process, another)
    ]
    await asyncio.sleep(0.1)
    await redis_client.flushall()
    lost_at = time.monotonic()
    done, _ = await asyncio.wait(waiting, timeout=0.5)
    assert not done
    await end(pool, gave_up, "unsent")
    done, left = await asyncio.wait(waiting, timeout=3, return_when=asyncio.FIRST_COMPLETED)
    assert len(done) == 1
    assert time.monotonic() - lost_at < RESUMES_SECONDS + 1
    first = done.pop().result()
    assert not (await asyncio.wait(left, timeout=0.3))[0], "the slot is granted twice"
    await process.release(first)
    await process.release(held)
    await asyncio.wait_for(left.pop(), 3)


@pytest.mark.parametrize("seen_by", ["its process", "the call log"])
async def test_end_of_a_call_from_before_a_loss_frees_its_slot(
    pool: asyncpg.Pool, process: TrafficLimiter, another: TrafficLimiter, redis_client: redis.asyncio.Redis,
    seen_by: str,
) -> None:  # fmt: skip
    await TargetSync(pool, process).apply({MODEL: "600/min, burst, 1 at once"}, version=1_000)
    call_id = await logged(pool)
    permit = await process.acquire(MODEL, call_id=call_id)
    await redis_client.flushall()
    waiting = asyncio.create_task(another.acquire(MODEL))
    await asyncio.sleep(1.0)
    assert not waiting.done(), "a call in flight is forgotten"
    if seen_by == "its process":
        await process.release(permit)
    else:
        await end(pool, call_id, "answered")
    await asyncio.wait_for(waiting, 5)


@pytest.mark.parametrize("minutes", [1, 20, 59, 100])
async def test_call_sent_long_after_it_was_logged_counts(pool: asyncpg.Pool, minutes: int) -> None:
    await pool.execute(
        "INSERT INTO model_calls (call_id, model, sent_at, finished_at, outcome)"
        " SELECT first_call_id(clock_timestamp() - make_interval(mins => $1)), $2,"
        " clock_timestamp() - interval '5 s', clock_timestamp(), 'answered'",
        minutes, MODEL,
    )  # fmt: skip
    assert len(await past_calls(pool, MODEL, 61.0)) == 1


async def test_longer_window_is_rebuilt_from_the_call_log(
    pool: asyncpg.Pool, process: TrafficLimiter
) -> None:
    targets = TargetSync(pool, process)
    await targets.apply({MODEL: "80/min, burst"}, version=1_000)
    for _ in range(3):
        call_id = await logged(pool)
        permit = await process.acquire(MODEL, call_id=call_id)
        await end(pool, call_id, "answered")
        await process.release(permit)
    await targets.apply({MODEL: "80/min, 5/d, burst"}, version=2_000)
    began = time.monotonic()
    for _ in range(2):
        await process.acquire(MODEL, timeout_seconds=RESUMES_SECONDS)
    assert time.monotonic() - began < RESUMES_SECONDS
    wait = await process.reserve(MODEL)
    assert isinstance(wait, Wait)
    assert wait.reason is WaitReason.WINDOW


PRICED = "UPDATE roster SET max_tokens = 100, input_price = 2.5, output_price = 10 WHERE model = $1"
RESERVED = 400 * 2.5 + 100 * 10  # of 500 tokens, at most 100 of them in the answer


@pytest.mark.parametrize(
    ("outcome", "usage", "expected"),
    [
        ("answered", {"cost_usd": 0.0012345}, 1235),
        ("answered", {"prompt_tokens": 101, "completion_tokens": 3}, 283),
        ("answered", {}, RESERVED),
        ("garbage", {}, RESERVED),
        ("rate_limited", {}, 0),
        ("rejected", {}, 0),
        ("error", {"cost_usd": 0.5}, 500_000),
        ("timeout", {}, RESERVED),
        ("lost", {}, RESERVED),
        ("unavailable", {}, RESERVED),
    ],
)
async def test_log_and_limiter_agree_on_the_cost_of_a_call(
    pool: asyncpg.Pool, outcome: str, usage: dict[str, Any], expected: float
) -> None:
    await pool.execute(PRICED, MODEL)
    call_id = await logged(pool)
    await pool.execute("UPDATE model_calls SET reserved_tokens = 500 WHERE call_id = $1", call_id)
    assert [call.cost for call in await past_calls(pool, MODEL, 60.0)] == [RESERVED], "while it is in flight"
    unknown = outcome in {"timeout", "lost", "unavailable"}
    error = "the connection to the backend broke" if unknown else "refused"
    await pool.execute(
        "SELECT end_call($1, $2, $3, $4, $5, 0.1, $6, $7, 'general', 'trial', 'w', 500)", call_id, outcome,
        usage.get("prompt_tokens"), usage.get("completion_tokens"), usage.get("cost_usd"), error, MODEL,
    )  # fmt: skip
    (call,) = await past_calls(pool, MODEL, 60.0)
    request = CallRequest(
        call_id, MODEL, MODEL, "", 100, 500, 60.0, input_price=2.5, output_price=10.0
    )  # fmt: skip
    spent = request.cost_of(CallResult(Outcome(outcome), may_go_on=unknown, **usage))
    assert call.cost == expected
    assert (request.reserved_cost if spent is None else spent) == expected
    ended = await call_ends(pool, [call_id])
    assert [one.cost for one in ended] == ([] if unknown else [spent])


async def test_budget_is_rebuilt_from_the_costs_in_the_call_log(
    pool: asyncpg.Pool, process: TrafficLimiter, redis_client: redis.asyncio.Redis
) -> None:
    await pool.execute(PRICED, MODEL)
    await TargetSync(pool, process).apply({MODEL: "$0.01/day, burst"}, version=1_000)
    for _ in range(3):
        call_id = await logged(pool)
        permit = await process.acquire(MODEL, cost=3_000, call_id=call_id)
        await pool.execute(
            "SELECT end_call($1, 'answered', 3, 4, 0.003, 0.1, NULL, $2, 'general', 'trial', 'w', 10)",
            call_id,
            MODEL,
        )
        await process.release(permit, cost=3_000)
    await redis_client.flushall()
    await process.acquire(MODEL, cost=1_000, timeout_seconds=RESUMES_SECONDS)
    assert (await process.snapshot([MODEL]))[MODEL].money == {"$0.01/d": 10_000}
    denied = await process.reserve(MODEL, cost=1)
    assert isinstance(denied, Wait)
    assert denied.reason is WaitReason.BUDGET


async def test_budget_of_a_model_without_a_price_is_refused(
    pool: asyncpg.Pool, process: TrafficLimiter
) -> None:
    await pool.execute(PRICED, MODEL)
    await pool.execute("UPDATE roster SET input_price = 0, output_price = 0")
    targets = TargetSync(pool, process)
    await targets.apply({MODEL: "60/min"}, version=1_000)
    await targets.apply({MODEL: "60/min, $5/day"}, version=2_000)
    assert "has no price" in targets.errors[MODEL]
    assert (await process.snapshot([MODEL]))[MODEL].target == "60/min"
