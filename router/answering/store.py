"""Requests in Postgres, through the SQL functions of `sql/functions/70_requests.sql`.

A request is a task that one of its own calls has claimed from the start. Every statement is its own
transaction: none is open while a model is called.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

import asyncpg

from router.database import fetch, fetch_one, message_json, retry_while_unavailable, settled_values
from router.errors import InputError
from router.request import ModelRequest, RequestError, read_stored
from router.task import AnswerRank, CallResult, Role

UNSENDABLE = "RT003"
BEGIN = "SELECT * FROM begin_request($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)"
SETTLE = (
    "SELECT settle_request_call($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)"
    " AS settled"
)


@dataclass(frozen=True, slots=True)
class CallRow:
    """Log row of a call before it is sent; the fields are columns of `model_calls`."""

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
    client: str = ""


@dataclass(frozen=True, slots=True)
class RequestTask:
    """Task that a request was stored as."""

    task_id: int
    prompt_version: int


@dataclass(frozen=True, slots=True)
class DueTask:
    """Task of the batch whose deadline is near and that has no model's answer."""

    task_id: int
    prompt: str
    prompt_version: int
    category: str
    confidence: float | None
    max_tokens: int | None
    seconds_left: float
    client: str = ""
    request: ModelRequest | None = None


async def begin(
    pool: asyncpg.Pool, request: ModelRequest, deadline_seconds: float, max_tokens: int | None, first: CallRow
) -> RequestTask:
    """Inserts the request as a task claimed by its first call.

    Raises InputError if the prompt cannot be sent to any model, LeaseLost if the worker has no lease.
    """
    stored = request.stored()
    try:
        row = await fetch_one(
            pool, BEGIN,
            request.conversation.text, deadline_seconds, first.call_id, first.model, first.role.value,
            int(first.rank), first.category, first.confidence, first.worker, first.reserved_tokens,
            first.preferred, first.fallback, max_tokens, first.client,
            None if stored is None else json.dumps(stored),
        )  # fmt: skip
    except Exception as error:
        cause = error.__cause__
        if isinstance(cause, asyncpg.PostgresError) and cause.sqlstate == UNSENDABLE:
            raise InputError(f"This prompt cannot be sent to a model: {cause}.") from error
        raise
    return RequestTask(row["task_id"], row["prompt_version"])


async def add_call(pool: asyncpg.Pool, task: RequestTask, call: CallRow) -> None:
    """Logs another call of the request before it is sent."""
    await fetch(
        pool, "SELECT add_request_call($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)",
        call.call_id, task.task_id, task.prompt_version, call.model, call.role.value, int(call.rank),
        call.category, call.confidence, call.worker, call.attempt, call.reserved_tokens,
        call.preferred, call.fallback, call.client,
    )  # fmt: skip


async def settle(
    pool: asyncpg.Pool,
    task: RequestTask,
    call: CallRow,
    result: CallResult,
    *,
    late: bool,
    successor: uuid.UUID | None,
) -> str:
    """Closes a call, and its task by the rule of ranks; returns the settlement (see settle_request_call).

    `successor` is an open call of the same request that takes over the claim; without one the task ends.
    Retries while Postgres is unavailable: settling is idempotent.
    """
    values = (
        call.call_id, *settled_values(result), task.task_id, call.model, call.role.value, int(call.rank),
        task.prompt_version, call.reserved_tokens, late, successor, message_json(result),
    )  # fmt: skip
    row = await retry_while_unavailable(lambda: fetch_one(pool, SETTLE, *values))
    return str(row["settled"])


async def discard(pool: asyncpg.Pool, call_id: uuid.UUID, why: str) -> None:
    """Ends a call that was never sent, if its log row was stored."""
    await fetch(pool, "SELECT discard_request_call($1, $2)", call_id, why)


async def claim_due_deadlines(
    pool: asyncpg.Pool, *, ahead_seconds: float, hold_seconds: float, limit: int
) -> list[DueTask]:
    """Claims tasks whose deadline is at most `ahead_seconds` away, for `hold_seconds`."""
    found = await fetch(
        pool, "SELECT * FROM claim_due_deadlines($1, $2, $3)", ahead_seconds, hold_seconds, limit
    )
    return [due for row in found if (due := _due_task(dict(row))) is not None]


def _due_task(values: dict[str, Any]) -> DueTask | None:
    """Returns the task; None if its request is invalid, which a claim of the batch reports."""
    stored = values.pop("request")
    try:
        request = None if stored is None else read_stored(json.loads(stored), values["prompt"])
    except RequestError:
        return None
    return DueTask(request=request, **values)


async def extend_deadline_claim(
    pool: asyncpg.Pool, task: DueTask, *, ahead_seconds: float, hold_seconds: float
) -> None:
    """Extends the claim of a due task to `hold_seconds` from now."""
    await fetch(
        pool, "SELECT extend_deadline_claim($1, $2, $3, $4)",
        task.task_id, task.prompt_version, ahead_seconds, hold_seconds,
    )  # fmt: skip


async def complete_deadline(pool: asyncpg.Pool, task: DueTask, *, ahead_seconds: float) -> None:
    """Marks the deadline of this prompt as served; one that was moved away meanwhile stays due."""
    await retry_while_unavailable(
        lambda: fetch(
            pool, "SELECT complete_deadline($1, $2, $3)", task.task_id, task.prompt_version, ahead_seconds
        )
    )
