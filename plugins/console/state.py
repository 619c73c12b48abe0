"""State of the console: connections and cached readings that its routes share."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from airflow.models.connection import Connection
from connections import read_addresses

from router.database import Connection as Database
from router.database import connect
from router.queue import Retried
from router.settings import Addresses, config_folder, load_config
from router.status import read_clients

from . import dashboard, discovery, tasks
from .ask import AskSessions
from .live import CachedReading, Live, as_line
from .readers import ReadPool
from .searches import Searches
from .variables import TrafficVariables

CACHE_SECONDS = 5.0  # for data that changes once a day
SPEND_CACHE_SECONDS = 30.0  # reads up to 200,000 calls
PROGRESS_SECONDS = 1.0


class ConsoleState:
    """Connections and cached readings of the console."""

    def __init__(self) -> None:
        self.reads = ReadPool(lambda: addresses().database_url)
        self.variables = TrafficVariables()
        self._dashboard = dashboard.Dashboard()
        self.history = dashboard.History()
        reviews, criteria = tasks.RecentReviews(), discovery.ProbationCriteria(config_folder())
        self.ranking = self._cached(lambda connection: tasks.ranking(connection, reviews))
        self.discovery = self._cached(lambda connection: discovery.read_discovery(connection, criteria))
        self.spend = CachedReading(
            lambda: self.reads.run(lambda connection: as_line(tasks.spend(connection))), SPEND_CACHE_SECONDS
        )
        self.clients = self._cached(_clients)
        self.search_progress = self._cached(discovery.running_search, PROGRESS_SECONDS)
        self.searches = Searches(addresses)
        self.live = Live(self._read_status)
        self.asks = AskSessions(addresses)

    async def close(self) -> None:
        """Ends what is in progress and disconnects."""
        await self.live.close()
        await self.asks.close()
        await asyncio.to_thread(self.reads.close)

    async def retry(self, category: str | None, task_ids: list[int] | None) -> Retried:
        """Requeues failed tasks; see `tasks.retry`."""

        def write() -> Retried:
            with connect(addresses().database_url) as connection:
                return tasks.retry(connection, category, task_ids)

        return await asyncio.to_thread(write)

    def _cached(
        self, read: Callable[[Database], dict[str, Any]], seconds: float = CACHE_SECONDS
    ) -> CachedReading:
        return CachedReading(lambda: self.reads.run(lambda connection: as_line(read(connection))), seconds)

    async def _read_status(self) -> dict[str, Any]:
        redis_url = await asyncio.to_thread(lambda: addresses().redis_url)
        now = await self.reads.run(lambda connection: self._dashboard.read(connection, redis_url))
        with contextlib.suppress(Exception):  # the active targets are shown without it
            now["variables"] = await asyncio.to_thread(self.variables.read)
        return now


def _clients(connection: Database) -> dict[str, Any]:
    config = load_config(config_folder())
    return {"clients": read_clients(connection, config, addresses().redis_url)}


def addresses() -> Addresses:
    """Returns the addresses in Airflow's Connections. Read at each use, because they may be edited."""
    return read_addresses(Connection.get_connection_from_secrets)
