"""Budgets of models and clients over simulated days: prices, changed budgets, a Redis that is emptied twice.

Only time is simulated: the script runs on a real Redis, and the judge audits every rolling day. The number of
calls is a parameter: a day of a busy model is no longer than one of an idle model.

    python -m tests.integration.limiter.test_budgets 1000000
"""

from __future__ import annotations

import asyncio
import heapq
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bench.judge import Arrival, TargetChange, judge
from local.redis import RedisServer, start_redis
from router.limiter import LimiterSettings, PastCall, Permit, TrafficLimiter
from router.limiter.limiter import SCRIPT
from router.traffic import TrafficTarget
from tests.support.limiter.redis import Connection, ScriptRedis, with_our_clock

MICRO = 1_000_000
EPOCH = 1_709_164_800 * MICRO  # midnight UTC, two days before a March of a leap year
DAY = 86_400.0
MODEL = "m"
SETTINGS = LimiterSettings(max_call_seconds=120.0)
CLIENTS = {
    "alice": "$7/d",
    "bob": "$4/calendar day",
    "carol": "20/h, $30/d",
    "dave": "3 at once, $5/d, $12/calendar month",
}
CALLS_OF_CLIENTS = 16_000  # about, where a call costs at most $0.02; more calls cost less each
BATCH = 100
DAYS, EMPTIED_AFTER_DAYS = 5.9, (1.2, 4.1)


@dataclass
class Simulation:
    """Endless backlog of one model; each client's calls, or those of nobody, wait in turn."""

    connection: Connection
    budgets: list[tuple[float, str]]  # from a time on (seconds), the model's target
    clients: dict[str, str]
    price: int  # most of a call, in millionths of a dollar
    now: int = 0
    calls: list[Arrival] = field(default_factory=list)
    ends: list[tuple[int, int, Permit, int]] = field(default_factory=list)  # heap, by end
    log: dict[str, list[list[Any]]] = field(default_factory=dict)  # client -> [sent at, cost, open]

    def __post_init__(self) -> None:
        self.chance = random.Random(7)
        self.redis = ScriptRedis(self.connection, lambda: EPOCH + self.now, lambda: self.now, lambda: None)
        client: Any = self.redis
        self.limiter = TrafficLimiter(
            client, self._of_model, client_history=self._of_client, settings=SETTINGS,
            clock=lambda: self.now / MICRO,
        )  # fmt: skip
        self.limiter._script.text = with_our_clock(SCRIPT)
        self.changes = [TargetChange(at, MODEL, TrafficTarget.parse(line)) for at, line in self.budgets]
        self.rows: list[list[Any]] = []
        self.open_rows: dict[int, list[Any]] = {}

    async def _of_model(self, _model: str, seconds: float) -> list[PastCall]:
        return self._past(self.rows, seconds)

    async def _of_client(self, client: str, seconds: float) -> list[PastCall]:
        return self._past(self.log.get(client, []), seconds)

    def _past(self, rows: list[list[Any]], seconds: float) -> list[PastCall]:
        first = self.now - seconds * MICRO
        return [
            PastCall((self.now - at) / MICRO, 0, is_open, None, cost)
            for at, cost, is_open in rows
            if at > first
        ]

    async def run(self) -> None:
        """Lets DAYS pass; Redis is emptied twice."""
        self.connection.ask(("FLUSHALL",))
        left, losses = list(self.budgets), [round(days * DAY * MICRO) for days in EMPTIED_AFTER_DAYS]
        for client, limit in self.clients.items():
            await self.limiter.set_client_limit(client, limit)
        while self.now < DAYS * DAY * MICRO:
            while left and left[0][0] * MICRO <= self.now:
                await self.limiter.set_target(MODEL, left.pop(0)[1])
            if losses and self.now >= losses[0]:
                losses.pop(0)
                self.connection.ask(("FLUSHALL",))
                self.redis._clock_set_to = -1
            await self._end_calls()
            again = [await self._ask(client) for client in (self.clients or {"": ""})]
            if all(one > 0 for one in again):
                following = [self.now + max(1, round(min(again) * MICRO))]
                following += [self.ends[0][0]] if self.ends else []
                following += [round(left[0][0] * MICRO)] if left else []
                following += losses[:1]
                self.now = max(self.now + 1, min(following))

    async def _ask(self, client: str) -> float:
        """Asks for as many permits as fit; returns the seconds until more may."""
        needs = tuple(part for _ in range(BATCH) for part in (0, self._reserved()))
        state = await self.limiter._clients.state(client) if client else None
        permits, wait = await self.limiter._reservations.reserve_many(
            self.limiter._tracker.state(MODEL), needs, client=state
        )
        for permit in permits:
            self._send(permit, client)
        if len(permits) == BATCH:
            return 0.0
        again = 60.0 if wait.again_seconds is None else wait.again_seconds
        return max(0.001, again - SETTINGS.look_ahead_seconds)

    def _reserved(self) -> int:
        return self.chance.randint(self.price // 4, self.price)

    def _send(self, permit: Permit, client: str) -> None:
        at = max(self.now, round(permit.send_at * MICRO))
        latency, cost = self.chance.randint(1, 60) * MICRO, self.chance.randint(0, permit.cost)
        row = [at, permit.cost, True]
        self.rows.append(row)
        self.log.setdefault(client, []).append(row)
        self.calls.append(
            Arrival(
                at / MICRO,
                (at + latency) / MICRO,
                client or MODEL,
                str(len(self.calls)),
                cost_reserved=permit.cost,
                cost_used=cost,
            )
        )
        heapq.heappush(self.ends, (at + latency, len(self.calls), permit, cost))
        self.open_rows[len(self.calls)] = row

    async def _end_calls(self) -> None:
        ended = []
        while self.ends and self.ends[0][0] <= self.now:
            _, number, permit, cost = heapq.heappop(self.ends)
            row = self.open_rows.pop(number)
            row[1], row[2] = cost, False
            ended.append(self.limiter.release(permit, 0, cost))
        for first in range(0, len(ended), 500):
            await asyncio.gather(*ended[first : first + 500])

    def verdict(self, model: str, changes: list[TargetChange]) -> Any:
        """Judges the calls of a client, or of the model without clients."""
        arrivals = [call._replace(model=model) for call in self.calls if model in {call.model, MODEL}]
        return judge(
            arrivals, [change._replace(model=model) for change in changes], backlog_from=0.0,
            backlog_until=DAYS * DAY, settle_seconds=1.0, utc_offset_seconds=EPOCH / MICRO,
        ).models[model]  # fmt: skip


@pytest.fixture(scope="module")
def connection(redis_server: RedisServer) -> Iterator[Connection]:
    opened = Connection(redis_server)
    yield opened
    opened.close()


def budgets_of_a_model(connection: Connection, count: int) -> Simulation:
    """A day's budget has room for a sixth of the calls; it is changed five times, once to nothing."""
    price = 10_000
    daily = count / 5 * price * 0.3125 / MICRO  # a call costs 0.3125 of the price on average
    factors = ((0, 1.0), (1.5, 0.5), (2.25, 2.0), (3.0, 0.0), (3.5, 1.0), (4.5, 0.7))
    budgets = [
        (
            days * DAY,
            f"${daily * factor:.2f}/d, ${daily * 9:.2f}/calendar month, 2000/s, burst" if factor else "0",
        )
        for days, factor in factors
    ]
    simulation = Simulation(connection, budgets, {}, price)
    asyncio.run(simulation.run())
    return simulation


def budgets_of_clients(connection: Connection, count: int) -> Simulation:
    simulation = Simulation(
        connection, [(0.0, "2000/s, burst")], CLIENTS, round(20_000 * CALLS_OF_CLIENTS / count)
    )
    asyncio.run(simulation.run())
    return simulation


def test_no_day_of_a_model_exceeds_its_budget_and_at_least_99_percent_are_used(
    connection: Connection,
) -> None:
    simulation = budgets_of_a_model(connection, 3_000)
    verdict = simulation.verdict(MODEL, simulation.changes)
    assert verdict.breach_count == 0, verdict.breaches[:3]
    assert verdict.use >= 0.99


@pytest.fixture(scope="module")
def calls_of_clients(connection: Connection) -> Simulation:
    return budgets_of_clients(connection, 4_000)


@pytest.mark.parametrize("client", CLIENTS)
def test_no_period_of_a_client_exceeds_its_limit_and_at_least_99_percent_are_used(
    calls_of_clients: Simulation, client: str
) -> None:
    simulation = calls_of_clients
    limit = TrafficTarget.parse(f"{CLIENTS[client]}, burst")
    verdict = simulation.verdict(client, [TargetChange(0.0, client, limit)])
    assert verdict.sent > 100
    assert verdict.breach_count == 0, verdict.breaches[:3]
    assert verdict.use >= 0.99


def shown(name: str, verdict: Any) -> str:
    return f"{name}: {verdict.sent:,} calls, {verdict.breach_count} breaches, use {verdict.use:.2%}"


def main(count: int) -> str:
    """Returns the verdicts of a simulation of about this many calls."""
    server = start_redis(Path(tempfile.mkdtemp()))
    try:
        connection = Connection(server)
        began = time.monotonic()
        simulation = budgets_of_a_model(connection, count)
        lines = [shown("model", simulation.verdict(MODEL, simulation.changes))]
        lines.append(f"{time.monotonic() - began:.0f} s")
        simulation = budgets_of_clients(connection, count)
        for client, line in CLIENTS.items():
            limit = TargetChange(0.0, client, TrafficTarget.parse(f"{line}, burst"))
            lines.append(shown(f"{client}, {line}", simulation.verdict(client, [limit])))
        return "\n".join(lines)
    finally:
        server.stop()


if __name__ == "__main__":
    sys.stdout.write(main(int(sys.argv[1])) + "\n")
