"""The workers' client of the task queue: claims, settlements, leases and maintenance.

Decisions are made by the SQL functions in `sql/functions/`. Every statement is its own transaction; none
stays open during a model call.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg

from router.database import (
    UNAVAILABLE_ERRORS,
    Queryable,
    fetch,
    fetch_one,
    message_json,
    open_async_connection,
    postgres_text,
    retry_while_unavailable,
    settled_values,
    unreachable,
)
from router.errors import DatabaseError, InvalidValue, RouterError
from router.request import RequestError, read_stored
from router.task import CallResult, Claim, ContextLimit, Outcome, new_call_id

log = logging.getLogger("router.queue")

CHANNELS = ("router_tasks", "router_control")
LISTENER_SECONDS = 3.0  # for a reply on the connection that listens
ORPHANED_SECONDS = 60.0
BLOCKED_SETTLES = (
    2  # repeated attempts to settle at the same time, for tasks that other transactions have locked
)
UNUSABLE_CLAIMS = 10  # claimed tasks that cannot be read, before a claim returns without one
EDIT_BATCHES = 10  # of 1,000 edits each, in one maintenance step
CLAIM = "SELECT * FROM claim_task($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)"
DISCARD = "SELECT discard_result($1, $2, $3, $4, $5, $6, $7, $8) AS settlement"
READ_ONLY = "SELECT pg_is_in_recovery() OR current_setting('transaction_read_only')::boolean"
SETTLE = "SELECT settle_call($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14) AS settlement"


@dataclass(frozen=True, slots=True)
class QueueState:
    """State that a worker process polls every second."""

    held: bool  # the batch is paused
    watched: bool  # a process near Airflow's database watches the Variables
    left_runs: dict[str, str]  # ended run -> reason
    roster_version: int
    unsolved: dict[str, int]  # category -> queued tasks of any state


@dataclass(frozen=True, slots=True)
class UnclassifiedTask:
    """A task to classify; a long prompt is cut to its beginning and end."""

    task_id: int
    prompt_version: int
    prompt: str


class TaskQueue:
    """Claims and settles tasks for one worker process.

    `worker` is the process's unique name in the queue; all workers (one per model) of the process share it,
    and its lease. Methods raise LeaseLost, InvalidValue (not retryable) or another DatabaseError.
    Settling uses at most half of the pool, so that claims never wait behind settles of locked tasks.
    """

    def __init__(self, pool: asyncpg.Pool, *, host: str, lease: Queryable | None = None) -> None:
        """`lease` is the connection of the heartbeat; by default one of the pool."""
        self._pool = pool
        self._lease = lease or pool
        self._host = host
        self._settling = asyncio.Semaphore(max(1, pool.get_max_size() // 2))
        self._blocked = asyncio.Semaphore(BLOCKED_SETTLES)
        self.worker = self._new_name()
        self._clock_offset_seconds = time.time() - time.monotonic()  # until the first heartbeat

    def _new_name(self) -> str:
        return f"{self._host}:{secrets.token_hex(6)}"

    async def renew_lease(self) -> None:
        """Begins or extends the lease. If it has expired, begins a new one under a new name.

        Claims under the former name are fenced off.
        """
        worker = self.worker
        if not await self.heartbeat():
            log.warning("lease of worker %s expired, continuing under a new name", worker)
            self.rename(worker)
            await self.heartbeat()

    def database_time(self) -> float:
        """Returns the Unix time of the database's clock, as of the last heartbeat."""
        return time.monotonic() + self._clock_offset_seconds

    async def claim(
        self, model: str, categories: Sequence[str], *, max_tokens: int, limit: ContextLimit | None = None,
        skip_clients: Collection[str] = (),
    ) -> Claim | None:  # fmt: skip
        """Claims one ready task of the first of `categories` that has one; returns None if none is ready.

        Within a category and priority, clients take turns by their weights. Tasks of `skip_clients` stay.
        A task that exceeds `limit` is left to models that take more; if none does, it fails.

        Raises LeaseLost if the lease has expired. If the reply is lost, the claim is released before
        DatabaseError is raised, or when the lease expires. A task that cannot be read fails.
        """
        context = (
            limit.tokens if limit else None, limit.tokens_per_byte if limit else None,
            limit is None or limit.is_largest, limit.token_limit if limit else None, list(skip_clients),
        )  # fmt: skip
        for _ in range(UNUSABLE_CLAIMS):
            call_id = new_call_id(self.database_time())
            try:
                row = await self._one(
                    CLAIM, model, list(categories), self.worker, call_id, max_tokens, *context
                )
            except InvalidValue as error:
                await asyncio.shield(self._set_aside(call_id, error))
                continue
            except (DatabaseError, asyncio.CancelledError) as error:
                if not isinstance(error.__cause__, asyncpg.PostgresError):  # it may have been committed
                    await asyncio.shield(self.unclaim(call_id))
                raise
            if row is None:
                return None
            try:
                return _claim(call_id, model, row)
            except RequestError as error:
                await asyncio.shield(self._reject(call_id, f"the request cannot be sent: {error}"))
        return None

    async def leave(self, claim: Claim, models: Sequence[str], reason: str) -> None:
        """Ends a claim, unsent and uncounted, and leaves the task to `models`; without any, it fails."""
        if models:
            await self._patiently("SELECT leave_claim($1, $2)", claim.call_id, list(models))
        else:
            await self._reject(claim.call_id, f"no model in use can do what the request needs: {reason}")

    async def _reject(self, call_id: uuid.UUID, reason: str) -> None:
        await self._patiently("SELECT reject_claim($1, $2)", call_id, postgres_text(reason))

    async def _set_aside(self, call_id: uuid.UUID, error: InvalidValue) -> None:
        """Fails the task that a claim could not read; raises the error if there is none."""
        if isinstance(error.__cause__, asyncpg.PostgresError):  # the claim was rolled back: find its task
            row = await self._one("SELECT set_aside_unreadable() AS found")
        else:
            row = await self._one("SELECT reject_claim($1, $2) AS found", call_id, str(error))
        if not row["found"]:
            raise error
        log.warning("a task cannot be read and was set aside: %s", error)

    async def unclaim(self, call_id: uuid.UUID) -> None:
        """Returns a claimed task to the queue before its call is sent; the attempt does not count.

        Retries while Postgres is unavailable.
        """
        await self._patiently("SELECT unclaim($1)", call_id)

    async def settle(self, claim: Claim, result: CallResult) -> str:
        """Closes the call and its task in one transaction. Returns the settlement (see settle_call).

        Retries while Postgres is unavailable or the task is locked; settling twice returns the first
        settlement. NUL, lone surrogates and numbers out of range are replaced. A task whose result Postgres
        refuses to store fails with that reason, and no model is asked again.
        """
        values = settled_values(result)
        try:
            row = await self._patiently(
                SETTLE, claim.call_id, *values, result.outcome.counts_as_attempt, claim.task_id,
                claim.model, claim.prompt_version, claim.reserved_tokens, message_json(result),
            )  # fmt: skip
        except InvalidValue as error:
            outcome, _, prompt_tokens, completion_tokens, cost, latency, _ = values
            reason = postgres_text(f"the result of {claim.model} could not be stored: {error}")
            row = await self._patiently(
                DISCARD, claim.call_id, outcome, claim.task_id, reason, latency, cost, prompt_tokens,
                completion_tokens,
            )  # fmt: skip
        return str(row["settlement"])

    async def _patiently(self, statement: str, *arguments: Any) -> Any:
        """Runs a statement that may meet a locked row, again and again until it is done."""

        async def attempt() -> Any:
            async with self._settling:
                return await self._one(statement, *arguments)

        return await retry_while_unavailable(attempt, self._blocked)

    async def reject(self, claim: Claim, reason: str) -> None:
        """Settles a claim whose prompt cannot be sent to the model, with the outcome `rejected`."""
        await self.settle(claim, CallResult(Outcome.REJECTED, error=reason))

    async def heartbeat(self) -> bool:
        """Renews the lease. Returns False if it had expired."""
        sent_at = time.monotonic()
        row = await fetch_one(
            self._lease,
            "SELECT heartbeat($1, $2) AS alive, extract(epoch FROM clock_timestamp())::float8 AS now",
            self.worker, self._host,
        )  # fmt: skip
        self._clock_offset_seconds = row["now"] - (sent_at + time.monotonic()) / 2
        return bool(row["alive"])

    def rename(self, lost: str) -> None:
        """Continues under a new name after the lease of `lost` expired; its claims are fenced off.

        Does nothing if another task of this process has renamed it already.
        """
        if self.worker == lost:
            self.worker = self._new_name()

    async def release(self) -> None:
        """Ends the lease at shutdown and returns the tasks that are still claimed to the queue."""
        await self._one("SELECT release_worker($1)", self.worker)

    async def run_maintenance(self, *, release_lost: bool = True) -> None:
        """Runs one bounded step of maintenance: retries, edits, classification, lost claims, counters..."""
        await self._one("SELECT promote_waiting()")
        await self._one("SELECT make_schedules_if_due()")
        await self._one("SELECT release_pinned()")
        for _ in range(EDIT_BATCHES):
            if not (await self._one("SELECT apply_edits() AS applied"))["applied"]:
                break
        await self._one("SELECT apply_default_category()")
        if release_lost:
            await self._one("SELECT release_lost_claims()")
        await self._one("SELECT compact_counts()")

    async def sum_client_usage(self) -> None:
        """Sums up the latest calls by client."""
        await self._one("SELECT sum_client_usage()")

    async def classification_enabled(self) -> bool:
        """Returns whether tasks without a category are classified."""
        return bool((await self._one("SELECT categorise FROM queue_settings"))["categorise"])

    async def announce_classifier(self, seconds: float) -> None:
        """Announces that a classifier starts within `seconds`.

        Until then a maintenance step gives the default category to only a few of the tasks that waited too
        long for their classification.
        """
        await self._one("SELECT announce_classifier($1)", seconds)

    async def claim_uncategorized(self, limit: int) -> list[UnclassifiedTask]:
        """Claims at most `limit` tasks to classify."""
        found = await self._many("SELECT * FROM claim_uncategorized($1)", limit)
        return [UnclassifiedTask(**dict(row)) for row in found]

    async def assign_categories(
        self,
        tasks: Sequence[UnclassifiedTask],
        categories: Sequence[str],
        confidences: Sequence[float],
        reasons: Sequence[str],
    ) -> int:
        """Queues these tasks under their categories. Returns how many were still unclassified."""
        row = await self._one(
            "SELECT assign_categories($1, $2, $3, $4, $5) AS assigned",
            [task.task_id for task in tasks],
            [task.prompt_version for task in tasks],
            list(categories),
            list(confidences),
            list(reasons),
        )
        return int(row["assigned"])

    async def close_empty_lanes(self) -> None:
        """Runs one step of the removal of lanes without ready tasks; a removal takes three."""
        await self._one("SELECT close_empty_lanes()")

    async def create_partitions(self) -> None:
        """Creates the partitions of the call log for the next week."""
        await self._one("SELECT make_call_partitions()")

    async def learn_tokens(self) -> None:
        """Learns from the call log how many tokens a byte of a prompt has, for each model."""
        await self._one("SELECT learn_tokens()")

    async def reconcile_step(self, after: int) -> int | None:
        """Reconciles queue and tasks for the next ids after `after`. Returns the last; None at the end."""
        row = await self._one("SELECT next_after FROM reconcile($1)", after)
        return None if row["next_after"] is None else int(row["next_after"])

    async def state(self, runs: Sequence[str]) -> QueueState:
        """Reads the state in one round trip."""
        row = await self._one("SELECT * FROM worker_state($1)", list(runs))
        return QueueState(
            held=row["held"],
            watched=row["watched"],
            left_runs=json.loads(row["left_runs"]),
            roster_version=row["roster_version"],
            unsolved=json.loads(row["unsolved"]),
        )

    async def release_orphaned_claims(self, in_flight: Collection[uuid.UUID]) -> int:
        """Releases claims of this worker older than a minute and not in `in_flight`. Returns how many.

        A claim whose reply was lost can commit after its release.
        """
        claims = await self._many("SELECT call_id FROM worker_claims($1, $2)", self.worker, ORPHANED_SECONDS)
        orphaned = [row["call_id"] for row in claims if row["call_id"] not in in_flight]
        for call_id in orphaned:
            with contextlib.suppress(RouterError):  # a locked one is released by a later step
                await self._one("SELECT unclaim($1)", call_id)
        return len(orphaned)

    async def finish_run(self, run: str, reason: str) -> str:
        """Ends a run for all of its workers. Returns the reason; the first one given is kept."""
        row = await self._one("SELECT finish_run($1, $2) AS reason", run, reason)
        return str(row["reason"])

    async def _one(self, statement: str, *arguments: Any) -> Any:
        return await fetch_one(self._pool, statement, *arguments)

    async def _many(self, statement: str, *arguments: Any) -> list[Any]:
        return await fetch(self._pool, statement, *arguments)


@asynccontextmanager
async def listening(url: str, notify: Callable[[str], None]) -> AsyncIterator[asyncpg.Connection]:
    """Opens a separate connection that calls `notify(channel)` for each notification of CHANNELS."""
    try:
        connection = await open_async_connection(url, application_name="router listener")
    except (*UNAVAILABLE_ERRORS, asyncpg.PostgresError) as error:
        raise unreachable(error) from error
    try:
        for channel in CHANNELS:
            await connection.add_listener(channel, lambda _connection, _pid, name, _payload: notify(name))
        yield connection
    finally:
        await connection.close(timeout=2)


async def still_listening(connection: asyncpg.Connection) -> None:
    """Raises DatabaseError if no notification can arrive: the server does not reply, or is read-only."""
    try:
        read_only = await connection.fetchval(READ_ONLY, timeout=LISTENER_SECONDS)
    except (*UNAVAILABLE_ERRORS, asyncpg.PostgresError) as error:
        raise unreachable(error) from error
    if read_only:
        raise DatabaseError("Postgres accepts no writes: it is read-only, or a standby.")


def _claim(call_id: uuid.UUID, model: str, row: asyncpg.Record) -> Claim:
    """Returns the claim of a row of `claim_task`. Raises RequestError if the task's request is invalid."""
    values = dict(row)
    stored = values.pop("request")
    request = None if stored is None else read_stored(json.loads(stored), values["prompt"])
    return Claim(call_id=call_id, model=model, request=request, **values)
