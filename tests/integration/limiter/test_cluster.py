"""The limiter on a real Redis in cluster mode."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import redis.asyncio
from redis.asyncio.cluster import ClusterNode

from local.redis import start_redis
from models_backend.process import free_port
from router.errors import InputError
from router.limiter import PastCall, Permit, TrafficLimiter, Wait, WaitReason
from router.task import Outcome

MODELS = ["llama", "gemma-2", "phi.4", "qwen_2.5"]  # in different slots


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[redis.asyncio.RedisCluster]:
    arguments = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    server = start_redis(tmp_path, arguments=arguments)
    alone = redis.asyncio.Redis.from_url(server.url)
    await alone.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
    while b"cluster_state:ok" not in await alone.execute_command("CLUSTER", "INFO", NEVER_DECODE=True):
        await asyncio.sleep(0.02)
    await alone.aclose()
    client = redis.asyncio.RedisCluster(startup_nodes=[ClusterNode("127.0.0.1", server.port)])
    try:
        yield client
    finally:
        await client.aclose()
        server.stop()


async def no_calls(_model: str, _seconds: float) -> list[PastCall]:
    return []


async def test_limiter_works_on_a_cluster(cluster: redis.asyncio.RedisCluster):
    async with TrafficLimiter(cluster, no_calls) as limiter, TrafficLimiter(cluster, no_calls) as another:
        for model in MODELS:
            await limiter.set_target(model, "100/min, 900 tokens/min, 2 at once, burst")
            first, second = await limiter.acquire(model, 100), await another.acquire(model, 50)
            waiting = asyncio.create_task(limiter.acquire(model, 10))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            await another.release(second, 20)
            await asyncio.wait_for(waiting, 2)  # notified over the cluster's pub/sub
            await limiter.cancel(first)
            await limiter.record_outcome(model, Outcome.RATE_LIMITED, 1.0)
            refused = await another.reserve(model)
            assert isinstance(refused, Wait)
            assert refused.reason is WaitReason.COOLING_DOWN
        assert (await another.snapshot(MODELS))["llama"].tokens == {"900 tokens/min": 30}
        await cluster.flushall()
        for model in MODELS:
            await limiter.acquire(model, timeout_seconds=3)
        assert isinstance(await another.reserve(MODELS[0]), Permit)


async def test_client_limits_work_on_a_cluster_in_one_slot(cluster: redis.asyncio.RedisCluster):
    async with TrafficLimiter(cluster, no_calls, client_history=no_calls, one_slot=True) as limiter:
        await limiter.set_client_limit("alice", "3/min, $1/day")
        for model in MODELS:
            await limiter.set_target(model, "100/min, burst")
        for model in MODELS[:3]:
            permit = await limiter.acquire(model, cost=400_000, client="alice", timeout_seconds=3)
            await limiter.release(permit, cost=200_000)
        denied = await limiter.reserve(MODELS[3], client="alice")
        assert isinstance(denied, Wait)
        assert denied.client == "alice"
        assert await limiter.reserve(MODELS[3], client="bob")
        assert (await limiter.snapshot_clients(["alice"]))["alice"].money == {"$1/d": 600_000}


async def test_client_limits_on_a_cluster_are_refused_in_several_slots(cluster: redis.asyncio.RedisCluster):
    async with TrafficLimiter(cluster, no_calls) as limiter:
        with pytest.raises(InputError, match="one_slot"):
            await limiter.set_client_limit("alice", "3/min")
