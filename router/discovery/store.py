"""SQL of the search: findings, models of the roster, and admitting a model.

Synchronous: the search runs these between its trials, on the connection that holds its lock.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any, Literal

import psycopg2.extras

from router.database import Connection, postgres_text, rows
from router.discovery.catalog_entry import CatalogModel
from router.discovery.trials import Grade
from router.learning import PricedModel
from router.models import RosterModel
from router.settings import ProbationSettings, RouterConfig

Verdict = Literal["refused", "unreachable", "lost", "taken", "known"]
MAX_NAME = 200
MAX_REASON = 1000
DEFAULT_CONTEXT = 8192
MAX_CALL_SECONDS = 180.0


@dataclass(frozen=True, slots=True)
class Finding:
    """The search's verdict on a model in a category; `category` None means every category."""

    model: str
    category: str | None
    catalogue: str  # spelled as in the database and in the JSON output
    verdict: Verdict
    reason: str
    trial: Mapping[str, Any] | None = None


def begin_search(connection: Connection, by: str) -> int:
    """Records a new search and returns its number. Marks searches that crashed; the caller holds the lock."""
    return int(rows(connection, "SELECT begin_search(%s) AS search", (by,))[0]["search"])


def running_search(connection: Connection) -> dict[str, Any] | None:
    """The search that runs now: `search`, `by`, `seconds` and `progress`; None if none does."""
    found = rows(connection, "SELECT search, by, seconds, progress FROM running_search()")
    return found[0] if found else None


def end_search(connection: Connection, search: int, notes: Sequence[str]) -> None:
    """Records the end of a search."""
    rows(
        connection,
        "UPDATE searches SET ended_at = clock_timestamp(), progress = NULL, notes = %s WHERE search = %s",
        (list(notes), search),
    )


def tried_since(connection: Connection, since: datetime) -> tuple[frozenset[str], float]:
    """The categories with trials since then, and the cost of these trials in USD."""
    (found,) = rows(connection, "SELECT * FROM trials_since(%s)", (since,))
    return frozenset(found["categories"]), float(found["cost_usd"])


def today(connection: Connection) -> date:
    """The database's date in UTC."""
    found: date = rows(connection, "SELECT (clock_timestamp() AT TIME ZONE 'UTC')::date AS day")[0]["day"]
    return found


def roster_names(connection: Connection, except_search: int | None = None) -> dict[str, str]:
    """Names and endpoints of the roster in any state -> description.

    Leaves out models that the search `except_search` admitted, for another category.
    """
    names = {}
    for row in rows(
        connection,
        "SELECT model, endpoint, state FROM roster r WHERE NOT (source = 'search' AND EXISTS (SELECT FROM"
        " roster_events e WHERE e.model = r.model AND e.search = %s AND e.undone_by IS NULL)) ORDER BY model",
        (except_search,),
    ):
        names[row["endpoint"]] = names[row["model"]] = f"{row['model']} on the roster ({row['state']})"
    return names


def recently_tried(connection: Connection, category: str, days: int) -> frozenset[str]:
    """Models that lost a trial of the category or were undone within `days`."""
    found = rows(connection, "SELECT model FROM recently_tried(%s, %s)", (category, days))
    return frozenset(row["model"] for row in found)


def active_models(connection: Connection, category: str) -> list[PricedModel]:
    """The active models of the category that are not below its floor, best first."""
    found = rows(
        connection,
        "SELECT r.* FROM roster r JOIN rankings k USING (model)"
        " WHERE k.category = %s AND r.state = 'active' AND k.standing <> 'low' ORDER BY k.place, r.model",
        (category,),
    )
    names = [field.name for field in dataclasses.fields(RosterModel)]
    return [
        PricedModel(
            RosterModel(**{name: row[name] for name in names if name in row}),
            float(row["input_price"]),
            float(row["output_price"]),
        )
        for row in found
    ]


def as_candidate(
    model: CatalogModel, endpoint: str, settings: ProbationSettings, config: RouterConfig
) -> PricedModel:
    """The candidate as it is tried and, if it wins, admitted."""
    # The limiter's slots are sized for the longest call of the configured models.
    longest = max((one.timeout_seconds for one in config.models.values()), default=MAX_CALL_SECONDS)
    candidate = RosterModel(
        model=model.name, endpoint=endpoint, state="probation", max_tokens=settings.max_tokens,
        timeout_seconds=min(settings.timeout_seconds, longest), default_target=settings.target,
    )  # fmt: skip
    return PricedModel(candidate, model.input_price or 0.0, model.output_price or 0.0)


def record_findings(connection: Connection, search: int, findings: Sequence[Finding]) -> None:
    """Stores findings, except those that repeat the newest finding of the model."""
    with connection.cursor() as cursor:
        psycopg2.extras.execute_values(
            cursor,
            "SELECT record_candidate(search, model, category, catalogue, verdict, reason, trial)"
            " FROM (VALUES %s) AS found (search, model, category, catalogue, verdict, reason, trial)",
            [
                (search, postgres_text(f.model)[:MAX_NAME], f.category, f.catalogue, f.verdict,
                 postgres_text(f.reason)[:MAX_REASON], None if f.trial is None else json.dumps(f.trial))
                for f in findings
            ],
            template="(%s::bigint, %s, %s::text, %s, %s, %s, %s::jsonb)",
        )  # fmt: skip


def record_grades(connection: Connection, grades: Sequence[Grade]) -> None:
    """Stores the grades of a candidate's calls, its first evidence."""
    with connection.cursor() as cursor:
        psycopg2.extras.execute_values(
            cursor,
            "INSERT INTO call_scores (call_id, source, score, reasons, scored_by) VALUES %s"
            " ON CONFLICT DO NOTHING",
            [(str(g.call_id), g.source, g.score, list(g.reasons), g.scored_by) for g in grades],
            template="(%s::uuid, %s, %s, %s::text[], %s)",
        )


def admit(
    connection: Connection, search: int, candidate: PricedModel, *, context_tokens: int | None, category: str,
    by: str, why: str, share: float, known: Mapping[str, str | None],
) -> int | None:  # fmt: skip
    """Admits a candidate on probation. Returns the event, or None if the roster has a model of that name."""
    model = candidate.model
    row = {
        "model": model.model, "endpoint": model.endpoint, "max_tokens": model.max_tokens,
        "context_tokens": context_tokens or DEFAULT_CONTEXT, "timeout_seconds": model.timeout_seconds,
        "default_target": model.default_target, "input_price": candidate.input_price,
        "output_price": candidate.output_price,
    }  # fmt: skip
    reason = postgres_text(why)[:MAX_REASON]
    found = rows(
        connection,
        "SELECT admit_candidate(%s, %s, %s::jsonb, %s, %s, %s, %s::jsonb) AS event",
        (search, by, json.dumps(row), category, share, reason, json.dumps(known)),
    )
    event = found[0]["event"]
    return None if event is None else int(event)
