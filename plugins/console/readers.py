"""What the console reads from the router's Postgres: short statements in threads of their own, read-only."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import psycopg2

from router.database import Connection
from router.errors import DatabaseError, InputError

log = logging.getLogger("router.console")

THREADS = 3
TIMEOUT_SECONDS = 5
OPTIONS = (
    f"-c default_transaction_read_only=on -c statement_timeout={TIMEOUT_SECONDS}s -c jit=off"
    " -c application_name=router_console"
)
T = TypeVar("T")


class Reads:
    """Runs reads, each thread on a connection that it keeps. Whatever Postgres says against it is logged."""

    def __init__(self, url: Callable[[], str]) -> None:
        """`url` is asked in a thread, when a connection is needed."""
        self._url = url
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="router console")
        self._own = threading.local()
        self._connections: set[Connection] = set()

    async def run(self, read: Callable[[Connection], T]) -> T:
        """What `read` makes of a connection. DatabaseError, without Postgres's words, if it cannot."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._run, read)

    def close(self) -> None:
        """Wait for the reads under way, and disconnect."""
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
            log.warning("the console cannot read: %s", str(error).strip())
            if isinstance(error, psycopg2.errors.QueryCanceled):
                why = f"Postgres took longer than {TIMEOUT_SECONDS} s."
            else:
                why = "Postgres is away or refused."
            raise DatabaseError(f"{why} The api-server's log says more.") from error
        except ValueError as error:
            if "NUL" not in str(error):  # psycopg2's word for a value that Postgres has no text for
                raise
            raise InputError("What was asked for holds a NUL character. Take it out.") from error

    def _connection(self) -> Connection:
        connection: Connection | None = getattr(self._own, "connection", None)
        if connection is None or connection.closed:
            connection = psycopg2.connect(self._url(), connect_timeout=3, options=OPTIONS)
            self._own.connection = connection
            self._connections.add(connection)
        return connection

    def _drop(self) -> None:
        connection: Connection | None = getattr(self._own, "connection", None)
        if connection is not None:
            connection.close()
            self._connections.discard(connection)
            self._own.connection = None
