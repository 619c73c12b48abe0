"""Facts that decide why nothing is sent, as Postgres and the limiter report them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from router.errors import DatabaseError, SchemaError
from router.migrations import ProblemKind, SchemaProblem
from router.status.reasons import Reason
from router.status.why_not import Facts, ModelFacts, Report, Standstill, only
from router.traffic import TrafficTarget

if TYPE_CHECKING:
    from router.limiter import ModelTraffic

FACTS = "SELECT why_not_facts() AS facts"
START = "since:"  # before the code of a reason in a report: readers find it themselves, but not its start
TARGET_SOURCE = "target_source"  # code of a report of the api-server: where a Variable comes from
READ_ONLY_SQLSTATE = "25006"
SCHEMA_SQLSTATES = ("42",)  # an unknown table, column or function, or no right to it
_NAMED = frozenset({ProblemKind.OUTDATED, ProblemKind.TRIGGERS})  # have reasons of their own
_CODES = frozenset(reason.value for reason in Reason)


def facts_of(
    found: Mapping[str, Any] | str,
    traffic: Mapping[str, ModelTraffic] | None,
    redis_problem: str | None,
    *,
    schema: SchemaProblem | None = None,
) -> Facts:
    """Returns the facts: `found` is the result of FACTS, `traffic` the limiter's snapshots."""
    kind = schema.kind if schema is not None else None
    stored: Mapping[str, Any] = json.loads(found) if isinstance(found, str) else found
    tasks = stored["tasks"]
    return Facts(
        now=_required_time(stored["now"]),
        read_only=stored["read_only"],
        schema_problem=str(schema) if schema is not None and kind not in _NAMED else None,
        outdated=str(schema) if kind is ProblemKind.OUTDATED else None,
        triggers_problem=str(schema) if kind is ProblemKind.TRIGGERS else None,
        paused=stored["held"],
        paused_since=_time(stored["held_since"]),
        alive=stored["alive"],
        lost_at=_time(stored["lost_at"]),
        ended_at=_time(stored["ended_at"]),
        redis_problem=redis_problem,
        unsolved=tasks["unsolved"],
        running=tasks["running"],
        waiting=tasks["waiting"],
        uncategorised=tasks["uncategorised"],
        models={row["model"]: _model(row, (traffic or {}).get(row["model"])) for row in stored["models"]},
        reports=_reports(stored["reports"]),
        starts=_starts(stored["reports"]),
    )


def unreadable(error: DatabaseError) -> Standstill:
    """Returns the reason while the reader cannot read the facts itself."""
    cause = error.__cause__
    sqlstate = str(getattr(cause, "pgcode", None) or getattr(cause, "sqlstate", None) or "")
    if isinstance(error, SchemaError) or sqlstate.startswith(SCHEMA_SQLSTATES):
        return only(Reason.SCHEMA, f"The database's schema is not as expected: {error} Run `router migrate`.")
    read_only = sqlstate == READ_ONLY_SQLSTATE or "accepts no writes" in str(error)
    return only(Reason.DATABASE_READ_ONLY if read_only else Reason.DATABASE_UNAVAILABLE, str(error))


def _model(row: Mapping[str, Any], traffic: ModelTraffic | None) -> ModelFacts:
    stored = {
        "state": row["state"],
        "target": row["target"],
        "target_since": _time(row["target_since"]),
        "problem": row["problem"],
        "problem_since": _time(row["problem_since"]),
    }
    if traffic is None or traffic.target is None:  # the limiter gets the stored target with the next call
        stopped = row["target"] is not None and TrafficTarget.parse(row["target"]).stopped
        return ModelFacts(**stored, waiting_for="stopped" if stopped else None)
    return ModelFacts(
        **{**stored, "target": traffic.target},
        waiting_for=traffic.waiting_for.name.lower(),
        next_seconds=traffic.next_seconds,
        limits={**traffic.sent, **traffic.tokens},
        money=traffic.money,
        in_flight=traffic.in_flight,
        at_once=TrafficTarget.parse(traffic.target).at_once,
        breaker=traffic.breaker,
        cooldown_reason=traffic.cooldown_reason,
    )


def _reports(stored: Sequence[Mapping[str, Any]]) -> tuple[Report, ...]:
    """Returns the reports with a known code; a newer version may report others."""
    return tuple(
        Report(row["model"], Reason(row["code"]), row["detail"], _required_time(row["since"]))
        for row in stored
        if row["code"] in _CODES
    )


def _starts(stored: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], datetime]:
    """Returns (model, code) -> the earliest start that a process reports."""
    starts: dict[tuple[str, str], datetime] = {}
    for row in stored:  # the earliest is first
        if row["code"].startswith(START):
            starts.setdefault((row["model"], row["code"].removeprefix(START)), _required_time(row["since"]))
    return starts


def target_sources(found: Mapping[str, Any]) -> dict[str, str]:
    """Returns model -> where its target comes from, if that is not Airflow's database."""
    return {row["model"]: row["detail"] for row in found["reports"] if row["code"] == TARGET_SOURCE}


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else _required_time(seconds)


def _required_time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, timezone.utc)
