"""Postgres: connections, migrations, and SQL functions called by name.

Two drivers, one a purpose: asyncpg where calls overlap (workers, asking), psycopg2 for short synchronous work
(migrations, the command line, Airflow tasks). Driver errors are wrapped here, at the edge.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, overload

import asyncpg
import psycopg2
import psycopg2.errors
import psycopg2.extensions
from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_random_exponential

from router.errors import ConfigError, DatabaseError, RouterError
from router.task import CallResult

Connection = psycopg2.extensions.connection
# What asyncpg raises when the server is away or the connection broke in the middle.
UNAVAILABLE_ERRORS = (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError, asyncio.TimeoutError)


@contextmanager
def connect(url: str, *, autocommit: bool = False) -> Iterator[Connection]:
    """A synchronous connection, committed at the end and rolled back on an error. Raises DatabaseError.

    With `autocommit` each statement is its own transaction.
    """
    try:
        connection = psycopg2.connect(url, connect_timeout=10)
    except psycopg2.ProgrammingError:  # its words hold the URL, and with it the password
        raise ConfigError(
            "The database's address is no postgresql:// URL, or a special character of its password is not"
            " percent-encoded. Check ROUTER_DATABASE_URL."
        ) from None
    except psycopg2.OperationalError as error:
        raise DatabaseError(
            f"Postgres cannot be reached: {_first_line(error)} Check ROUTER_DATABASE_URL."
        ) from error
    try:
        if autocommit:
            connection.autocommit = True
            yield connection
        else:
            with connection:
                yield connection
    except psycopg2.Error as error:
        raise DatabaseError(_first_line(error)) from error
    finally:
        connection.close()


def rows(connection: Connection, statement: str, arguments: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
    """Run one statement and return its rows as dictionaries; an empty list if it returns none."""
    with connection.cursor() as cursor:
        cursor.execute(statement, arguments)
        if cursor.description is None:
            return []
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


@contextmanager
def transaction(connection: Connection) -> Iterator[None]:
    """All or nothing, on a connection that commits each statement otherwise."""
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

    What the block left uncommitted is rolled back.
    """
    if not rows(connection, "SELECT pg_try_advisory_lock(%s) AS acquired", (key,))[0]["acquired"]:
        raise busy
    try:
        yield
    finally:  # closing the connection would free it as well, but later
        with contextlib.suppress(psycopg2.Error):
            connection.rollback()
            rows(connection, "SELECT pg_advisory_unlock(%s)", (key,))


async def open_pool(url: str, *, connections: int, at_first: int = 1) -> asyncpg.Pool:
    """A pool of at most `connections`, for statements that each take milliseconds. Raises DatabaseError.

    With `at_first` 0 it opens also while Postgres is away.

    Works through a session-mode pooler; through a transaction-mode one asyncpg's prepared statements do not.
    """
    try:
        return await asyncpg.create_pool(
            url, min_size=at_first, max_size=connections, command_timeout=30, timeout=10,
            reset=_nothing_to_reset, server_settings={"application_name": "router", "jit": "off"},
        )  # fmt: skip
    except (OSError, asyncpg.PostgresError) as error:
        raise DatabaseError(
            f"Postgres cannot be reached: {_first_line(error)} Check ROUTER_DATABASE_URL."
        ) from error


async def _nothing_to_reset(_connection: Any) -> None:
    """Each statement is its own transaction and sets nothing beyond it; a reset is one more round trip."""


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


SETTLE_RETRY_SECONDS = 600.0  # an answer that was paid for is worth waiting for Postgres
LEASE_LOST_SQLSTATE = "RT001"
PERMANENT_SQLSTATES = (
    "22",
    "23",
    "RT002",
)  # data exceptions, broken constraints, a call that cannot be put back
MAX_INTEGER = 2**31 - 1
T = TypeVar("T")


class LeaseLost(DatabaseError):  # noqa: N818 - a state of the world, read as one
    """The worker's lease was found gone: it must go on under a new name."""


class InvalidValue(DatabaseError):  # noqa: N818 - a state of the world, read as one
    """Postgres will never take these values; trying again is of no use."""


async def fetch(pool: asyncpg.Pool, statement: str, *arguments: Any) -> list[Any]:
    """The rows of one statement, its own transaction. Raises LeaseLost, InvalidValue or DatabaseError."""
    try:
        return list(await pool.fetch(statement, *arguments))
    except asyncpg.PostgresError as error:
        if error.sqlstate == LEASE_LOST_SQLSTATE:
            raise LeaseLost(str(error)) from error
        if isinstance(error, asyncpg.DataError) or (error.sqlstate or "").startswith(PERMANENT_SQLSTATES):
            raise InvalidValue(f"Postgres refused: {error}") from error
        raise DatabaseError(f"Postgres refused: {error}") from error
    except UNAVAILABLE_ERRORS as error:
        raise DatabaseError(f"Postgres is away: {error or type(error).__name__}") from error


async def fetch_one(pool: asyncpg.Pool, statement: str, *arguments: Any) -> Any:
    """The first row, or None."""
    found = await fetch(pool, statement, *arguments)
    return found[0] if found else None


async def retry_while_unavailable(attempt: Callable[[], Awaitable[T]]) -> T:
    """Try again while Postgres is away, for at most SETTLE_RETRY_SECONDS."""
    try:
        return await attempt()  # nearly always; what tries again costs as much as the statement's own code
    except DatabaseError as error:
        if not _is_transient(error):
            raise
    waiting = AsyncRetrying(
        retry=retry_if_exception(_is_transient),
        wait=wait_random_exponential(multiplier=0.1, max=2),
        stop=stop_after_delay(SETTLE_RETRY_SECONDS),
        reraise=True,
    )

    async def once() -> T:
        return await attempt()

    return await waiting(once)


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, DatabaseError) and not isinstance(error, InvalidValue)


def settled_values(result: CallResult) -> tuple[Any, ...]:
    """Outcome, answer, tokens of prompt and answer, cost, latency, error: made to fit where they do not.

    Postgres can hold no NUL, no half of a surrogate pair and no number out of range.
    """
    return (
        result.outcome.value,
        postgres_text(result.answer),
        _counted(result.prompt_tokens),
        _counted(result.completion_tokens),
        _finite(result.cost_usd),
        _finite(result.latency_seconds),
        postgres_text(result.error),
    )


@overload
def postgres_text(text: str) -> str: ...
@overload
def postgres_text(text: None) -> None: ...
def postgres_text(text: str | None) -> str | None:
    """The text without what Postgres cannot hold."""
    if text is None:
        return None
    return text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode("utf-8")


def _counted(tokens: int | None) -> int | None:
    return None if tokens is None else max(0, min(tokens, MAX_INTEGER))


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None
