"""What the views Work and Priorities read: calls, failures, one task's story, the order of the models."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from router.database import Connection, rows
from router.errors import InputError
from router.queue import LoggedCall, Retried, read_calls, retry_failed
from router.task import Role

AMONG_CALLS = 20_000  # the newest, to be looked through for those that fit
EVIDENCE_CALLS = 10_000
STORY_CALLS = 200
MOST_REVIEWS = 60
MOST_PLACES = 12  # of a review's order: more lines than these nobody can tell apart
MOST_SHOWN = 20_000  # characters of a prompt or an answer
MOST_RETRIED = 10_000
LARGEST_ID = 2**63

_CALLS = """
SELECT call_id, task_id, model, category, confidence, role, rank, preferred, fallback, worker, attempt,
       started_at, sent_at, finished_at, outcome, settlement, late, error, prompt_tokens, completion_tokens,
       cost::float8 AS cost_usd, latency_seconds
  FROM console_calls(%s, %s, %s, %s::uuid, %s, %s)"""
_TASK = """
SELECT t.id AS task_id, t.status, s.state, s.category, s.attempt, s.wake_at, s.claimed_at, t.priority,
       t.external_id, t.deadline_at, t.created_at, t.solved_at, t.answered_by, t.answer_rank,
       t.answer_call_id, t.failure,
       left(t.prompt, %s) AS prompt, length(t.prompt) AS prompt_characters,
       left(t.answer, %s) AS answer, length(t.answer) AS answer_characters,
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
_FAILURES = "SELECT * FROM console_failures(%s, %s::timestamptz, %s)"
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
class Wanted:
    """Which calls. `outcome` may also be `wrong` or `under way`; `before` is a call_id."""

    model: str | None
    category: str | None
    outcome: str | None
    before: str | None
    limit: int


def require_model(connection: Connection, model: str) -> None:
    """InputError if no such model is on the roster."""
    if not rows(connection, "SELECT FROM roster WHERE model = %s", (model,)):
        raise InputError(f"There is no model {model!r} on the roster.")


def calls(connection: Connection, wanted: Wanted) -> dict[str, Any]:
    """The newest calls that fit, and among how many they were looked for."""
    values = (wanted.model, wanted.category, wanted.outcome, wanted.before, AMONG_CALLS, wanted.limit)
    return {"calls": rows(connection, _CALLS, values), "among": AMONG_CALLS}


def story(connection: Connection, task_id: int) -> dict[str, Any] | None:
    """A task, its calls from the oldest, and the runs they belong to; None if there is no such task."""
    if abs(task_id) >= LARGEST_ID:
        return None
    found = rows(connection, _TASK, (MOST_SHOWN, MOST_SHOWN, task_id))
    if not found:
        return None
    task = found[0]
    if task["category_reason"] is None:
        task |= next(iter(rows(connection, _REASON, (task_id,))), {})
    made = read_calls(connection, task_id=task_id, limit=STORY_CALLS)[::-1]
    return {"task": task, "calls": made, "runs": _runs_of(connection, made)}


def _runs_of(connection: Connection, made: Sequence[LoggedCall]) -> dict[str, str]:
    """call_id -> the run of solve_tasks whose worker made it, perhaps while the run was being begun."""
    batch = [call for call in made if call.role == Role.BATCH.value]
    asked = ([str(call.call_id) for call in batch], [call.started_at for call in batch])
    return {row["call_id"]: row["run"] for row in rows(connection, _RUNS, asked)}


def failures(connection: Connection, category: str | None, before: str | None, limit: int) -> dict[str, Any]:
    """The tasks that failed last. InputError if `before` is no moment."""
    if before is not None:
        try:
            datetime.fromisoformat(before)
        except ValueError as error:
            raise InputError(f"{before!r} is no moment.") from error
    return {"failures": rows(connection, _FAILURES, (category, before, limit))}


def retry(connection: Connection, category: str | None, task_ids: list[int] | None) -> Retried:
    """Set these failed tasks, or those that failed last (of the category), back to unsolved."""
    if task_ids is not None and any(abs(task_id) >= LARGEST_ID for task_id in task_ids):
        raise InputError("A task's number is at most 9223372036854775807.")
    if task_ids is None:
        newest = rows(connection, _FAILURES, (category, None, MOST_RETRIED))
        task_ids = [row["task_id"] for row in newest]
    done = Retried(0, 0)
    if task_ids:
        for done in retry_failed(connection, task_ids=task_ids):  # noqa: B007 - the last counts
            pass
    return done


class Reviews:
    """The last reviews, read again when there is a newer one: what a review moved stays as it is."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._newest: int | None = None
        self._known: list[dict[str, Any]] = []

    def read(self, connection: Connection) -> list[dict[str, Any]]:
        """A row for each category of each review, the oldest first."""
        with self._lock:
            newest = rows(connection, _NEWEST_REVIEW)[0]["review"]
            if newest != self._newest:
                self._known = rows(connection, _REVIEWS, (MOST_PLACES, MOST_PLACES, MOST_REVIEWS))
                self._newest = newest
            return self._known


def priorities(connection: Connection, reviews: Reviews) -> dict[str, Any]:
    """category -> its models in order with what the newest calls say of them; and who is not in use."""
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
