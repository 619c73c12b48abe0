"""Promotes, retires and undoes discovered models.

Each change is one transaction in Postgres and stores the rows that it replaced; then `discovered.yaml` and
the model's Variable follow (see `publishing`). Models of models.yaml are never changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from router.database import Connection, connect, rows, transaction
from router.discovery.discovered_file import require_writable
from router.discovery.probation_rules import (
    CategoryVerdict,
    ProbationVerdict,
    Step,
    category_verdict,
    probation_verdict,
)
from router.discovery.publishing import Variables, line_of, publish
from router.errors import InputError
from router.learning import Placed, order_by_evidence
from router.settings import DiscoverySettings, LearningSettings, RouterConfig

DAY_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True)
class Decision:
    """The decision on a model on probation, with its reason."""

    model: str
    step: Step
    reason: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Undone:
    """A change of a model that was undone."""

    model: str
    what: str
    notes: tuple[str, ...] = ()


def review_probation(
    url: str,
    folder: Path,
    config: RouterConfig,
    learning: LearningSettings,
    settings: DiscoverySettings,
    *,
    by: str,
    variables: Variables | None = None,
    dry_run: bool = False,
) -> list[Decision]:
    """Decides on each model on probation by its evidence. Running it again changes nothing more.

    Raises ConfigError, before any change, if `discovered.yaml` cannot be written.
    """
    if not dry_run:
        require_writable(folder)
    with connect(url, autocommit=True) as connection:
        verdicts = _verdicts(connection, config, learning, settings)
        if dry_run:
            return [Decision(model, verdict.step, verdict.reason) for model, verdict in verdicts.items()]
        return [
            _apply(connection, folder, model, verdict, by, variables) for model, verdict in verdicts.items()
        ]


def promote(url: str, folder: Path, model: str, *, by: str, variables: Variables | None = None) -> Decision:
    """Promotes a model on probation, regardless of its evidence. InputError if it is not on probation."""
    return _requested(url, folder, model, Step.PROMOTE, ("probation",), by=by, variables=variables)


def retire(url: str, folder: Path, model: str, *, by: str, variables: Variables | None = None) -> Decision:
    """Retires a discovered model. InputError if it is not a discovered model, or already retired."""
    states = ("probation", "active", "paused")
    return _requested(url, folder, model, Step.RETIRE, states, by=by, variables=variables)


def _requested(
    url: str, folder: Path, model: str, step: Step, states: Sequence[str], *, by: str,
    variables: Variables | None,
) -> Decision:  # fmt: skip
    require_writable(folder)
    with connect(url, autocommit=True) as connection:
        _require_state(connection, model, states)
        verdict = ProbationVerdict(step, f"requested by {by}")
        return _apply(connection, folder, model, verdict, by, variables)


def undo_search(
    url: str,
    folder: Path,
    *,
    by: str,
    model: str | None = None,
    search: int | None = None,
    variables: Variables | None = None,
) -> list[Undone]:
    """Undoes the last change of `model`, or everything of the models that `search` admitted.

    `search` defaults to the last one that admitted a model. Restores roster, ranks, `discovered.yaml` and the
    Variable. InputError if there is nothing to undo, or if models.yaml names the model by now.
    """
    require_writable(folder)
    with connect(url, autocommit=True) as connection:
        events = _last_event_of(connection, model) if model is not None else _events_of(connection, search)
        lines = {event["model"]: line_of(connection, variables, event["model"]) for event in events}
        with transaction(connection):
            undone = [_undone(connection, event, by, lines[event["model"]]) for event in events]
        notes = tuple(publish(connection, folder, variables))
        return [replace(one, notes=notes) for one in undone]


def _undone(
    connection: Connection, event: Mapping[str, Any], by: str, line: Mapping[str, str | None]
) -> Undone:
    done = rows(
        connection,
        "SELECT undo_roster_event(%s, %s, %s::jsonb) AS event",
        (event["event"], by, json.dumps(line)),
    )
    if done[0]["event"] is None:
        raise InputError(
            f"The change of {event['model']} cannot be undone: config/models.yaml names the model, or it was"
            " just changed."
        )
    return Undone(event["model"], event["what"])


def _verdicts(
    connection: Connection, config: RouterConfig, learning: LearningSettings, settings: DiscoverySettings
) -> dict[str, ProbationVerdict]:
    on_probation = rows(
        connection,
        "SELECT r.model, e.what,"
        " extract(epoch FROM clock_timestamp() - greatest(e.at, r.changed_at))::float8 AS seconds"
        " FROM roster r CROSS JOIN LATERAL (SELECT what, at FROM roster_events WHERE model = r.model"
        " ORDER BY event DESC LIMIT 1) AS e"
        " WHERE r.source = 'search' AND r.state = 'probation' ORDER BY r.model",
    )
    if not on_probation:
        return {}
    orders = {
        category: order
        for category, order in order_by_evidence(connection, learning).items()
        if category in config.categories
    }
    active = {row["model"] for row in rows(connection, "SELECT model FROM roster WHERE state = 'active'")}
    verdicts = {}
    for row in on_probation:
        days = row["seconds"] / DAY_SECONDS
        if row["what"] == "undone" and days < learning.undo_periods:
            verdicts[row["model"]] = ProbationVerdict(
                Step.STAY, f"its last change was undone; no decision for {learning.undo_periods} days"
            )
        else:
            of_categories = _category_verdicts(row["model"], orders, active, settings)
            verdicts[row["model"]] = probation_verdict(of_categories, days, settings.probation)
    return verdicts


def _category_verdicts(
    model: str, orders: Mapping[str, Sequence[Placed]], active: set[str], settings: DiscoverySettings
) -> list[CategoryVerdict]:
    verdicts = []
    for category, order in sorted(orders.items()):
        own = next((placed for placed in order if placed.model == model), None)
        if own is not None:
            others = [placed for placed in order if placed.model in active]
            verdicts.append(category_verdict(category, own, others, settings.probation))
    return verdicts


def _apply(  # noqa: PLR0917 - private: values of its callers
    connection: Connection,
    folder: Path,
    model: str,
    verdict: ProbationVerdict,
    by: str,
    variables: Variables | None,
) -> Decision:
    if verdict.step is Step.STAY:
        return Decision(model, verdict.step, verdict.reason)
    if verdict.step is Step.PROMOTE:
        rows(
            connection,
            "SELECT promote_model(%s, %s, %s, %s::text[], '{}')",
            (model, by, verdict.reason, list(verdict.leaves)),
        )
    else:
        line = json.dumps(line_of(connection, variables, model))
        rows(connection, "SELECT retire_model(%s, %s, %s, %s::jsonb)", (model, by, verdict.reason, line))
    return Decision(model, verdict.step, verdict.reason, tuple(publish(connection, folder, variables)))


def _require_state(connection: Connection, model: str, states: Sequence[str]) -> None:
    found = rows(connection, "SELECT state, source FROM roster WHERE model = %s", (model,))
    if not found:
        raise InputError(f"Unknown model {model[:100]!r}. `router models` lists all.")
    state, source = found[0]["state"], found[0]["source"]
    if source != "search":
        raise InputError(f"{model} was not found by a search. Edit its entry in config/models.yaml.")
    if state not in states:
        raise InputError(f"{model} is {state}, not {' or '.join(states)}.")


def _last_event_of(connection: Connection, model: str) -> list[dict[str, Any]]:
    found = rows(
        connection,
        "SELECT event, model, what FROM roster_events WHERE event = last_roster_event(%s)",
        (model,),
    )
    if not found:
        raise InputError(f"Nothing to undo for {model[:100]!r}: no search has changed it.")
    return found


def _events_of(connection: Connection, search: int | None) -> list[dict[str, Any]]:
    """All changes of the models that a search admitted, since then, newest first."""
    found = rows(
        connection,
        "WITH taken AS (SELECT model, min(event) AS first FROM roster_events"
        " WHERE what = 'taken' AND undone_by IS NULL AND search = coalesce(%s, (SELECT max(search) FROM"
        " roster_events WHERE what = 'taken' AND undone_by IS NULL)) GROUP BY model)"
        " SELECT e.event, e.model, e.what FROM roster_events e JOIN taken USING (model)"
        " WHERE e.event >= taken.first AND e.what <> 'undone' AND e.undone_by IS NULL ORDER BY e.event DESC",
        (search,),
    )
    if not found:
        which = "no search has" if search is None else f"search {search} has not"
        raise InputError(f"Nothing to undo: {which} admitted a model that is still on the roster.")
    return found
