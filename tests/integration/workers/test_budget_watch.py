"""A budget that reaches 80 and 100 % is logged once for each level, for models and clients."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import pytest
import redis.asyncio

from router.limiter import PastCall, Permit, TrafficLimiter
from router.settings import RouterConfig
from router.settings.clients import ClientSettings
from router.traffic import TrafficTarget
from router.workers.budget_watch import BudgetWatch
from router.workers.pull_loop import PullPlan

TARGET = "100000/s, $1/day, burst"


@dataclass
class Host:
    limiter: TrafficLimiter
    config: RouterConfig
    plan: PullPlan


async def no_calls(_name: str, _seconds: float) -> list[PastCall]:
    return []


async def test_each_level_is_logged_once(
    redis_client: redis.asyncio.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="router.workers.budgets")
    async with TrafficLimiter(redis_client, no_calls, client_history=no_calls) as limiter:
        await limiter.set_target("m", TARGET)
        await limiter.set_client_limit("alice", "$1/day")
        config = RouterConfig(
            models={}, clients={"alice": ClientSettings(limit="$1/day"), "bob": ClientSettings(weight=2)}
        )
        watch = BudgetWatch(Host(limiter, config, PullPlan(targets={"m": TrafficTarget.parse(TARGET)})))

        async def spend(cost: int, **client: Any) -> Permit:
            permit = await limiter.reserve("m", cost=cost, **client)
            assert isinstance(permit, Permit)
            await watch.step()
            await watch.step()
            return permit

        await spend(700_000)
        assert not caplog.messages
        spent = await spend(110_000, client="alice")
        assert caplog.messages == ["budget of model m: $0.81 of $1/d used (81 %)"]
        await limiter.release(spent, cost=0)
        await watch.step()
        await spend(300_000, client="alice")
        assert caplog.messages[1:] == ["budget of model m: $1.00 of $1/d used (100 %)"]
        assert (await limiter.snapshot(["m"]))["m"].budget_warnings == ("budget: $1.00 of $1/d used (100 %)",)


async def test_the_budget_of_a_client_is_logged(
    redis_client: redis.asyncio.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    async with TrafficLimiter(redis_client, no_calls, client_history=no_calls) as limiter:
        await limiter.set_target("m", "100000/s, burst")
        await limiter.set_client_limit("alice", "$1/day")
        config = RouterConfig(models={}, clients={"alice": ClientSettings(limit="$1/day")})
        watch = BudgetWatch(Host(limiter, config, PullPlan()))
        assert await limiter.reserve("m", cost=1_000_000, client="alice")
        await watch.step()
    assert "budget of client alice: $1.00 of $1/d used (100 %)" in caplog.messages
