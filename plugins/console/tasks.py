"""Data for the views Queue and Ranking: calls, failures, task details and rankings."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from router.database import Connection, rows
from router.errors import InputError
from router.queue import LoggedCall, Retried, read_calls, retry_failed
from router.status import TARGET_SOURCE
from router.task import Role

SCANNED_CALLS = 20_000  # the newest, in which matching calls are searched
EVIDENCE_CALLS = 10_000
MAX_TASK_CALLS = 200
MAX_REVIEWS = 60
MAX_RANKS = 12  # per plot: more lines are not legible
MAX_TEXT_CHARACTERS = 20_000
MAX_RETRIED = 10_000
MAX_ID = 2**63
SPEND_HOURS = (1, 24)
SPEND_CALLS = 100_000

_CALLS = """
SELECT call_id, task_id, model, category, confidence, role, rank, preferred, fallback, worker, attempt,
       started_at, sent_at, finished_at, outcome, settlement, late, error, prompt_tokens, completion_tokens,
       cost::float8 AS cost_usd, latency_seconds, client
  FROM console_calls(%s, %s, %s, %s::uuid, %s, %s, %s)"""
_TASK = """
SELECT t.id AS task_id, left(t.client, 64) AS client, t.status,
       s.state, left(s.category, 200) AS category, s.attempt, s.wake_at,
       s.claimed_at, t.priority,
       readable_text(left(t.external_id, 1000)) AS external_id,
       readable_time(t.deadline_at) AS deadline_at, readable_time(t.created_at) AS created_at,
       readable_time(t.solved_at) AS solved_at, left(t.answered_by, 200) AS answered_by, t.answer_rank,
       t.answer_call_id, readable_text(left(t.failure, 20000)) AS failure,
       readable_text(left(t.prompt, %s)) AS prompt, text_size(t.prompt) AS prompt_characters,
       readable_text(left(t.answer, %s)) AS answer, text_size(t.answer) AS answer_characters,
       q.confidence, q.category_reason
  FROM tasks t JOIN task_states s ON s.id = t.id LEFT JOIN queue q ON q.task_id = t.id
 WHERE t.id = %s"""
_REASON = """
SELECT confidence, category_reason FROM model_calls WHERE task_id = %s ORDER BY call_id DESC LIMIT 1"""
_RUNS = """
SELECT c.call_id, r.run
  FROM unnest(%s::text[], %s::timestamptz[]) AS c (call_id, at)
  CROSS JOIN LATERAL (SELECT run FROM runs
                       WHERE started_at < c.at + interval '2 minutes' AND (left_at IS NULL OR left_at >= c.at)
                       ORDER BY started_at LIMIT 1) AS r"""
_FIND = "SELECT * FROM console_find(%s, %s)"
_SPEND = "SELECT * FROM console_spend(%s, %s)"
_FAILURES = "SELECT * FROM console_failures(%s, %s::timestamptz, %s, %s)"
_RANKINGS = """
SELECT k.category, k.place, r.model, r.state, r.source, r.trouble, k.starting_place, k.standing, k.quality,
       k.least_share, k.most_share, p.reason
  FROM rankings k JOIN roster r USING (model)
  LEFT JOIN review_places p
    ON p.review = k.review AND p.category = k.category AND p.topic = '' AND p.model = k.model
 ORDER BY k.category, k.place, r.model"""
_NEWEST_REVIEW = "SELECT max(review) AS review FROM reviews"
_REVIEWS = """
SELECT p.category, v.review, v.kind, v.at, v.by,
       array_agg(p.model ORDER BY p.place, p.model) FILTER (WHERE p.place <= %s) AS order,
       coalesce(jsonb_agg(jsonb_build_object('model', p.model, 'before', p.place_before, 'after', p.place,
                                             'reason', p.reason) ORDER BY p.place)
                FILTER (WHERE p.place <> p.place_before AND least(p.place, p.place_before) <= %s),
                '[]') AS moves
  FROM (SELECT * FROM reviews ORDER BY review DESC LIMIT %s) AS v JOIN review_places p ON p.review = v.review
 WHERE p.topic = ''
 GROUP BY p.category, v.review, v.kind, v.at, v.by ORDER BY v.review"""
_EVIDENCE = "SELECT * FROM console_evidence(%s)"
_DEFAULT = "SELECT name FROM categories WHERE is_default"
_ROSTER = """
SELECT model, state, source, trouble, changed_at FROM roster WHERE state IN ('probation', 'paused', 'retired')
 ORDER BY state, model LIMIT 200"""


@dataclass(frozen=True, slots=True)
class CallFilter:
    """Selects calls. `outcome` may also be `wrong` or `under way`; `before` is a call_id."""

    model: str | None
    category: str | None
    outcome: str | None
    before: str | None
    limit: int
    client: str | None = None


def target_source(connection: Connection, model: str) -> str | None:
    """Returns where the Variable of a model is set, if that is not Airflow's database."""
    statement = "SELECT detail FROM current_worker_reports WHERE code = %s AND model = %s"
    found = rows(connection, statement, (TARGET_SOURCE, model))
    return found[0]["detail"] if found else None


def require_model(connection: Connection, model: str) -> None:
    """Raises InputError if the model is not on the roster."""
    if not rows(connection, "SELECT FROM roster WHERE model = %s", (model,)):
        raise InputError(f"There is no model {model!r} on the roster.")


def calls(connection: Connection, filters: CallFilter) -> dict[str, Any]:
    """Returns the newest matching calls and the number of calls searched."""
    values = (
        filters.model, filters.category, filters.outcome, filters.before, SCANNED_CALLS, filters.limit,
        filters.client,
    )  # fmt: skip
    return {"calls": rows(connection, _CALLS, values), "among": SCANNED_CALLS}


def task_details(connection: Connection, task_id: int) -> dict[str, Any] | None:
    """Returns a task, its calls from the oldest on, and their runs; None if there is no such task."""
    if not -MAX_ID <= task_id < MAX_ID:
        return None
    found = rows(connection, _TASK, (MAX_TEXT_CHARACTERS, MAX_TEXT_CHARACTERS, task_id))
    if not found:
        return None
    task = found[0]
    if task["category_reason"] is None:
        task |= next(iter(rows(connection, _REASON, (task_id,))), {})
    made = read_calls(connection, task_id=task_id, limit=MAX_TASK_CALLS)[::-1]
    return {"task": task, "calls": made, "runs": _runs_of(connection, made)}


def _runs_of(connection: Connection, made: Sequence[LoggedCall]) -> dict[str, str]:
    """Returns call_id -> run of solve_tasks whose worker made the call."""
    batch = [call for call in made if call.role == Role.BATCH.value]
    values = ([str(call.call_id) for call in batch], [call.started_at for call in batch])
    return {row["call_id"]: row["run"] for row in rows(connection, _RUNS, values)}


def find(connection: Connection, text: str) -> dict[str, Any]:
    """Returns the tasks whose id or external id is `text`: at most two."""
    text = text.strip()
    if not text:
        return {"tasks": []}
    number = int(text) if text.isdecimal() and int(text) < MAX_ID else None
    return {"tasks": rows(connection, _FIND, (number, text))}


def spend(connection: Connection) -> dict[str, Any]:
    """Returns calls, tokens and cost in USD by model for each of SPEND_HOURS.

    Of each span the newest SPEND_CALLS calls are read; `since` is when the first of them was made.
    """
    return {
        "spans": [
            {"hours": hours, "models": rows(connection, _SPEND, (hours, SPEND_CALLS))}
            for hours in SPEND_HOURS
        ],
        "among": SPEND_CALLS,
    }


def failures(
    connection: Connection, category: str | None, before: datetime | None, limit: int,
    client: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Returns the newest failed tasks."""
    return {"failures": rows(connection, _FAILURES, (category, before, limit, client))}


def retry(connection: Connection, category: str | None, task_ids: list[int] | None) -> Retried:
    """Requeues the given tasks, or else the newest failed ones, of a category if one is given."""
    if task_ids is None:
        newest = rows(connection, _FAILURES, (category, None, MAX_RETRIED, None))
        task_ids = [row["task_id"] for row in newest]
    done = Retried(0, 0)
    if task_ids:
        for done in retry_failed(connection, task_ids=task_ids):  # noqa: B007 - only the last is used
            pass
    return done


class RecentReviews:
    """The newest reviews, read again only when there is a new one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._newest: int | None = None
        self._cached: list[dict[str, Any]] = []

    def read(self, connection: Connection) -> list[dict[str, Any]]:
        """Returns a row for each category of each review, oldest first."""
        with self._lock:
            newest = rows(connection, _NEWEST_REVIEW)[0]["review"]
            if newest != self._newest:
                self._cached = rows(connection, _REVIEWS, (MAX_RANKS, MAX_RANKS, MAX_REVIEWS))
                self._newest = newest
            return self._cached


def ranking(connection: Connection, reviews: RecentReviews) -> dict[str, Any]:
    """Returns category -> ranked models with evidence from the newest calls; and the inactive models."""
    seen = {(row["category"], row["model"]): row for row in rows(connection, _EVIDENCE, (EVIDENCE_CALLS,))}
    categories: dict[str, list[dict[str, Any]]] = {}
    for row in rows(connection, _RANKINGS):
        evidence = seen.get((row["category"], row["model"]), {})
        categories.setdefault(row.pop("category"), []).append({
            **row,
            **{name: evidence.get(name) for name in ("calls", "answered", "seconds", "cost")},
        })  # fmt: skip
    default = next((row["name"] for row in rows(connection, _DEFAULT)), None)
    return {
        "categories": categories, "default": default, "others": rows(connection, _ROSTER),
        "among": EVIDENCE_CALLS,
        "reviews": reviews.read(connection),
    }  # fmt: skip
