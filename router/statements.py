"""SQL called from async code: one statement a transaction, driver errors wrapped, patience, values that fit.

Used by whatever talks to Postgres from an event loop and must tell "away" from "refused".
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import asyncpg
from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_random_exponential

from router.database import AWAY_ERRORS
from router.errors import DatabaseError
from router.task import CallResult

SETTLE_PATIENCE_SECONDS = 600.0  # an answer that was paid for is worth waiting for Postgres
LEASE_GONE = "RT001"
NEVER_HEALS = ("22", "23", "RT002")  # data exceptions, broken constraints, a call that cannot be put back
LARGEST_INTEGER = 2**31 - 1

T = TypeVar("T")


class LeaseLost(DatabaseError):  # noqa: N818 - a state of the world, read as one
    """The worker's lease was found gone: it must go on under a new name."""


class ValueRefused(DatabaseError):  # noqa: N818 - a state of the world, read as one
    """Postgres will never take these values; trying again is of no use."""


async def fetch(pool: asyncpg.Pool, statement: str, *arguments: Any) -> list[Any]:
    """The rows of one statement, its own transaction. Raises LeaseLost, ValueRefused or DatabaseError."""
    try:
        return list(await pool.fetch(statement, *arguments))
    except asyncpg.PostgresError as error:
        if error.sqlstate == LEASE_GONE:
            raise LeaseLost(str(error)) from error
        if isinstance(error, asyncpg.DataError) or (error.sqlstate or "").startswith(NEVER_HEALS):
            raise ValueRefused(f"Postgres refused: {error}") from error
        raise DatabaseError(f"Postgres refused: {error}") from error
    except AWAY_ERRORS as error:
        raise DatabaseError(f"Postgres is away: {error or type(error).__name__}") from error


async def fetch_one(pool: asyncpg.Pool, statement: str, *arguments: Any) -> Any:
    """The first row, or None."""
    found = await fetch(pool, statement, *arguments)
    return found[0] if found else None


async def patiently(attempt: Callable[[], Awaitable[T]]) -> T:
    """Try again while Postgres is away, for at most SETTLE_PATIENCE_SECONDS."""
    try:
        return await attempt()  # nearly always; what tries again costs as much as the statement's own code
    except DatabaseError as error:
        if not _may_heal(error):
            raise
    waiting = AsyncRetrying(
        retry=retry_if_exception(_may_heal),
        wait=wait_random_exponential(multiplier=0.1, max=2),
        stop=stop_after_delay(SETTLE_PATIENCE_SECONDS),
        reraise=True,
    )

    async def once() -> T:
        return await attempt()

    return await waiting(once)


def _may_heal(error: BaseException) -> bool:
    return isinstance(error, DatabaseError) and not isinstance(error, ValueRefused)


def settled_values(result: CallResult) -> tuple[Any, ...]:
    """Outcome, answer, tokens of prompt and answer, cost, latency, error: made to fit where they do not.

    Postgres can hold no NUL, no half of a surrogate pair and no number out of range.
    """
    return (
        result.outcome.value,
        storable(result.answer),
        _counted(result.prompt_tokens),
        _counted(result.completion_tokens),
        _finite(result.cost_usd),
        _finite(result.latency_seconds),
        storable(result.error),
    )


def storable(text: str | None) -> str | None:
    """The text without what Postgres cannot hold."""
    if text is None:
        return None
    return text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode("utf-8")


def _counted(tokens: int | None) -> int | None:
    return None if tokens is None else max(0, min(tokens, LARGEST_INTEGER))


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None
