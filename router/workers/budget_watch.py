"""Logs each budget of a model or client that reaches 80 and 100 %, once until it is below again."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Protocol

from router.limiter import ModelTraffic, TrafficLimiter, level_reached, use_text
from router.settings import RouterConfig
from router.traffic import MoneyLimit, TrafficTarget
from router.workers.pull_loop import PullPlan

log = logging.getLogger("router.workers.budgets")

STEP_SECONDS = 10.0
MAX_CLIENTS = 200  # of the config, that one step reads


class BudgetHost(Protocol):
    """The part of `Engine` that the watch uses."""

    limiter: TrafficLimiter
    config: RouterConfig
    plan: PullPlan


class BudgetWatch:
    """Periodic job: `step` reads the budgets from the limiter."""

    def __init__(self, host: BudgetHost) -> None:
        self._host = host
        self._levels: dict[tuple[str, str], int] = {}

    async def step(self) -> None:
        """Logs the budgets that reached a level since the last step. Raises LimiterUnavailable."""
        host = self._host
        models = [name for name, target in host.plan.targets.items() if target.money]
        clients = [name for name, one in host.config.clients.items() if one.limit and "$" in one.limit]
        found = {f"model {name}": one for name, one in (await host.limiter.snapshot(models)).items()}
        if clients:
            read = await host.limiter.snapshot_clients(clients[:MAX_CLIENTS])
            found |= {f"client {name}": one for name, one in read.items()}
        for who, limit, used in _budgets(found):
            level, key = level_reached(limit, used), (who, str(limit))
            if level > self._levels.get(key, 0):
                log.warning("budget of %s: %s", who, use_text(limit, used))
            self._levels[key] = level


def _budgets(found: Mapping[str, ModelTraffic]) -> Iterator[tuple[str, MoneyLimit, int]]:
    for who, traffic in found.items():
        limits = TrafficTarget.parse(traffic.target).money if traffic.target else ()
        for limit in limits:
            yield who, limit, traffic.money.get(str(limit), 0)
