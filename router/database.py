"""Postgres: connections, pools, statements, and the mapping of driver errors.

asyncpg serves concurrent calls (workers, requests). psycopg2 serves short synchronous work (migrations, the
command line, Airflow tasks).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, overload

import asyncpg
import psycopg2
import psycopg2.extensions
from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_random_exponential

from router.background import result_or_none
from router.errors import DatabaseError, InvalidValue, LeaseLost, RouterError, RowLocked, first_line
from router.settings import PostgresAddress
from router.task import CallResult

Connection = psycopg2.extensions.connection
# Raised by asyncpg when the server is unreachable or the connection broke during a statement.
UNAVAILABLE_ERRORS = (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError, asyncio.TimeoutError)
SETTLE_RETRY_SECONDS = 3600.0  # a paid answer is worth waiting for Postgres, or for another transaction
LEASE_LOST_SQLSTATE = "RT001"
LOCKED_SQLSTATE = "55P03"
# Data exceptions, violated constraints, limits of the server, errors that a trigger raises, damaged data, and
# a call that cannot be requeued.
PERMANENT_SQLSTATES = ("22", "23", "54", "P0001", "XX", "RT002")
# After these errors (read-only, shutting down, connection lost) another server may be the primary.
ROLE_CHANGED_SQLSTATES = ("25006", "57P01", "57P02", "57P03", "57P05", "08")
MAX_INTEGER = 2**31 - 1
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
# Finds the router's tables by their names if neither the database nor the role has a default path that does.
SEARCH_PATH = """
SELECT set_config('search_path', concat_ws(', ', nullif(current_setting('search_path'), ''), 'router'), false)
 WHERE to_regnamespace('router') IS NOT NULL AND NOT 'router' = ANY (current_schemas(false))"""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Actor:
    """Who acts in this process or request, and through which entrance; the audit log records both."""

    name: str
    via: str


_ACTOR: ContextVar[Actor | None] = ContextVar("router_actor", default=None)


def act_as(name: str, via: str) -> None:
    """Names the actor of the connections that this process, task or request opens from now on."""
    _ACTOR.set(Actor(name, via))


@contextmanager
def connect(url: str, *, autocommit: bool = False) -> Iterator[Connection]:
    """Opens a synchronous connection; commits at the end and rolls back on an error. Raises DatabaseError.

    With `autocommit` each statement is its own transaction. Raises ConfigError for an invalid URL.
    """
    try:
        connection = open_connection(url)
    except psycopg2.OperationalError as error:
        raise unreachable(error) from error
    try:
        _name_actor(connection)
        if autocommit:
            connection.autocommit = True
            yield connection
        else:
            with connection:
                yield connection
    except psycopg2.Error as error:
        raise DatabaseError(first_line(error)) from error
    finally:
        connection.close()


def _name_actor(connection: Connection) -> None:
    actor = _ACTOR.get()
    if actor is not None:
        names = "SELECT set_config('router.by', %s, false), set_config('router.via', %s, false)"
        rows(connection, names, (postgres_text(actor.name), actor.via))
        connection.commit()  # or a rollback would undo it


def open_connection(url: str, *, options: str = "", connect_seconds: int | None = None) -> Connection:
    """Opens a synchronous connection; `options` are added to those of the URL. Raises psycopg2's errors."""
    arguments = PostgresAddress.parse(url).for_psycopg2(options=options)
    if connect_seconds is not None:
        arguments["connect_timeout"] = min(connect_seconds, arguments["connect_timeout"])
    connection: Connection = psycopg2.connect(**arguments)
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(SEARCH_PATH)
    connection.autocommit = False
    return connection


def rows(connection: Connection, statement: str, arguments: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
    """Runs one statement and returns its rows as dictionaries; an empty list if it returns none."""
    with connection.cursor() as cursor:
        cursor.execute(statement, arguments)
        if cursor.description is None:
            return []
        names = [column[0] for column in cursor.description]
        try:
            found = cursor.fetchall()
        except (ValueError, OverflowError) as error:
            raise InvalidValue(
                f"Postgres returned a value that cannot be read: {first_line(error)}"
            ) from error
        return [dict(zip(names, row, strict=True)) for row in found]


@contextmanager
def transaction(connection: Connection) -> Iterator[None]:
    """Makes the statements of the block one transaction on an autocommit connection."""
    rows(connection, "BEGIN")
    try:
        yield
    except BaseException:
        rows(connection, "ROLLBACK")
        raise
    rows(connection, "COMMIT")


@contextmanager
def advisory_lock(connection: Connection, key: int, busy: RouterError) -> Iterator[None]:
    """Holds an advisory lock of the session during the block; raises `busy` if another session holds it.

    Uncommitted work of the block is rolled back.
    """
    if not rows(connection, "SELECT pg_try_advisory_lock(%s) AS acquired", (key,))[0]["acquired"]:
        raise busy
    try:
        yield
    finally:  # closing the connection would free it as well, but later
        with contextlib.suppress(psycopg2.Error):
            connection.rollback()
            rows(connection, "SELECT pg_advisory_unlock(%s)", (key,))


async def open_pool(url: str, *, connections: int, min_connections: int = 1) -> asyncpg.Pool:
    """Opens a pool of at most `connections`, for statements of a few milliseconds. Raises DatabaseError.

    With `min_connections` 0 it also opens while Postgres is unavailable.

    Works through a session-mode pooler, but not through a transaction-mode one: asyncpg prepares statements.
    """
    try:
        return await asyncpg.create_pool(
            url, connect=open_async_connection, jit="off", min_size=min_connections,
            max_size=connections, command_timeout=30, reset=_no_reset,
        )  # fmt: skip
    except (*UNAVAILABLE_ERRORS, asyncpg.PostgresError) as error:
        raise unreachable(error) from error


async def open_async_connection(
    url: str, *, application_name: str = "router", jit: str | None = None, **more: Any
) -> asyncpg.Connection:
    """Opens an asynchronous connection, with the keep-alives of the URL. Raises asyncpg's errors."""
    address = PostgresAddress.parse(url)
    settings = {} if jit is None else {"jit": jit}
    arguments = address.for_asyncpg(application_name=application_name, **settings)
    arguments.setdefault("target_session_attrs", "read-write")  # after a failover, not the former primary
    connection = await asyncpg.connect(**arguments, **more)
    transport = connection._transport  # noqa: SLF001 - asyncpg has no parameter for socket options
    socket_in_use = transport and transport.get_extra_info("socket")
    if socket_in_use is not None:
        for level, option, value in address.socket_options(socket_in_use.family):
            socket_in_use.setsockopt(level, option, value)
    await connection.execute(SEARCH_PATH, timeout=address.connect_seconds)
    return connection


async def _no_reset(_connection: Any) -> None:
    """Saves a round trip: no statement changes the state of its session."""


def unreachable(error: Exception) -> DatabaseError:
    """Returns the error for a failed attempt to connect."""
    if isinstance(error, asyncpg.exceptions.TargetServerAttributeNotMatched):
        return DatabaseError("Postgres accepts no writes: it is read-only, or a standby.")
    reason = first_line(error).rstrip(".")
    return DatabaseError(f"Postgres cannot be reached: {reason}. Check ROUTER_DATABASE_URL.")


class Queryable(Protocol):
    """A pool, or a connection of its own."""

    async def fetch(self, query: str, *arguments: Any) -> Any: ...
    async def expire_connections(self) -> None: ...


class DedicatedConnection:
    """One connection outside the pool, for statements that must not wait behind others, such as a heartbeat.

    It connects when it is first used, and again after an error or a reply that takes longer than `seconds`.
    """

    def __init__(self, url: str, *, seconds: float) -> None:
        self._url = url
        self._seconds = seconds
        self._connection: asyncpg.Connection | None = None
        self._turn = asyncio.Lock()

    async def fetch(self, query: str, *arguments: Any) -> Any:
        """Runs one statement. Raises asyncpg's errors, and asyncio.TimeoutError."""
        async with self._turn:
            try:
                found = await result_or_none(
                    self._fetch(query, arguments), self._seconds, "router own connection"
                )
            except BaseException:
                await self.expire_connections()
                raise
            if found is None:
                await self.expire_connections()
                raise asyncio.TimeoutError(f"no reply within {self._seconds:g} s")
            return found

    async def _fetch(self, query: str, arguments: tuple[Any, ...]) -> Any:
        if self._connection is None or self._connection.is_closed():
            self._connection = await open_async_connection(
                self._url, application_name="router lease", jit="off"
            )
        return await self._connection.fetch(query, *arguments)

    async def expire_connections(self) -> None:
        """Closes the connection without waiting for the server."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()


async def fetch(pool: Queryable, statement: str, *arguments: Any) -> list[Any]:
    """Runs one statement as its own transaction and returns its rows.

    Raises LeaseLost, RowLocked, InvalidValue, or DatabaseError for anything else. If the error means that the
    server changed its role, all connections of the pool are replaced.
    """
    try:
        return list(await pool.fetch(statement, *arguments))
    except asyncpg.PostgresError as error:
        if (error.sqlstate or "").startswith(ROLE_CHANGED_SQLSTATES):
            await pool.expire_connections()
        raise _refused(error) from error
    except asyncpg.exceptions.TargetServerAttributeNotMatched as error:
        raise unreachable(error) from error
    except UNAVAILABLE_ERRORS as error:
        raise DatabaseError(f"Postgres is unavailable: {first_line(error)}") from error
    except (ValueError, OverflowError) as error:  # invalid UTF-8, a time beyond the years of Python
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> InvalidValue:
    return InvalidValue(f"Postgres returned a value that cannot be read: {first_line(error)}")


def _refused(error: asyncpg.PostgresError) -> DatabaseError:
    """Returns the error for a refused statement, without the details, which may contain the row."""
    state, reason = error.sqlstate or "", first_line(error)
    if state == LEASE_LOST_SQLSTATE:
        return LeaseLost(reason)
    if state == LOCKED_SQLSTATE:
        return RowLocked(f"Another transaction holds a lock: {reason}")
    if isinstance(error, asyncpg.DataError) or state.startswith(PERMANENT_SQLSTATES):
        return InvalidValue(f"Postgres rejected a value: {reason}")
    return DatabaseError(f"Postgres rejected the statement: {reason}")


async def fetch_one(pool: Queryable, statement: str, *arguments: Any) -> Any:
    """Runs one statement like `fetch` and returns its first row, or None."""
    found = await fetch(pool, statement, *arguments)
    return found[0] if found else None


async def retry_while_unavailable(
    attempt: Callable[[], Awaitable[T]], blocked: asyncio.Semaphore | None = None
) -> T:
    """Repeats `attempt` after a transient DatabaseError, for at most SETTLE_RETRY_SECONDS.

    `blocked` bounds how many attempts that met a lock are repeated at the same time, without the waits.
    """
    try:
        return await attempt()  # the common case: AsyncRetrying costs as much as the statement itself
    except DatabaseError as error:
        if not _is_transient(error):
            raise
        last: DatabaseError = error

    async def once() -> T:
        nonlocal last
        bound = blocked if isinstance(last, RowLocked) else None
        try:
            async with bound or contextlib.nullcontext():
                return await attempt()
        except DatabaseError as error:
            last = error
            raise

    retrying = AsyncRetrying(
        retry=retry_if_exception(_is_transient),
        wait=wait_random_exponential(multiplier=0.1, max=2),
        stop=stop_after_delay(SETTLE_RETRY_SECONDS),
        reraise=True,
    )
    return await retrying(once)


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, DatabaseError) and not isinstance(error, InvalidValue)


def settled_values(result: CallResult) -> tuple[Any, ...]:
    """Returns the columns of a settled call: outcome, answer, tokens, cost, latency, error.

    Tokens are those of the prompt and those of the answer. Characters that Postgres cannot store are
    replaced; numbers out of range are clipped or dropped.
    """
    return (
        result.outcome.value,
        postgres_text(result.answer),
        _clipped(result.prompt_tokens),
        _clipped(result.completion_tokens),
        _finite(result.cost_usd),
        _finite(result.latency_seconds),
        postgres_text(result.error),
    )


def message_json(result: CallResult) -> str | None:
    """Returns what an answer is beside its text as JSON, the value of `tasks.answer_message`."""
    message = result.message
    return None if message is None else json.dumps(message)


@overload
def postgres_text(text: str) -> str: ...
@overload
def postgres_text(text: None) -> None: ...
def postgres_text(text: str | None) -> str | None:
    """Replaces NUL characters and lone surrogates, which Postgres cannot store, by U+FFFD."""
    return None if text is None else _UNSTORABLE.sub("\ufffd", text)


def _clipped(tokens: int | None) -> int | None:
    return None if tokens is None else max(0, min(tokens, MAX_INTEGER))


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None
