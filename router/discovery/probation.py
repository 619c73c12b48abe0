"""Models on probation: promoted into the ranking, retired by their log, or set back by people.

Each change is one transaction in Postgres, kept with what it replaced; then `discovered.yaml` and the model's
Variable follow (`publishing`). What people wrote into models.yaml is never touched.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from router.database import Connection, connect, rows, transaction
from router.discovery.discovered_file import require_writable
from router.discovery.probation_rules import ProbationVerdict, Stand, Step, probation_verdict, stand_in
from router.discovery.publishing import Variables, line_of, publish
from router.errors import InputError
from router.learning import Placed, order_by_evidence
from router.settings import DiscoverySettings, LearningSettings, RouterConfig

NIGHT_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True)
class Decision:
    """What became of a model on probation, and why; `stay`: nothing yet."""

    model: str
    step: Step
    reason: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Undone:
    """A change of a model that was set back."""

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
    """Let the log decide on each model on probation, by the evidence that is summed up.

    Done again it changes nothing more.
    ConfigError, before anything is changed, if `discovered.yaml` could not be written.
    """
    if not dry_run:
        require_writable(folder)
    with connect(url, autocommit=True) as connection:
        verdicts = _verdicts(connection, config, learning, settings)
        if dry_run:
            return [Decision(model, verdict.step, verdict.reason) for model, verdict in verdicts.items()]
        return [
            _carried_out(connection, folder, model, verdict, by, variables)
            for model, verdict in verdicts.items()
        ]


def promote(url: str, folder: Path, model: str, *, by: str, variables: Variables | None = None) -> Decision:
    """Promote a model that is on probation, whatever its log says. InputError if it is not."""
    require_writable(folder)
    with connect(url, autocommit=True) as connection:
        _require_state(connection, model, ("probation",))
        verdict = ProbationVerdict(Step.PROMOTE, f"{by} said so")
        return _carried_out(connection, folder, model, verdict, by, variables)


def retire(url: str, folder: Path, model: str, *, by: str, variables: Variables | None = None) -> Decision:
    """Retire a model that the search found. InputError if it is not one of them, or is retired already."""
    require_writable(folder)
    with connect(url, autocommit=True) as connection:
        _require_state(connection, model, ("probation", "active", "paused"))
        verdict = ProbationVerdict(Step.RETIRE, f"{by} said so")
        return _carried_out(connection, folder, model, verdict, by, variables)


def undo_search(
    url: str,
    folder: Path,
    *,
    by: str,
    model: str | None = None,
    search: int | None = None,
    variables: Variables | None = None,
) -> list[Undone]:
    """Set back the last change of `model`; or all that `search`, by default the last that took any, took on.

    Roster, places, `discovered.yaml` and the Variable are then what they were before. InputError if there is
    nothing to set back, or if people own the model now.
    """
    require_writable(folder)
    with connect(url, autocommit=True) as connection:
        events = _last_event_of(connection, model) if model is not None else _events_of(connection, search)
        lines = {event["model"]: line_of(variables, event["model"]) for event in events}
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
            f"{event['model']} cannot be set back: config/models.yaml names it by now, or somebody has just"
            " changed it."
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
        key.category: order
        for key, order in order_by_evidence(connection, learning).items()
        if not key.topic and key.category in config.categories
    }
    active = {row["model"] for row in rows(connection, "SELECT model FROM roster WHERE state = 'active'")}
    verdicts = {}
    for row in on_probation:
        nights = row["seconds"] / NIGHT_SECONDS
        if row["what"] == "undone" and nights < learning.undo_periods:
            verdicts[row["model"]] = ProbationVerdict(
                Step.STAY, f"somebody set it back; left alone for {learning.undo_periods} nights"
            )
        else:
            stands = _stands(row["model"], orders, active, settings)
            verdicts[row["model"]] = probation_verdict(stands, nights, settings.probation)
    return verdicts


def _stands(
    model: str, orders: Mapping[str, Sequence[Placed]], active: set[str], settings: DiscoverySettings
) -> list[Stand]:
    stands = []
    for category, order in sorted(orders.items()):
        own = next((placed for placed in order if placed.model == model), None)
        if own is not None:
            others = [placed for placed in order if placed.model in active]
            stands.append(stand_in(category, own, others, settings.probation))
    return stands


def _carried_out(  # noqa: PLR0917 - private: what its callers have at hand
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
        known = json.dumps(line_of(variables, model))
        rows(connection, "SELECT retire_model(%s, %s, %s, %s::jsonb)", (model, by, verdict.reason, known))
    return Decision(model, verdict.step, verdict.reason, tuple(publish(connection, folder, variables)))


def _require_state(connection: Connection, model: str, states: Sequence[str]) -> None:
    found = rows(connection, "SELECT state, source FROM roster WHERE model = %s", (model,))
    if not found:
        raise InputError(f"There is no model {model[:100]!r}. `router models` shows all.")
    state, source = found[0]["state"], found[0]["source"]
    if source != "search":
        raise InputError(f"{model} is not the search's but people's: config/models.yaml says what it is.")
    if state not in states:
        raise InputError(f"{model} is {state}, not {' or '.join(states)}.")


def _last_event_of(connection: Connection, model: str) -> list[dict[str, Any]]:
    found = rows(
        connection,
        "SELECT event, model, what FROM roster_events WHERE event = last_roster_event(%s)",
        (model,),
    )
    if not found:
        raise InputError(f"There is nothing to set back of {model[:100]!r}: no search has changed it.")
    return found


def _events_of(connection: Connection, search: int | None) -> list[dict[str, Any]]:
    """All that became of the models that a search took on, since it did: the newest first."""
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
        which = "No search has" if search is None else f"Search {search} has not"
        raise InputError(f"There is nothing to set back: {which} taken on a model that is still there.")
    return found
