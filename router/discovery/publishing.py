"""The search's models, carried from the roster into `discovered.yaml` and the Variables.

Postgres comes first, in one transaction; then the file, then the Variables. Each step can be done again, and
whoever publishes next does what a death left undone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from router.database import Connection, rows
from router.discovery.discovered_file import write_discovered, writing
from router.errors import AirflowError
from router.models import VARIABLE_PREFIX
from router.settings import load_config
from router.traffic import GRAMMAR

NOT_FOUND = 404
NO_AIRFLOW = "The Variables wait: Airflow is not known here (ROUTER_AIRFLOW_URL). The roster's targets count."
# The oldest change that the Variables have not heard of; an undo's with what it set back.
_NEXT = """
SELECT e.event, e.model, e.what, e.before, u.what AS undone, u.before AS undone_before, r.default_target
  FROM roster_events e
  LEFT JOIN roster_events u ON u.event = e.undoes
  LEFT JOIN roster r ON r.model = e.model AND r.source = 'search' AND r.state <> 'retired'
 WHERE NOT e.variable_done ORDER BY e.event LIMIT 1
"""


class Variables(Protocol):
    """Airflow's Variables: `airflow_api.AirflowApi` from outside, a thin shell of Airflow's own inside it.

    AirflowError says what is wrong; with status 404 for one that is not there.
    """

    def variables(self, prefix: str = "") -> dict[str, str]:
        """All whose key starts with `prefix`."""

    def create_variable(self, key: str, value: str, description: str = "") -> bool:
        """Create it unless it is there; tells whether it was created."""

    def set_variable(self, key: str, value: str, description: str | None = None) -> None:
        """Create it, or change its value."""

    def delete_variable(self, key: str) -> None:
        """Delete it."""


def line_of(variables: Variables | None, model: str) -> dict[str, str | None]:
    """`{"variable": what it says, None if there is none}`; empty if nobody can tell."""
    if variables is None:
        return {}
    key = VARIABLE_PREFIX + model
    return {"variable": variables.variables(key).get(key)}


def publish(connection: Connection, folder: Path, variables: Variables | None) -> list[str]:
    """Write the file and the Variables as the roster has it; what is worth knowing of that, in sentences."""
    publish_file(connection, folder)
    return publish_variables(connection, variables)


def publish_file(connection: Connection, folder: Path) -> bool:
    """Write `discovered.yaml` as the roster has it; tells whether it changed.

    What stands in it and the database never heard of is taken over first, so that it is not lost.
    """
    with writing(folder):
        found = load_config(folder).model_dump(mode="json")["discovered"]
        rows(connection, "SELECT import_discovered(%s::jsonb)", (json.dumps(found),))
        return write_discovered(folder, rows(connection, "SELECT * FROM discovered_models"))


def publish_variables(connection: Connection, variables: Variables | None) -> list[str]:
    """Do to the Variables what the changes of the roster ask for, the oldest first, each once."""
    while pending := rows(connection, _NEXT):
        (event,) = pending
        if variables is None:
            return [NO_AIRFLOW]
        try:
            known = _put(variables, event)
        except AirflowError as error:
            return [f"The Variables are not all as the roster has it; the next search sees to it. {error}"]
        rows(
            connection,
            "UPDATE roster_events SET variable_done = true, before = %s::jsonb || before WHERE event = %s",
            (json.dumps(known), event["event"]),
        )
    return []


def _put(variables: Variables, event: dict[str, Any]) -> dict[str, str | None]:
    """Do what one change asks for; what the Variable was before, if that is known."""
    key, what, undone = VARIABLE_PREFIX + event["model"], event["what"], event["undone_before"] or {}
    if what == "taken" and event["default_target"] is not None:
        about = f"What {event['model']} may be sent. {GRAMMAR}"
        if variables.create_variable(key, event["default_target"], about):
            return {"variable": None}
        return line_of(variables, event["model"])
    if what == "retired":
        known = line_of(variables, event["model"])
        _delete(variables, key)
        return known
    is_back = what == "undone" and (event["undone"] == "retired" or undone.get("roster") is None)
    if is_back and event["undone"] != "promoted" and "variable" in undone:
        if undone["variable"] is None:
            _delete(variables, key)
        else:
            variables.set_variable(key, undone["variable"])
    return {}


def _delete(variables: Variables, key: str) -> None:
    try:
        variables.delete_variable(key)
    except AirflowError as error:
        if error.status != NOT_FOUND:
            raise
