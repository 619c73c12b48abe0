"""The task queue as a worker sees it: claim one, settle it, keep the lease, keep the house.

All decisions are made by the SQL functions in `sql/functions/`; this file calls them by name and turns driver
errors into DatabaseError. Every statement is its own transaction: none is open across a model call.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import asyncpg
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from router.errors import DatabaseError
from router.task import CallResult, Claim, Outcome, new_call_id

CHANNELS = ("router_tasks", "router_control")
SETTLE_PATIENCE_SECONDS = 600.0  # an answer that was paid for is worth waiting for Postgres
LEASE_GONE = "RT001"

T = TypeVar("T")


class LeaseLost(DatabaseError):  # noqa: N818 - a state of the world, read as one
    """The worker's lease was found gone: it must go on under a new name."""


@dataclass(frozen=True, slots=True)
class EngineState:
    """What a worker must know each second: may the batch send, which runs are over, has the roster moved."""

    held: bool
    left_runs: dict[str, str]  # run -> reason
    roster_version: int
    unsolved: dict[str, int]  # category -> tasks in the queue, whatever their state


class TaskQueue:
    """Claims and settles for one worker process. `worker` is its name in the log, new at every start."""

    def __init__(self, pool: asyncpg.Pool, *, host: str) -> None:
        self._pool = pool
        self._host = host
        self.worker = self._new_name()
        self._clock_offset_seconds = 0.0

    def _new_name(self) -> str:
        return f"{self._host}:{secrets.token_hex(6)}"

    async def start(self) -> None:
        """Begin the lease, and learn how far this machine's clock is from the database's."""
        before = time.time()
        database_now = await self._one("SELECT extract(epoch FROM clock_timestamp())::float8 AS now")
        self._clock_offset_seconds = database_now["now"] - (before + time.time()) / 2
        if not await self.heartbeat():
            self.worker = self._new_name()
            await self.heartbeat()

    async def claim(self, model: str, categories: Sequence[str], *, max_tokens: int) -> Claim | None:
        """Take one ready task of the first of `categories` that has one; None if none is ready.

        If the reply is lost the claim is given back before DatabaseError is raised, or by the lease. LeaseLost
        if this worker may not claim any more.
        """
        call_id = new_call_id(time.time() + self._clock_offset_seconds)
        try:
            row = await self._one(
                "SELECT * FROM claim_task($1, $2, $3, $4, $5)", model, list(categories), self.worker, call_id, max_tokens
            )
        except LeaseLost:
            raise
        except (DatabaseError, asyncio.CancelledError):
            await asyncio.shield(self.unclaim(call_id))
            raise
        if row is None:
            return None
        return Claim(call_id=call_id, model=model, **dict(row))

    async def unclaim(self, call_id: uuid.UUID) -> None:
        """Give a task back unsent; the attempt does not count. Retried while Postgres is away."""
        await self._patiently(lambda: self._one("SELECT unclaim($1)", call_id))

    async def settle(self, claim: Claim, result: CallResult) -> str:
        """Close the call and its task in one transaction; returns what became of it (see settle_call).

        Retried while Postgres is away: settling twice returns what came of the first time.
        """
        row = await self._patiently(
            lambda: self._one(
                "SELECT settle_call($1, $2, $3, $4, $5, $6::float8::numeric, $7, $8, $9, $10, $11, $12, $13) AS settlement",
                claim.call_id, result.outcome.value, result.answer, result.prompt_tokens, result.completion_tokens,
                result.cost_usd, result.latency_seconds, result.error, result.outcome.counts_as_attempt,
                claim.task_id, claim.model, claim.prompt_version, claim.reserved_tokens,
            )  # fmt: skip
        )
        return str(row["settlement"])

    async def give_up(self, claim: Claim, why: str) -> None:
        """Settle a claim that no call can be made for, as a counted attempt that names the reason."""
        await self.settle(claim, CallResult(Outcome.REJECTED, error=why))

    async def heartbeat(self) -> bool:
        """Prolong the lease of all this worker's claims with one statement. False if it was found gone."""
        row = await self._one("SELECT heartbeat($1, $2) AS alive", self.worker, self._host)
        return bool(row["alive"])

    def rename(self) -> None:
        """Go on under a new name after the lease was lost; claims under the old one are fenced off."""
        self.worker = self._new_name()

    async def release(self) -> None:
        """Leave in good order: what is still held is ready again at once."""
        await self._one("SELECT release_worker($1)", self.worker)

    async def keep_house(self) -> None:
        """One bounded step of everything that must go on while tasks are solved; any process may do it."""
        await self._one("SELECT promote_waiting()")
        await self._one("SELECT release_lost_claims()")
        await self._one("SELECT fold_counts()")

    async def keep_partitions(self) -> None:
        """See to it that the call log has its partitions a week ahead."""
        await self._one("SELECT make_call_partitions()")

    async def reconcile_step(self, after: int) -> int | None:
        """Make queue and tasks agree for the next ids after `after`; returns where to go on, None at the end."""
        row = await self._one("SELECT next_after FROM reconcile($1)", after)
        return None if row["next_after"] is None else int(row["next_after"])

    async def state(self, runs: Sequence[str]) -> EngineState:
        """What has to be known each second, in one round trip."""
        row = await self._one(
            "SELECT (SELECT held FROM solving) AS held,"
            " (SELECT last_value FROM roster_version) AS roster_version,"
            " ARRAY(SELECT run || E'\\n' || reason FROM runs WHERE run = ANY ($1) AND left_at IS NOT NULL) AS left_runs,"
            " ARRAY(SELECT category || E'\\n' || unsolved FROM task_counts_now) AS unsolved",
            list(runs),
        )
        counts = dict(line.split("\n", 1) for line in row["unsolved"])
        return EngineState(
            held=row["held"],
            left_runs=dict(line.split("\n", 1) for line in row["left_runs"]),
            roster_version=row["roster_version"],
            unsolved={category: int(count) for category, count in counts.items()},
        )

    async def leave_run(self, run: str, reason: str) -> str:
        """Let all workers of the run leave; returns the reason that holds (the first one given)."""
        row = await self._one("SELECT leave_run($1, $2) AS reason", run, reason)
        return str(row["reason"])

    async def _patiently(self, attempt: Callable[[], Awaitable[T]]) -> T:
        waiting = AsyncRetrying(
            retry=retry_if_exception_type(DatabaseError),
            wait=wait_random_exponential(multiplier=0.1, max=2),
            stop=stop_after_delay(SETTLE_PATIENCE_SECONDS),
            reraise=True,
        )

        async def once() -> T:
            return await attempt()

        return await waiting(once)

    async def _one(self, statement: str, *arguments: Any) -> Any:
        try:
            return await self._pool.fetchrow(statement, *arguments)
        except asyncpg.PostgresError as error:
            if error.sqlstate == LEASE_GONE:
                raise LeaseLost(str(error)) from error
            raise DatabaseError(f"Postgres refused: {error}") from error
        except (OSError, asyncpg.InterfaceError, asyncio.TimeoutError) as error:
            raise DatabaseError(f"Postgres is away: {error or type(error).__name__}") from error


@asynccontextmanager
async def listening(url: str, heard: Callable[[str], None]) -> AsyncIterator[asyncpg.Connection]:
    """A connection of its own, in session mode, that calls `heard(channel)` for each notification."""
    try:
        connection = await asyncpg.connect(url, timeout=10, server_settings={"application_name": "router listener"})
    except (OSError, asyncpg.PostgresError, asyncio.TimeoutError) as error:
        raise DatabaseError(f"Postgres cannot be reached: {error}") from error
    try:
        for channel in CHANNELS:
            await connection.add_listener(channel, lambda _connection, _pid, name, _payload: heard(name))
        yield connection
    finally:
        await connection.close(timeout=2)
