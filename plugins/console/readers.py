"""Read-only access to the router's Postgres for the console, in a pool of threads."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import psycopg2

from router.database import Connection, open_connection
from router.errors import DatabaseError, InputError

log = logging.getLogger("router.console")

THREADS = 3
TIMEOUT_SECONDS = 5
OPTIONS = f"-c statement_timeout={TIMEOUT_SECONDS}s -c jit=off -c application_name=router_console"
T = TypeVar("T")


class ReadPool:
    """Runs reads in threads with one connection each. Postgres's own error texts go to the log only."""

    def __init__(self, url: Callable[[], str]) -> None:
        """`url` is called in a thread whenever a connection is opened."""
        self._url = url
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="router console")
        self._local = threading.local()
        self._connections: set[Connection] = set()

    async def run(self, read: Callable[[Connection], T]) -> T:
        """Calls `read` with a connection and returns its result.

        Raises DatabaseError without Postgres's text, and InputError for a NUL character in a value.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._run, read)

    def close(self) -> None:
        """Waits for the reads in progress and disconnects."""
        self._threads.shutdown(cancel_futures=True)
        for connection in self._connections:
            connection.close()
        self._connections.clear()

    def _run(self, read: Callable[[Connection], T]) -> T:
        try:
            connection = self._connection()
            with connection:
                return read(connection)
        except psycopg2.Error as error:
            self._drop()
            log.warning("console: read failed: %s", str(error).strip())
            if isinstance(error, psycopg2.errors.QueryCanceled):
                reason = f"Postgres took longer than {TIMEOUT_SECONDS} s."
            else:
                reason = "Postgres is unavailable or rejected the query."
            raise DatabaseError(f"{reason} See the api-server's log.") from error
        except ValueError as error:
            if "NUL" not in str(error):  # psycopg2 raises this for text that Postgres cannot store
                raise
            raise InputError("The request contains a NUL character. Remove it.") from error

    def _connection(self) -> Connection:
        connection: Connection | None = getattr(self._local, "connection", None)
        if connection is None or connection.closed:
            connection = open_connection(self._url(), options=OPTIONS, connect_seconds=3)
            # Not by default_transaction_read_only, which the status reads as the server's own setting.
            connection.set_session(readonly=True)
            self._local.connection = connection
            self._connections.add(connection)
        return connection

    def _drop(self) -> None:
        connection: Connection | None = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._connections.discard(connection)
            self._local.connection = None
