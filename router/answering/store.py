"""Asked prompts in Postgres: a task whose claim the asker holds from the start, and the calls beside it.

Decisions are made by the SQL functions in `sql/functions/70_asking.sql`; this file calls them by name. Every
statement is its own transaction: none is open across a model call.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass

import asyncpg

from router.database import fetch, fetch_one, retry_while_unavailable, settled_values
from router.errors import InputError
from router.task import AnswerRank, CallResult, Role

UNSENDABLE = "RT003"
SETTLE = (
    "SELECT settle_request_call($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)"
    " AS settled"
)


@dataclass(frozen=True, slots=True)
class CallRow:
    """What the log says of a call before it is made; the same words as the columns of `model_calls`."""

    call_id: uuid.UUID
    model: str
    role: Role
    rank: AnswerRank
    category: str
    confidence: float | None
    worker: str
    attempt: int
    reserved_tokens: int
    preferred: str | None
    fallback: str | None


@dataclass(frozen=True, slots=True)
class RequestTask:
    """The task that an asked prompt became."""

    task_id: int
    prompt_version: int


@dataclass(frozen=True, slots=True)
class DueTask:
    """A task whose deadline is near and that no model has answered."""

    task_id: int
    prompt: str
    prompt_version: int
    category: str
    confidence: float | None
    max_tokens: int | None
    seconds_left: float


async def begin(pool: asyncpg.Pool, prompt: str, deadline_seconds: float, first: CallRow) -> RequestTask:
    """Insert the prompt as a task that its first call holds. InputError if no model can be sent it."""
    try:
        row = await fetch_one(
            pool, "SELECT * FROM begin_request($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
            prompt, deadline_seconds, first.call_id, first.model, first.role.value, int(first.rank),
            first.category, first.confidence, first.worker, first.reserved_tokens,
            first.preferred, first.fallback,
        )  # fmt: skip
    except Exception as error:
        cause = error.__cause__
        if isinstance(cause, asyncpg.PostgresError) and cause.sqlstate == UNSENDABLE:
            raise InputError(f"This prompt cannot be sent to a model: {cause}.") from error
        raise
    return RequestTask(row["task_id"], row["prompt_version"])


async def add_call(pool: asyncpg.Pool, task: RequestTask, call: CallRow) -> None:
    """Write another call of the asking into the log, before it is sent."""
    await fetch(
        pool, "SELECT add_request_call($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)",
        call.call_id, task.task_id, task.prompt_version, call.model, call.role.value, int(call.rank),
        call.category, call.confidence, call.worker, call.attempt, call.reserved_tokens,
        call.preferred, call.fallback,
    )  # fmt: skip


async def settle(
    pool: asyncpg.Pool,
    task: RequestTask,
    call: CallRow,
    result: CallResult,
    *,
    late: bool,
    heir: uuid.UUID | None,
) -> str:
    """Close a call, and its task by the rule of ranks; returns what became of it (see settle_request_call).

    `heir` is an open call of the same asking that holds the task from now on; without one the task ends.
    Retried while Postgres is away: settling twice returns what came of the first time.
    """
    values = (
        call.call_id, *settled_values(result), task.task_id, call.model, call.role.value, int(call.rank),
        task.prompt_version, call.reserved_tokens, late, heir,
    )  # fmt: skip
    row = await retry_while_unavailable(lambda: fetch_one(pool, SETTLE, *values))
    return str(row["settled"])


async def forget(pool: asyncpg.Pool, call_id: uuid.UUID, why: str) -> None:
    """End a call that was not confirmed when it was written, if Postgres has it; it was never sent."""
    await fetch(pool, "SELECT discard_request_call($1, $2)", call_id, why)


async def claim_due_deadlines(
    pool: asyncpg.Pool, *, ahead_seconds: float, hold_seconds: float, limit: int
) -> list[DueTask]:
    """Tasks whose deadline is near and that no model has answered; no other process gets them meanwhile."""
    found = await fetch(
        pool, "SELECT * FROM claim_due_deadlines($1, $2, $3)", ahead_seconds, hold_seconds, limit
    )
    return [DueTask(**dict(row)) for row in found]


async def extend_deadline_claim(
    pool: asyncpg.Pool, task: DueTask, *, ahead_seconds: float, hold_seconds: float
) -> None:
    """Keep a task that was taken from other processes for so long from now on."""
    await fetch(
        pool, "SELECT extend_deadline_claim($1, $2, $3, $4)",
        task.task_id, task.prompt_version, ahead_seconds, hold_seconds,
    )  # fmt: skip


async def complete_deadline(pool: asyncpg.Pool, task: DueTask, *, ahead_seconds: float) -> None:
    """What could be had for this prompt by its deadline is kept; one that was moved away is still to come."""
    await retry_while_unavailable(
        lambda: fetch(
            pool, "SELECT complete_deadline($1, $2, $3)", task.task_id, task.prompt_version, ahead_seconds
        )
    )
