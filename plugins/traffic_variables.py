"""Watches the `traffic.<model>` Variables and the pause of solve_tasks in Airflow's api-server.

A trigger cannot query whether its DAG is paused, and reads Variables slowly through its supervisor. The
api-server reads both from the metadata database, with one query each, four times a second, and publishes
changes. A line from a source that Airflow reads before its database replaces that of the database. Workers
read the Variables themselves only as a fallback.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Mapping
from typing import Any

from airflow.plugins_manager import AirflowPlugin
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from traffic_sources import EarlierSources, SourcedLine, sources_report

from router.errors import RouterError, first_line
from router.settings import Addresses

log = logging.getLogger("router.traffic_variables")

WATCH_SECONDS = 0.25
ROSTER_SECONDS = 5.0
REPORT_SECONDS = 2.5
DAG_ID = "solve_tasks"


def read_variables() -> tuple[dict[str, str | None], bool | None, int]:
    """Returns model -> line, whether the DAG is paused (None if unknown), and the database's time in µs."""
    from airflow.models.dag import DagModel  # noqa: PLC0415 - the same
    from airflow.models.variable import Variable  # noqa: PLC0415 - not in processes that only parse
    from airflow.utils.session import create_session  # noqa: PLC0415 - the same
    from sqlalchemy import func, select  # noqa: PLC0415 - the same

    from router.models import VARIABLE_PREFIX  # noqa: PLC0415 - the same

    with create_session() as session:
        now = session.scalar(select(func.now()))
        if now is None:
            raise RuntimeError("the metadata database returned no time")
        found = session.scalars(
            select(Variable).where(Variable.key.startswith(VARIABLE_PREFIX, autoescape=True))
        )
        lines: dict[str, str | None] = {v.key.removeprefix(VARIABLE_PREFIX): v.val for v in found}
        paused = session.scalar(select(DagModel.is_paused).where(DagModel.dag_id == DAG_ID))
        return lines, paused, int(now.timestamp() * 1e6)


async def watch() -> None:
    """Watches until canceled; starts again after any error."""
    while True:
        try:
            await _watch_until_error()
        except Exception as error:  # noqa: BLE001, PERF203 - the watch must never end
            reason = first_line(error) if isinstance(error, RouterError) else type(error).__name__
            log.warning("watching traffic Variables failed, retrying: %s", reason)
            await asyncio.sleep(2)


async def _watch_until_error() -> None:
    from router.models import open_services  # noqa: PLC0415 - not in processes that only parse
    from router.settings import load_config  # noqa: PLC0415 - the same

    addresses = await asyncio.to_thread(_addresses)
    async with open_services(addresses, load_config(), connections=2) as services:
        sources = _Sources(services.pool)
        while True:
            stored, paused, version = await asyncio.to_thread(read_variables)
            found = await sources.read(stored)
            lines = {**stored, **{model: entry.line for model, entry in found.items()}}
            await services.targets.sync(lines, paused=paused, version=version)
            await asyncio.sleep(WATCH_SECONDS)


class _Sources:
    """Lines of earlier sources for the models of the roster; reports to Postgres where they come from."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._sources = EarlierSources()
        self._models: list[str] = []
        self._models_at = self._reported_at = float("-inf")
        self._reported = ""

    async def read(self, stored: Mapping[str, str | None]) -> dict[str, SourcedLine]:
        from router.database import fetch  # noqa: PLC0415 - not in processes that only parse

        if time.monotonic() - self._models_at >= ROSTER_SECONDS:
            rows = await fetch(self._pool, "SELECT model FROM roster WHERE state <> 'retired'")
            self._models, self._models_at = [row["model"] for row in rows], time.monotonic()
        found = await asyncio.to_thread(self._sources.read, self._models)
        report = sources_report(found, stored)
        due = time.monotonic() - self._reported_at >= REPORT_SECONDS
        if report != (self._reported or "[]") or (found and due):
            worker = f"{socket.gethostname()}:watch"
            await fetch(self._pool, "SELECT replace_worker_reports($1, $2)", worker, report)
            self._reported, self._reported_at = report, time.monotonic()
        return found


def _addresses() -> Addresses:
    from airflow.models.connection import Connection  # noqa: PLC0415 - not in processes that only parse
    from connections import read_addresses  # noqa: PLC0415 - the same

    return read_addresses(Connection.get_connection_from_secrets)


class WatchWhileServing:
    """ASGI middleware that runs the watch from the server's start-up to its shutdown.

    A thread started at import would race the api-server's own imports.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return
        watching: list[asyncio.Task[None]] = []

        async def send_and_watch(message: Message) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete":
                watching.append(asyncio.create_task(watch(), name="router traffic watch"))

        try:
            await self._app(scope, receive, send_and_watch)
        finally:
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)


class TrafficVariables(AirflowPlugin):
    """Adds the watch to the api-server."""

    name = "traffic_variables"
    fastapi_root_middlewares = [  # noqa: RUF012 - the form that Airflow expects
        {"name": "router traffic watch", "middleware": WatchWhileServing, "args": [], "kwargs": {}}
    ]
