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
from router.settings import Addresses, config_folder

from . import dashboard, discovery, tasks
from .ask import Asks
from .live import Kept, Live, as_line
from .readers import Reads
from .variables import TrafficVariables

KEPT_SECONDS = 5.0  # of what changes once a night


class ConsoleState:
    """What the routes read from; `close` ends what is in progress and disconnects."""

    def __init__(self) -> None:
        self.reads = Reads(lambda: addresses().database_url)
        self.variables = TrafficVariables()
        self._board = dashboard.Board()
        self.history = dashboard.History()
        reviews, criteria = tasks.Reviews(), discovery.Criteria(config_folder())
        self.priorities = self._kept(lambda connection: tasks.priorities(connection, reviews))
        self.search = self._kept(lambda connection: discovery.found(connection, criteria))
        self.live = Live(self._read_board)
        self.asks = Asks(addresses)

    async def close(self) -> None:
        """End what is under way, and disconnect."""
        await self.live.close()
        await self.asks.close()
        await asyncio.to_thread(self.reads.close)

    async def retry(self, category: str | None, task_ids: list[int] | None) -> Retried:
        """Set failed tasks back to unsolved."""

        def write() -> Retried:
            with connect(addresses().database_url) as connection:
                return tasks.retry(connection, category, task_ids)

        return await asyncio.to_thread(write)

    def _kept(self, read: Callable[[Database], dict[str, Any]]) -> Kept:
        return Kept(lambda: self.reads.run(lambda connection: as_line(read(connection))), KEPT_SECONDS)

    async def _read_board(self) -> dict[str, Any]:
        redis_url = await asyncio.to_thread(lambda: addresses().redis_url)
        now = await self.reads.run(lambda connection: self._board.read(connection, redis_url))
        with contextlib.suppress(Exception):  # without it the targets in force are shown all the same
            now["variables"] = await asyncio.to_thread(self.variables.read)
        return now


def addresses() -> Addresses:
    """Returns the addresses in Airflow's Connections. Read at each use, because they may be edited."""
    return read_addresses(Connection.get_connection_from_secrets)
