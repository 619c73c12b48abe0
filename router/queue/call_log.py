"""Reads the call log, the table `model_calls`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from router.database import Connection, rows

MAX_ROWS = 10_000

_READ = """
SELECT c.call_id::text, c.task_id, c.model, c.category, c.confidence, c.role, c.rank, c.preferred, c.fallback,
       c.worker, c.attempt, c.started_at, c.sent_at, c.finished_at, c.outcome, c.settlement, c.late, c.error,
       c.prompt_tokens, c.completion_tokens, c.cost::float8 AS cost_usd, c.latency_seconds, c.client
  FROM model_calls c
 WHERE (%s::bigint IS NULL OR c.task_id = %s)
   AND (%s::text IS NULL OR c.model = %s)
   AND (%s::text IS NULL OR c.category = %s)
   AND (%s::text IS NULL OR c.client = %s)
   AND (%s::double precision IS NULL
        OR c.call_id >= first_call_id(clock_timestamp() - make_interval(secs => %s)))
 ORDER BY c.call_id DESC LIMIT %s"""


@dataclass(frozen=True, slots=True)
class LoggedCall:
    """One row of the call log; `outcome` is None while the call is in flight."""

    call_id: str
    task_id: int | None
    model: str
    category: str | None
    confidence: float | None
    role: str
    rank: int
    preferred: str | None
    fallback: str | None
    worker: str | None
    attempt: int | None
    started_at: datetime
    sent_at: datetime | None
    finished_at: datetime | None
    outcome: str | None
    settlement: str | None
    late: bool
    error: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    cost_usd: float | None
    latency_seconds: float | None
    client: str


def read_calls(
    connection: Connection,
    *,
    task_id: int | None = None,
    model: str | None = None,
    category: str | None = None,
    client: str | None = None,
    since_seconds: float | None = None,
    limit: int = 100,
) -> list[LoggedCall]:
    """Returns the calls that match, newest first; at most `limit`, and never more than MAX_ROWS."""
    wanted = (
        task_id, task_id, model, model, category, category, client, client, since_seconds, since_seconds
    )  # fmt: skip
    return [LoggedCall(**row) for row in rows(connection, _READ, (*wanted, min(limit, MAX_ROWS)))]
