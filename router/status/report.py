"""Status report: tasks by state, target, usage and errors of each model, and why nothing is sent.

The backlog comes from counters and from the queue's partial indexes; the table of tasks is never scanned.
Usage comes from the limiter, or from the call log while Redis is unavailable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from router.database import Connection, rows
from router.errors import first_line
from router.limiter import WaitReason
from router.migrations import blocking_problem
from router.status.facts import FACTS, facts_of, target_sources
from router.status.reasons import WhyNot
from router.status.why_not import standstill_of
from router.traffic import MICRO_USD, TrafficTarget

if TYPE_CHECKING:
    from router.limiter import ModelTraffic

RECENT_CALLS = 5000  # the newest calls that are searched for errors
RECENT_MINUTES = 10
MAX_CLIENTS = 100  # those with the largest backlog

_COUNTS = "SELECT category, unsolved, solved, failed FROM task_counts_now ORDER BY category"
_CLIENTS = """
SELECT client, unsolved, solved, failed FROM client_counts_now
 WHERE (unsolved, solved, failed) IS DISTINCT FROM (0::bigint, 0::bigint, 0::bigint)
   AND (%s::text IS NULL OR client = %s)
 ORDER BY unsolved DESC, client LIMIT %s"""
_MODELS = """
SELECT r.model, r.state, r.trouble, r.default_target, k.target AS kept_target, k.in_force_at,
       t.line AS bad_line, t.problem AS bad_problem, t.since AS bad_since
  FROM roster r LEFT JOIN newest_targets k USING (model) LEFT JOIN traffic_troubles t USING (model)
 WHERE r.state <> 'retired' ORDER BY r.model"""
_IN_FLIGHT = """
SELECT c.model, count(*) AS calls FROM queue q JOIN model_calls c ON c.call_id = q.call_id
 WHERE q.state = 'claimed' GROUP BY c.model"""
# The time is a subquery: otherwise it is computed for each row and no index is used.
_RECENT = """
SELECT model, count(*) AS calls, count(*) FILTER (WHERE wrong) AS failed,
       (array_agg(outcome || coalesce(': ' || error, '') ORDER BY call_id DESC)
          FILTER (WHERE wrong))[1] AS last_error
  FROM (SELECT *, outcome NOT IN ('answered', 'unsent') AS wrong FROM model_calls
         WHERE call_id >= (SELECT first_call_id(clock_timestamp() - make_interval(mins => %s)))
           AND outcome IS NOT NULL
         ORDER BY call_id DESC LIMIT %s) AS recent
 GROUP BY model"""
_LAST_MINUTE = """
SELECT model, count(*) AS calls FROM model_calls
 WHERE call_id >= (SELECT first_call_id(clock_timestamp() - interval '15 minutes'))
   AND outcome IS DISTINCT FROM 'unsent'
   AND coalesce(sent_at, finished_at, clock_timestamp()) > clock_timestamp() - interval '1 minute'
 GROUP BY model"""

_NO_CALLS: Mapping[str, Any] = {"calls": 0, "failed": 0, "last_error": None}


@dataclass(frozen=True, slots=True)
class TaskCounts:
    """Number of tasks by state. unsolved = uncategorised + ready + waiting for a retry + running."""

    unsolved: int
    uncategorised: int
    ready: int
    waiting: int
    running: int
    solved: int
    failed: int


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """Status of one model.

    target: the active one, or the last one (`target_kept`); None if there never was one.
    sent, tokens: usage by limit, e.g. `{"120/min": 96}`; None while the limiter is unavailable.
    money_usd: likewise in US dollars, e.g. `{"$20/d": 12.5}`. forecast_usd: what it comes to by its end.
    in_flight: calls in flight, or tasks claimed for the model where its target has no concurrency limit.
    waiting_for: name of a WaitReason in lower case. breaker: `closed`, `open` or `half-open`.
    calls, failed_calls: of the last RECENT_MINUTES minutes. trouble: the most severe error.
    warnings: limits that can never bind, and limits above the provider's quota.
    refused: recent 429s, the last of them `refused_seconds` ago.
    target_source: where the Variable is set, if it is not in Airflow's database: edits there have no effect.
    """

    model: str
    state: str
    target: str | None
    target_kept: bool
    target_since: datetime | None
    sent: Mapping[str, int] | None
    tokens: Mapping[str, int] | None
    sent_last_minute: int | None
    in_flight: int
    at_once: int | None
    waiting_for: str | None
    resting_seconds: float
    calls: int
    failed_calls: int
    last_error: str | None
    trouble: str | None
    warnings: tuple[str, ...] = ()
    breaker: str | None = None
    refused: int = 0
    refused_seconds: float | None = None
    why_not: WhyNot | None = None
    target_source: str | None = None
    money_usd: Mapping[str, float] | None = None
    forecast_usd: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Status:
    """Everything that `router status` shows. `notes` are warnings about the system, one sentence each.

    why_not: why no model sends; None if one may.
    clients: task counts of the MAX_CLIENTS with most unsolved tasks.
    """

    tasks: TaskCounts
    categories: Mapping[str, Mapping[str, int]]
    models: tuple[ModelStatus, ...]
    workers: int
    held: bool
    notes: tuple[str, ...] = field(default=())
    why_not: WhyNot | None = None
    clients: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """Returns the status as `--json` prints it, with models by name."""
        return {
            "tasks": self.tasks,
            "categories": self.categories,
            "clients": self.clients,
            "models": {model.model: model for model in self.models},
            "workers": self.workers,
            "held": self.held,
            "notes": self.notes,
            "why_not": self.why_not,
        }


def read_status(connection: Connection, redis_url: str | None, client: str | None = None) -> Status:
    """Reads the current status; of the clients' tasks only those of `client`, if it is given.

    An unavailable Redis is a note and not an error. Raises DatabaseError.
    """
    from router.limiter import read_limiter  # noqa: PLC0415 - its import takes half a second

    rows(connection, "SET LOCAL statement_timeout = '10s'")
    counts = {row.pop("category"): row for row in rows(connection, _COUNTS)}
    clients = {row.pop("client"): row for row in rows(connection, _CLIENTS, (client, client, MAX_CLIENTS))}
    schema = blocking_problem(connection)
    found = rows(connection, FACTS)[0]["facts"]
    models = rows(connection, _MODELS)
    live, problem = read_limiter(redis_url, [row["model"] for row in models])
    standstill = standstill_of(facts_of(found, live, problem, schema=schema))
    return Status(
        tasks=_task_counts(counts, found["tasks"]),
        categories=counts,
        models=_model_statuses(connection, models, live, standstill.models, target_sources(found)),
        workers=found["workers"],
        held=found["held"],
        notes=tuple(why.text for why in standstill.everywhere),
        why_not=standstill.whole,
        clients=clients,
    )


def _task_counts(counts: Mapping[str, Mapping[str, int]], states: Mapping[str, Any]) -> TaskCounts:
    unsolved, solved, failed = (
        sum(count[state] for count in counts.values()) for state in ("unsolved", "solved", "failed")
    )
    not_ready = states["running"] + states["waiting"] + states["uncategorised"]
    ready = max(0, unsolved - not_ready)
    return TaskCounts(
        unsolved, states["uncategorised"], ready, states["waiting"], states["running"], solved, failed
    )


def _model_statuses(
    connection: Connection,
    models: Sequence[Mapping[str, Any]],
    live: Mapping[str, ModelTraffic] | None,
    reasons: Mapping[str, WhyNot | None],
    sources: Mapping[str, str],
) -> tuple[ModelStatus, ...]:
    in_flight = {row["model"]: row["calls"] for row in rows(connection, _IN_FLIGHT)}
    recent = {row["model"]: row for row in rows(connection, _RECENT, (RECENT_MINUTES, RECENT_CALLS))}
    minute = {row["model"]: row["calls"] for row in rows(connection, _LAST_MINUTE)} if live is None else None
    return tuple(
        _model_status(
            row,
            live.get(row["model"]) if live is not None else None,
            claimed=in_flight.get(row["model"], 0),
            calls=recent.get(row["model"], _NO_CALLS),
            last_minute=None if minute is None else minute.get(row["model"], 0),
            reason=reasons.get(row["model"]),
            source=sources.get(row["model"]),
        )
        for row in models
    )


def _model_status(
    row: Mapping[str, Any],
    traffic: ModelTraffic | None,
    *,
    claimed: int,
    calls: Mapping[str, Any],
    last_minute: int | None,
    reason: WhyNot | None,
    source: str | None,
) -> ModelStatus:
    active = traffic.target if traffic is not None else None
    target = active or row["kept_target"]
    parsed = TrafficTarget.parse(target) if target else None
    at_once = parsed.at_once if parsed else None
    limited = traffic is not None and active is not None and at_once is not None
    return ModelStatus(
        model=row["model"],
        state=row["state"],
        target=target,
        target_kept=target is not None and active is None,
        target_since=row["in_force_at"] if target == row["kept_target"] else None,
        sent=traffic.sent if traffic is not None else None,
        tokens=traffic.tokens if traffic is not None else None,
        sent_last_minute=last_minute,
        in_flight=traffic.in_flight if traffic is not None and limited else claimed,
        at_once=at_once,
        waiting_for=_waiting_for(traffic),
        resting_seconds=traffic.cooldown_seconds if traffic is not None else 0.0,
        calls=calls["calls"],
        failed_calls=calls["failed"],
        last_error=first_line(calls["last_error"] or "") or None,
        trouble=_trouble(row, traffic),
        warnings=(*(parsed.warnings if parsed else ()), *_quota_warnings(traffic)),
        breaker=traffic.breaker if traffic is not None else None,
        refused=traffic.refused if traffic is not None else 0,
        refused_seconds=traffic.refused_seconds if traffic is not None else None,
        why_not=reason,
        target_source=source,
        money_usd=in_usd(traffic.money) if traffic is not None else None,
        forecast_usd=in_usd(traffic.forecast(datetime.now(timezone.utc))) if traffic is not None else None,
    )


def in_usd(money: Mapping[str, int]) -> dict[str, float]:
    """Converts amounts in millionths of a US dollar."""
    return {limit: micro / MICRO_USD for limit, micro in money.items()}


def _quota_warnings(traffic: ModelTraffic | None) -> tuple[str, ...]:
    if traffic is None:
        return ()
    return (*((traffic.quota_warning,) if traffic.quota_warning else ()), *traffic.budget_warnings)


def _waiting_for(traffic: ModelTraffic | None) -> str | None:
    if traffic is None or traffic.waiting_for is WaitReason.NOTHING:
        return None
    return traffic.waiting_for.name.lower()


def _trouble(row: Mapping[str, Any], traffic: ModelTraffic | None) -> str | None:
    """Returns the most severe error of the model; None if there is none."""
    if row["bad_problem"]:
        return f"invalid traffic Variable: {first_line(row['bad_problem'])}"
    if row["trouble"]:
        return str(row["trouble"])
    if traffic is not None and traffic.cooldown_seconds > 0:
        return f"cooling down {traffic.cooldown_seconds:.0f} s: {traffic.cooldown_reason or '429 or 503'}"
    return None
