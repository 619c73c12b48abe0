"""Failover and errors of Redis, rights in Redis, many models: sending goes on over new connections."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import redis.asyncio

from local.redis import RedisServer, start_redis
from router.errors import LimiterUnavailable
from router.limiter import LimiterSettings, PastCall, Permit, TrafficLimiter
from router.limiter import redis_client as client_of
from router.task import Outcome
from tests.support.limiter.failing_link import FailingLink

SETTINGS = LimiterSettings(max_call_seconds=60)
RESUMES_SECONDS = 10.0
ERRORS = {
    "READONLY You can't write against a read only replica.": "read_only",
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.": "read_only",
    "LOADING Redis is loading the dataset in memory": "loading",
    "NOREPLICAS Not enough good replicas to write.": "read_only",
    "MISCONF Redis is configured to save RDB snapshots": "read_only",
    "CLUSTERDOWN The cluster is down": "failing",
    "TRYAGAIN Multiple keys request during rehashing of slot": "failing",
    "MOVED 3999 127.0.0.1:1": "failing",
    "UNBLOCKED force unblock from blocking operation, instance state changed": "failing",
    "NOSCRIPT No matching script. Please use EVAL.": "failing",
    "ERR Error running script: @user_script: 1: -READONLY You can't write": "read_only",
    "ERR an error that nobody knows yet": "failing",
}
Action = Callable[[TrafficLimiter, Permit], Awaitable[object]]
ACTIONS: dict[str, Action] = {
    "reserve": lambda limiter, _: limiter.reserve("llama"),
    "release": lambda limiter, permit: limiter.release(permit),
    "report": lambda limiter, _: limiter.record_outcome("llama", Outcome.ERROR),
    "set_target": lambda limiter, _: limiter.set_target("llama", "900/s, burst"),
    "snapshot": lambda limiter, _: limiter.snapshot(["llama"]),
}


async def no_calls(_model: str, _seconds: float) -> list[PastCall]:
    return []


@pytest.fixture
async def link(redis_server: RedisServer, redis_client: redis.asyncio.Redis) -> AsyncIterator[FailingLink]:
    relay = FailingLink(redis_server.port)
    yield relay
    await relay.stop()


async def until_it_works(action: Callable[[], Awaitable[object]], causes: list[str]) -> None:
    until = time.monotonic() + RESUMES_SECONDS
    while True:
        try:
            await action()
        except LimiterUnavailable as error:
            causes.append(error.cause)
        else:
            return
        assert time.monotonic() < until, causes
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.split()[0] + error[-4:])
async def test_connections_that_reply_with_an_error_are_given_up(link: FailingLink, error: str) -> None:
    """All verbs of the script, each after the server behind its connection changed."""
    client = client_of(f"redis://127.0.0.1:{await link.start()}/0", seconds=2)
    async with TrafficLimiter(client, no_calls, settings=SETTINGS) as limiter:
        await limiter.set_target("llama", "1000/s, burst")
        for name, action in ACTIONS.items():
            permit = await limiter.acquire("llama")
            causes: list[str] = []
            link.fail(error)
            await until_it_works(lambda action=action, permit=permit: action(limiter, permit), causes)
            assert set(causes) <= {ERRORS[error]}, name
            assert len(causes) <= 3, name
        await until_it_works(lambda: limiter.reserve("llama"), [])
        assert limiter.outage is None
    await client.aclose()


async def test_notifications_arrive_after_connections_were_given_up(link: FailingLink) -> None:
    client = client_of(f"redis://127.0.0.1:{await link.start()}/0", seconds=2)
    async with TrafficLimiter(client, no_calls, settings=SETTINGS) as limiter:
        await limiter.set_target("llama", "1000/s, burst")
        await limiter.acquire("llama")
        link.fail("READONLY You can't write against a read only replica.")
        await until_it_works(lambda: limiter.reserve("llama"), [])
        async with TrafficLimiter(client, no_calls, settings=SETTINGS) as another:
            held = await limiter.acquire("llama")
            await limiter.set_target("llama", "1 at once")
            await asyncio.sleep(2.1)  # the listener has noticed that connections were given up
            began = time.monotonic()
            waiting = asyncio.create_task(limiter.acquire("llama"))
            await asyncio.sleep(0.2)
            await another.release(held)
            for _ in range(3):
                await another.set_target("llama", "1000/s, burst")
            await asyncio.wait_for(waiting, 3)
            assert time.monotonic() - began < 1, "a notification over the new connection wakes the waiter"
    await client.aclose()


async def test_demoted_server_with_open_connections_is_left(tmp_path: Path) -> None:
    """The old primary becomes a replica and keeps its connections; new ones reach the new primary."""
    old, new = start_redis(tmp_path / "old"), start_redis(tmp_path / "new")
    link = FailingLink(old.port)
    client = client_of(f"redis://127.0.0.1:{await link.start()}/0", seconds=2)
    try:
        async with TrafficLimiter(client, no_calls, settings=SETTINGS) as limiter:
            await limiter.set_target("llama", "100/s")
            await limiter.acquire("llama")
            demoting = redis.asyncio.Redis.from_url(old.url)
            await demoting.replicaof("127.0.0.1", str(new.port))
            with pytest.raises(LimiterUnavailable, match="read-only") as refused:
                await limiter.reserve("llama")
            assert refused.value.cause == "read_only"
            assert limiter.outage is not None
            with pytest.raises(LimiterUnavailable):
                await limiter.snapshot(["llama"])  # reads alone would succeed
            link._port = new.port
            await limiter.acquire("llama", timeout_seconds=RESUMES_SECONDS)
            await demoting.aclose()
    finally:
        await client.aclose()
        await link.stop()
        old.stop()
        new.stop()


def documented_acl() -> list[str]:
    text = (Path(__file__).parents[3] / "docs" / "limiter.md").read_text(encoding="utf-8")
    found = re.search(r"^ACL SETUSER (.+)$", text, re.MULTILINE)
    assert found is not None
    return found.group(1).split()


@pytest.mark.parametrize("channel", [True, False], ids=["all rights", "no channel"])
async def test_documented_acl_suffices(
    redis_server: RedisServer,
    redis_client: redis.asyncio.Redis,
    channel: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = [word for word in documented_acl() if channel or not word.startswith("&")]
    await redis_client.execute_command("ACL SETUSER", *words)
    user = redis.asyncio.Redis.from_url(f"redis://router:password@127.0.0.1:{redis_server.port}/0")
    began = time.monotonic()
    async with TrafficLimiter(user, no_calls, settings=SETTINGS) as limiter:
        for line in ("50/s, 900 tokens/s, 2 at once", "40/s, 800 tokens/min, 3 at once, burst"):
            await limiter.set_target("llama", line)
            permits = [await limiter.acquire("llama", 10) for _ in range(2)]
            await limiter.cancel(permits[0])
            await limiter.release(permits[1], 5)
        await limiter.record_outcome("llama", Outcome.RATE_LIMITED, 0.05)
        await limiter.cool_down("llama", 0, "over")
        for _ in range(5):
            await limiter.record_outcome("llama", Outcome.ERROR)
        await limiter.cool_down("llama", 0, "over")
        await redis_client.flushall()
        await limiter.acquire("llama", 10, timeout_seconds=3)
        await limiter.check_writable()
        assert (await limiter.snapshot(["llama"]))["llama"].target == line
    assert time.monotonic() - began < 4, "a refused channel delays nothing"
    assert ("refuses the channel" in caplog.text) is not channel
    await user.aclose()
    await redis_client.execute_command("ACL DELUSER", "router")


async def test_more_models_than_connections(
    redis_server: RedisServer, redis_client: redis.asyncio.Redis
) -> None:
    client = client_of(redis_server.url, connections=8)
    models = [f"model-{number}" for number in range(150)]
    async with TrafficLimiter(client, no_calls, settings=SETTINGS) as limiter:
        await asyncio.gather(*[limiter.set_target(model, "100/s, burst") for model in models])
        permits = await asyncio.gather(*[limiter.acquire(model) for model in models * 3])
        await asyncio.gather(*[limiter.release(permit) for permit in permits])
        assert limiter.outage is None
    await client.aclose()


async def test_redis_that_hangs_leaves_no_unretrieved_exception(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_redis(tmp_path)
    client = client_of(server.url, seconds=0.3)
    caplog.set_level(logging.ERROR)
    try:
        async with TrafficLimiter(client, no_calls, settings=SETTINGS) as limiter:
            await limiter.set_target("llama", "100/s")
            permit = await limiter.acquire("llama")
            server.process.send_signal(signal.SIGSTOP)
            waiting = [asyncio.create_task(limiter.acquire("llama")) for _ in range(3)]
            reading = asyncio.create_task(limiter.shared_snapshot("llama"))
            ending = asyncio.create_task(limiter.release(permit))
            await asyncio.sleep(0.1)
            for task in (*waiting[:2], reading, ending):
                task.cancel()
            await asyncio.sleep(0.8)
            assert limiter.outage is not None
            assert limiter.outage.cause == "hung"
            server.process.send_signal(signal.SIGCONT)
            await asyncio.wait_for(waiting[2], 5)
            waiting.clear()
    finally:
        server.process.send_signal(signal.SIGCONT)
        await client.aclose()
        server.stop()
    gc.collect()
    await asyncio.sleep(0)
    assert "never retrieved" not in caplog.text
