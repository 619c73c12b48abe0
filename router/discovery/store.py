"""The search's own tables: what was found of each candidate, what the roster has, and taking one on.

Synchronous: the search calls these between its trials, on the connection that holds its lock.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any, Literal

import psycopg2.extras

from router.database import Connection, rows
from router.discovery.catalog_entry import CatalogModel
from router.discovery.trials import Grade, TrialModel
from router.models import RosterModel
from router.settings import ProbationSettings, RouterConfig

Verdict = Literal["refused", "unreachable", "lost", "taken", "known"]
LONGEST_NAME = 200
LONGEST_REASON = 1000
DEFAULT_CONTEXT = 8192
LONGEST_CALL_SECONDS = 180.0


@dataclass(frozen=True, slots=True)
class Finding:
    """What the search found of a model in a category; `category` None: whatever the category."""

    model: str
    category: str | None
    catalogue: str
    verdict: Verdict
    reason: str
    trial: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Placed:
    """A model of the roster in one category."""

    contender: TrialModel
    state: str
    place: int
    standing: str


def begin_search(connection: Connection, by: str) -> int:
    """A new search; its number."""
    return int(rows(connection, "INSERT INTO searches (by) VALUES (%s) RETURNING search", (by,))[0]["search"])


def end_search(connection: Connection, search: int, notes: Sequence[str]) -> None:
    """The search came to its end."""
    rows(
        connection,
        "UPDATE searches SET ended_at = clock_timestamp(), notes = %s WHERE search = %s",
        (list(notes), search),
    )


def tried_since(connection: Connection, since: datetime) -> tuple[frozenset[str], float]:
    """The categories whose candidates were tried since then, and the USD that trials cost."""
    (found,) = rows(connection, "SELECT * FROM trials_since(%s)", (since,))
    return frozenset(found["categories"]), float(found["cost_usd"])


def today(connection: Connection) -> date:
    """The database's day, in UTC."""
    found: date = rows(connection, "SELECT (clock_timestamp() AT TIME ZONE 'UTC')::date AS day")[0]["day"]
    return found


def roster_names(connection: Connection, but_of_search: int | None = None) -> dict[str, str]:
    """Names and endpoints of all models of the roster, whatever their state -> what is to be said of them.

    Not of those that the search `but_of_search` has taken on itself, for another category.
    """
    names = {}
    for row in rows(
        connection,
        "SELECT model, endpoint, state FROM roster r WHERE NOT (source = 'search' AND EXISTS (SELECT FROM"
        " roster_events e WHERE e.model = r.model AND e.search = %s AND e.undone_by IS NULL)) ORDER BY model",
        (but_of_search,),
    ):
        said = f"it is {row['model']} of the roster ({row['state']})"
        names[row["endpoint"]] = said
        names[row["model"]] = said
    return names


def resting(connection: Connection, category: str, nights: int) -> dict[str, str]:
    """Models that are left in peace in the category -> why."""
    found = rows(connection, "SELECT * FROM recently_tried(%s, %s)", (category, nights))
    return {row["model"]: row["why"] for row in found}


def placed(connection: Connection, category: str) -> list[Placed]:
    """The models in use that have a place in the category, in order."""
    found = rows(
        connection,
        "SELECT r.*, k.place, k.standing FROM roster r JOIN rankings k USING (model)"
        " WHERE k.category = %s AND r.state IN ('active', 'probation') ORDER BY k.place, r.model",
        (category,),
    )
    return [Placed(_contender(row), row["state"], row["place"], row["standing"]) for row in found]


def _contender(row: Mapping[str, Any]) -> TrialModel:
    about = {name: row[name] for name in RosterModel.__slots__}
    return TrialModel(RosterModel(**about), float(row["input_price"]), float(row["output_price"]))


def as_contender(
    model: CatalogModel, endpoint: str, settings: ProbationSettings, config: RouterConfig
) -> TrialModel:
    """A candidate as it is tried, and as it comes to the roster if it wins."""
    # A longer call would outlive its place in the limiter, which is made for people's models.
    longest = max((people.timeout_seconds for people in config.models.values()), default=LONGEST_CALL_SECONDS)
    about = RosterModel(
        model=model.name, endpoint=endpoint, state="probation", max_tokens=settings.max_tokens,
        timeout_seconds=min(settings.timeout_seconds, longest), default_target=settings.target,
    )  # fmt: skip
    return TrialModel(about, model.input_price or 0.0, model.output_price or 0.0)


def keep_findings(connection: Connection, search: int, findings: Sequence[Finding]) -> None:
    """Keep what was found, but for what the newest finding says already."""
    with connection.cursor() as cursor:
        psycopg2.extras.execute_values(
            cursor,
            "SELECT record_candidate(search, model, category, catalogue, verdict, reason, trial)"
            " FROM (VALUES %s) AS found (search, model, category, catalogue, verdict, reason, trial)",
            [
                (search, postgres_text(f.model, LONGEST_NAME), f.category, f.catalogue, f.verdict,
                 postgres_text(f.reason, LONGEST_REASON), None if f.trial is None else json.dumps(f.trial))
                for f in findings
            ],
            template="(%s::bigint, %s, %s::text, %s, %s, %s, %s::jsonb)",
        )  # fmt: skip


def keep_grades(connection: Connection, grades: Sequence[Grade]) -> None:
    """Keep the scores of a candidate's calls: its first evidence."""
    with connection.cursor() as cursor:
        psycopg2.extras.execute_values(
            cursor,
            "INSERT INTO call_scores (call_id, source, score, reasons, scored_by) VALUES %s"
            " ON CONFLICT DO NOTHING",
            [(str(g.call_id), g.source, g.score, list(g.reasons), g.scored_by) for g in grades],
            template="(%s::uuid, %s, %s, %s::text[], %s)",
        )


def take(
    connection: Connection, search: int, contender: TrialModel, *, context_tokens: int | None, category: str,
    by: str, why: str, share: float, known: Mapping[str, str | None],
) -> int | None:  # fmt: skip
    """Take a candidate on, on probation; the event, or None if the roster has that name already."""
    model = contender.model
    row = {
        "model": model.model, "endpoint": model.endpoint, "max_tokens": model.max_tokens,
        "context_tokens": context_tokens or DEFAULT_CONTEXT, "timeout_seconds": model.timeout_seconds,
        "default_target": model.default_target, "input_price": contender.input_price,
        "output_price": contender.output_price,
    }  # fmt: skip
    found = rows(
        connection,
        "SELECT admit_candidate(%s, %s, %s::jsonb, %s, %s, %s, %s::jsonb) AS event",
        (search, by, json.dumps(row), category, share, postgres_text(why, LONGEST_REASON), json.dumps(known)),
    )
    event = found[0]["event"]
    return None if event is None else int(event)


def postgres_text(text: str, longest: int) -> str:
    """The text as Postgres can keep it: without NUL and half characters, and not longer than that."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()[:longest]
