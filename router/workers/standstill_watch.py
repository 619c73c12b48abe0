"""Periodic job of the engine: notices why nothing is sent, logs each change and records when it began."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

import asyncpg

from router.background import result_or_none
from router.database import fetch_one
from router.errors import DatabaseError, LimiterError, first_line
from router.limiter import ModelTraffic, TrafficLimiter
from router.migrations import ProblemKind, SchemaMonitor
from router.models import Roster
from router.queue import QueueState
from router.settings import Addresses, RouterConfig
from router.status import FACTS, Reason, Standstill, WhyNot, facts_of, only, standstill_of, unreadable
from router.workers.standstill import StandstillReports

log = logging.getLogger("router.workers.standstill")

STEP_SECONDS = 1.5
READ_SECONDS = 3.0  # for Postgres, and for Redis
CONNECT_SECONDS = 2.0
NO_LOOP_SECONDS = 1.5  # a loop is handed over in less
ORDINARY_SECONDS = 10.0  # an ordinary wait is logged after this time
NO_RESPONSE = only(Reason.DATABASE_UNAVAILABLE, "Postgres does not respond.")
PORTS = {"http": 80, "https": 443}


class WatchHost(Protocol):
    """The part of `Engine` that the watch uses."""

    addresses: Addresses
    config: RouterConfig
    pool: asyncpg.Pool
    limiter: TrafficLimiter
    reports: StandstillReports
    roster: Roster
    state: QueueState | None

    def in_flight(self) -> int: ...


@dataclass(slots=True)
class _Seen:
    """A reason of one model, or of the whole, since `at` of the monotonic clock."""

    why: WhyNot
    at: float
    logged: bool = False


class StandstillWatch:
    """Compares the reasons of each step with those of the step before."""

    def __init__(self, host: WatchHost) -> None:
        self._host = host
        self._schema = SchemaMonitor()
        self._seen: dict[str, _Seen] = {}  # by model; "" is the whole
        self._no_loop_since: dict[str, float] = {}

    async def step(self) -> None:
        """Reads the facts once; reports, logs and records what changed."""
        host = self._host
        self._report_models_without_loop()
        full = host.config.worker.max_in_flight
        if host.in_flight() >= full:
            host.reports.record(Reason.WORKER_FULL, f"{full:,} calls in flight")
        else:
            host.reports.clear(Reason.WORKER_FULL)
        found = await result_or_none(self._read(), 2 * READ_SECONDS, "router standstill")
        self._notice(NO_RESPONSE if found is None else found)
        await host.reports.step()

    async def _read(self) -> Standstill:
        host = self._host
        try:
            reading = fetch_one(host.pool, FACTS)
            row = await result_or_none(reading, READ_SECONDS, "router standstill facts")
            schema = await result_or_none(
                self._schema.problem(host.pool), READ_SECONDS, "router standstill schema"
            )
        except DatabaseError as error:
            return unreadable(error)
        if row is None:
            return NO_RESPONSE
        if schema is not None and schema.kind is ProblemKind.OUTDATED:
            host.reports.record(Reason.OUTDATED, str(schema))  # a newer reader sees no problem
        else:
            host.reports.clear(Reason.OUTDATED)
        traffic, problem = await self._traffic()
        await self._check_backend(traffic)
        return standstill_of(facts_of(row["facts"], traffic, problem, schema=schema))

    async def _traffic(self) -> tuple[Mapping[str, ModelTraffic] | None, str | None]:
        limiter, models = self._host.limiter, list(self._host.roster.models)

        async def read() -> dict[str, ModelTraffic]:
            await limiter.check_writable()
            return await limiter.snapshot(models)

        try:
            traffic = await result_or_none(read(), READ_SECONDS, "router standstill limits")
        except LimiterError as error:
            return None, first_line(error)
        return traffic, "Redis does not answer." if traffic is None else None

    async def _check_backend(self, traffic: Mapping[str, ModelTraffic] | None) -> None:
        """Connects to the backend while calls fail: without calls, nothing else notices its end or return."""
        reports = self._host.reports
        failing = [model for model, one in (traffic or {}).items() if one.breaker != "closed" or one.failures]
        unreachable = reports.models(Reason.BACKEND_UNREACHABLE)
        if not failing and not unreachable:
            return
        problem = await connection_problem(self._host.addresses.backend_url)
        if problem is not None:
            reports.record(Reason.BACKEND_UNREACHABLE, problem)
            return
        for model in reports.doubtful(Reason.BACKEND_UNREACHABLE):
            reports.clear(Reason.BACKEND_UNREACHABLE, model)

    def _report_models_without_loop(self) -> None:
        host, now = self._host, time.monotonic()
        waiting = host.state is not None and sum(host.state.unsolved.values()) > 0
        idle = {model for model in host.roster.models if waiting and not host.reports.has_loop(model)}
        for model in host.reports.models(Reason.NO_WORKER):
            if model not in idle:
                host.reports.clear(Reason.NO_WORKER, model)
        self._no_loop_since = {model: self._no_loop_since.get(model, now) for model in idle}
        for model, since in self._no_loop_since.items():
            if now - since >= NO_LOOP_SECONDS:
                host.reports.record(Reason.NO_WORKER, "", model)

    def _notice(self, standstill: Standstill) -> None:
        now = time.monotonic()
        reasons: dict[str, WhyNot | None] = {"": standstill.whole, **standstill.models}
        for model in self._seen.keys() | reasons.keys():
            self._update(model, reasons.get(model), now)
        self._host.reports.set_starts({(model, seen.why.code): seen.at for model, seen in self._seen.items()})
        for model, seen in self._to_log(now):
            _log_start(model, seen.why)

    def _update(self, model: str, why: WhyNot | None, now: float) -> None:
        before = self._seen.get(model)
        if before is not None and why is not None and before.why.code is why.code:
            before.why = why
            return
        if before is not None:
            del self._seen[model]
            if before.logged and why is None:
                about = f" model={model}" if model else ""
                log.info(
                    "sending again:%s reason=%s seconds=%.0f", about, before.why.code.value, now - before.at
                )
        if why is not None:
            self._seen[model] = _Seen(why, now)

    def _to_log(self, now: float) -> Iterator[tuple[str, _Seen]]:
        """Yields what is to be logged now: alarms and stops at once, ordinary waits if they last."""
        whole = self._seen.get("")
        for model, seen in sorted(self._seen.items()):
            same = bool(model) and whole is not None and whole.why.code is seen.why.code
            lasting = seen.why.alarm or seen.why.code.chosen or now - seen.at >= ORDINARY_SECONDS
            if not seen.logged and not same and lasting:
                seen.logged = True
                yield model, seen


def _log_start(model: str, why: WhyNot) -> None:
    about = f" model={model}" if model else ""
    level = logging.WARNING if why.alarm else logging.INFO
    log.log(level, "not sending:%s reason=%s: %s", about, why.code.value, why.text)


async def connection_problem(url: str) -> str | None:
    """Returns why no TCP connection can be made to the host of a URL; None if one can."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or PORTS.get(parts.scheme, 80)
    try:
        connecting = asyncio.open_connection(host, port)
        connected = await result_or_none(connecting, CONNECT_SECONDS, "router backend check")
    except OSError as error:
        return f"{host}:{port}: {error.strerror or type(error).__name__}"
    if connected is None:
        return f"{host}:{port} does not answer"
    writer = connected[1]
    writer.close()
    with contextlib.suppress(OSError):
        await result_or_none(writer.wait_closed(), CONNECT_SECONDS, "router backend check")
    return None
