"""Publishes the discovered models of the roster to `discovered.yaml` and to the Variables of Airflow.

Postgres comes first, in one transaction; then the file; then the Variables. Each step is idempotent, and the
next publication completes what a crash left.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from router.database import Connection, rows
from router.discovery.discovered_file import write_discovered, writing
from router.errors import AirflowError
from router.models import MASK, VARIABLE_PREFIX
from router.settings import load_config
from router.traffic import GRAMMAR

NOT_FOUND = 404
NO_AIRFLOW = "Variables unchanged: ROUTER_AIRFLOW_URL is not set. The roster's targets apply."
# The oldest change that is not in the Variables yet; for an undo, with the change that it undid.
_NEXT = """
SELECT e.event, e.model, e.what, e.before, u.what AS undone, u.before AS undone_before, r.default_target
  FROM roster_events e
  LEFT JOIN roster_events u ON u.event = e.undoes
  LEFT JOIN roster r ON r.model = e.model AND r.source = 'search' AND r.state <> 'retired'
 WHERE NOT e.variable_done ORDER BY e.event LIMIT 1
"""


class Variables(Protocol):
    """Airflow's Variables: `AirflowApi` over HTTP, or Airflow's own API inside a task.

    All methods raise AirflowError, with status 404 for a Variable that does not exist.
    """

    def variables(self, prefix: str = "") -> dict[str, str]:
        """The Variables whose key starts with `prefix`."""

    def create_variable(self, key: str, value: str, description: str = "") -> bool:
        """Creates a Variable; returns False if it exists."""

    def set_variable(self, key: str, value: str, description: str | None = None) -> None:
        """Creates a Variable or changes its value."""

    def delete_variable(self, key: str) -> None:
        """Deletes a Variable."""


def line_of(connection: Connection, variables: Variables | None, model: str) -> dict[str, str | None]:
    """`{"variable": value, or None if it does not exist}`; empty if Airflow is not configured.

    If Airflow masks the value, it is the target in use, or empty if there is none.
    """
    if variables is None:
        return {}
    key = VARIABLE_PREFIX + model
    value = variables.variables(key).get(key)
    if value != MASK:
        return {"variable": value}
    in_use = rows(connection, "SELECT target FROM newest_targets WHERE model = %s", (model,))
    return {"variable": in_use[0]["target"]} if in_use else {}


def publish(connection: Connection, folder: Path, variables: Variables | None) -> list[str]:
    """Writes the file and the Variables from the roster. Returns notes for people."""
    publish_file(connection, folder)
    return publish_variables(connection, variables)


def publish_file(connection: Connection, folder: Path) -> bool:
    """Writes `discovered.yaml` from the roster; returns whether it changed.

    Models of the file that are new to the database are imported first, so that they are not lost.
    """
    with writing(folder):
        found = load_config(folder).model_dump(mode="json")["discovered"]
        rows(connection, "SELECT import_discovered(%s::jsonb)", (json.dumps(found),))
        return write_discovered(folder, rows(connection, "SELECT * FROM discovered_models"))


def publish_variables(connection: Connection, variables: Variables | None) -> list[str]:
    """Applies the roster's changes to the Variables, oldest first, each once. Returns notes for people."""
    while pending := rows(connection, _NEXT):
        (event,) = pending
        if variables is None:
            return [NO_AIRFLOW]
        try:
            before = _apply(connection, variables, event)
        except AirflowError as error:
            return [f"Not all Variables match the roster; the next search updates them. {error}"]
        rows(
            connection,
            "UPDATE roster_events SET variable_done = true, before = %s::jsonb || before WHERE event = %s",
            (json.dumps(before), event["event"]),
        )
    return []


def _apply(connection: Connection, variables: Variables, event: dict[str, Any]) -> dict[str, str | None]:
    """Applies one change. Returns the Variable's previous value as in `line_of`, if it is known."""
    key, what, undone = VARIABLE_PREFIX + event["model"], event["what"], event["undone_before"] or {}
    if what == "taken" and event["default_target"] is not None:
        description = f"Traffic target of {event['model']}. {GRAMMAR}"
        if variables.create_variable(key, event["default_target"], description):
            return {"variable": None}
        return line_of(connection, variables, event["model"])
    if what == "retired":
        before = line_of(connection, variables, event["model"])
        _delete(variables, key)
        return before
    is_restored = what == "undone" and (event["undone"] == "retired" or undone.get("roster") is None)
    if is_restored and event["undone"] != "promoted" and "variable" in undone:
        if undone["variable"] is None:
            _delete(variables, key)
        elif undone["variable"] != MASK:  # earlier versions stored it
            variables.set_variable(key, undone["variable"])
    return {}


def _delete(variables: Variables, key: str) -> None:
    try:
        variables.delete_variable(key)
    except AirflowError as error:
        if error.status != NOT_FOUND:
            raise
