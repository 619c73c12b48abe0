"""The task queue as a worker sees it: claim one, settle it, keep the lease, keep the house.

All decisions are made by the SQL functions in `sql/functions/`; this file calls them by name and turns driver
errors into DatabaseError. Every statement is its own transaction: none is open across a model call.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg

from router.database import InvalidValue, LeaseLost, fetch, fetch_one, retry_while_unavailable, settled_values
from router.errors import DatabaseError
from router.task import CallResult, Claim, Outcome, new_call_id

__all__ = ["InvalidValue", "LeaseLost", "QueueState", "TaskQueue", "listening"]

CHANNELS = ("router_tasks", "router_control")
OVERLOOKED_SECONDS = 60.0
SETTLE = "SELECT settle_call($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13) AS settlement"


@dataclass(frozen=True, slots=True)
class QueueState:
    """What a worker must know each second: may the batch send, which runs are over, has the roster moved."""

    held: bool
    watched: bool  # somebody watches the Variables where they are near
    left_runs: dict[str, str]  # run -> reason
    roster_version: int
    unsolved: dict[str, int]  # category -> tasks in the queue, whatever their state


@dataclass(frozen=True, slots=True)
class UnclassifiedTask:
    """A task that is to be given a category; of a long prompt, its beginning and its end."""

    task_id: int
    prompt_version: int
    prompt: str


class TaskQueue:
    """Claims and settles for one worker process. `worker` is its name in the log, new at every start."""

    def __init__(self, pool: asyncpg.Pool, *, host: str) -> None:
        self._pool = pool
        self._host = host
        self.worker = self._new_name()
        self._clock_offset_seconds = time.time() - time.monotonic()  # until the database has said it

    def _new_name(self) -> str:
        return f"{self._host}:{secrets.token_hex(6)}"

    async def start(self) -> None:
        """Begin the lease, and learn what the database's clock says."""
        if not await self.heartbeat():
            self.worker = self._new_name()
            await self.heartbeat()

    def database_time(self) -> float:
        """Seconds since 1970 by the database's clock as of the last heartbeat, not by this machine's."""
        return time.monotonic() + self._clock_offset_seconds

    async def claim(self, model: str, categories: Sequence[str], *, max_tokens: int) -> Claim | None:
        """Take one ready task of the first of `categories` that has one; None if none is ready.

        If the reply is lost the claim is given back before DatabaseError is raised, or by the lease.
        LeaseLost if this worker may not claim any more.
        """
        call_id = new_call_id(self.database_time())
        try:
            row = await self._one(
                "SELECT * FROM claim_task($1, $2, $3, $4, $5)",
                model,
                list(categories),
                self.worker,
                call_id,
                max_tokens,
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
        await retry_while_unavailable(lambda: self._one("SELECT unclaim($1)", call_id))

    async def settle(self, claim: Claim, result: CallResult) -> str:
        """Close the call and its task in one transaction; returns what became of it (see settle_call).

        Retried while Postgres is away: settling twice returns what came of the first time. What Postgres
        cannot hold (NUL, half a surrogate pair, a number out of range) is made to fit.
        """
        row = await retry_while_unavailable(
            lambda: self._one(
                SETTLE,
                claim.call_id,
                *settled_values(result),
                result.outcome.counts_as_attempt,
                claim.task_id,
                claim.model,
                claim.prompt_version,
                claim.reserved_tokens,
            )
        )
        return str(row["settlement"])

    async def give_up(self, claim: Claim, why: str) -> None:
        """Settle a claim that no call can be made for, as a counted attempt that names the reason."""
        await self.settle(claim, CallResult(Outcome.REJECTED, error=why))

    async def heartbeat(self) -> bool:
        """Prolong the lease of all this worker's claims with one statement. False if it was found gone."""
        asked_at = time.monotonic()
        row = await self._one(
            "SELECT heartbeat($1, $2) AS alive, extract(epoch FROM clock_timestamp())::float8 AS now",
            self.worker, self._host,
        )  # fmt: skip
        self._clock_offset_seconds = row["now"] - (asked_at + time.monotonic()) / 2
        return bool(row["alive"])

    def rename(self, lost: str) -> None:
        """Go on under a new name after the lease of `lost` was; claims under the old one are fenced off.

        Of several who find that out at once the first renames.
        """
        if self.worker == lost:
            self.worker = self._new_name()

    async def release(self) -> None:
        """Leave in good order: what is still held is ready again at once."""
        await self._one("SELECT release_worker($1)", self.worker)

    async def run_maintenance(self, *, release_lost: bool = True) -> None:
        """One bounded step of everything that must go on while tasks are solved; any process may do it."""
        await self._one("SELECT promote_waiting()")
        await self._one("SELECT apply_default_category()")
        if release_lost:
            await self._one("SELECT release_lost_claims()")
        await self._one("SELECT compact_counts()")

    async def wants_categories(self) -> bool:
        """Whether tasks without a category are to be given one."""
        return bool((await self._one("SELECT categorise FROM queue_settings"))["categorise"])

    async def announce_classifier(self, seconds: float) -> None:
        """Say that a categoriser will be there within `seconds`: the backlog may wait for it."""
        await self._one("SELECT announce_classifier($1)", seconds)

    async def claim_uncategorized(self, limit: int) -> list[UnclassifiedTask]:
        """Tasks to be given a category now, at most `limit`; no one else gets the same."""
        return [UnclassifiedTask(**dict(row)) for row in
                await self._many("SELECT * FROM claim_uncategorized($1)", limit)]  # fmt: skip

    async def assign_categories(
        self,
        tasks: Sequence[UnclassifiedTask],
        categories: Sequence[str],
        confidences: Sequence[float],
        reasons: Sequence[str],
    ) -> int:
        """Queue these tasks under their categories; returns how many still waited for one."""
        row = await self._one(
            "SELECT assign_categories($1, $2, $3, $4, $5) AS kept",
            [task.task_id for task in tasks],
            [task.prompt_version for task in tasks],
            list(categories),
            list(confidences),
            list(reasons),
        )
        return int(row["kept"])

    async def keep_partitions(self) -> None:
        """See to it that the call log has its partitions a week ahead."""
        await self._one("SELECT make_call_partitions()")

    async def reconcile_step(self, after: int) -> int | None:
        """Make queue and tasks agree for the next ids after `after`; the last of them, None at the end."""
        row = await self._one("SELECT next_after FROM reconcile($1)", after)
        return None if row["next_after"] is None else int(row["next_after"])

    async def state(self, runs: Sequence[str]) -> QueueState:
        """What has to be known each second, in one round trip."""
        row = await self._one("SELECT * FROM worker_state($1)", list(runs))
        return QueueState(
            held=row["held"],
            watched=row["watched"],
            left_runs=json.loads(row["left_runs"]),
            roster_version=row["roster_version"],
            unsolved=json.loads(row["unsolved"]),
        )

    async def release_orphaned_claims(self, in_flight: Collection[uuid.UUID]) -> int:
        """Give back claims of this worker, held for a minute, that nobody here works on; returns how many.

        A claim whose reply was lost can be made after it was given back.
        """
        held = await self._many("SELECT call_id FROM worker_claims($1, $2)", self.worker, OVERLOOKED_SECONDS)
        overlooked = [row["call_id"] for row in held if row["call_id"] not in in_flight]
        for call_id in overlooked:
            await self.unclaim(call_id)
        return len(overlooked)

    async def finish_run(self, run: str, reason: str) -> str:
        """Let all workers of the run leave; returns the reason that holds (the first one given)."""
        row = await self._one("SELECT finish_run($1, $2) AS reason", run, reason)
        return str(row["reason"])

    async def _one(self, statement: str, *arguments: Any) -> Any:
        return await fetch_one(self._pool, statement, *arguments)

    async def _many(self, statement: str, *arguments: Any) -> list[Any]:
        return await fetch(self._pool, statement, *arguments)


@asynccontextmanager
async def listening(url: str, heard: Callable[[str], None]) -> AsyncIterator[asyncpg.Connection]:
    """A connection of its own, in session mode, that calls `heard(channel)` for each notification."""
    try:
        connection = await asyncpg.connect(
            url, timeout=10, server_settings={"application_name": "router listener"}
        )
    except (OSError, asyncpg.PostgresError, asyncio.TimeoutError) as error:
        raise DatabaseError(f"Postgres cannot be reached: {error}") from error
    try:
        for channel in CHANNELS:
            await connection.add_listener(channel, lambda _connection, _pid, name, _payload: heard(name))
        yield connection
    finally:
        await connection.close(timeout=2)
