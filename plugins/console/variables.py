"""The traffic Variables in Airflow's metadata database: what they say, who edited them last, and editing one.

An edit here is the edit that Airflow's own form makes: the same row, the same entry in the audit log.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from airflow.models.log import Log
from airflow.models.variable import Variable
from airflow.utils.session import create_session
from sqlalchemy import select

from router.models import VARIABLE_PREFIX

EVENTS = ("post_variable", "patch_variable", "delete_variable", "bulk_variables", "import_variables")
NEWEST_EVENTS = 500  # of Variables, in the audit log; looked through once a process
SELDOM_SECONDS = 5.0
LONGEST_SHOWN = 500


@dataclass(frozen=True, slots=True)
class Edit:
    """Who edited a model's Variable last, and when."""

    by: str | None
    at: datetime | None


class TrafficVariables:
    """What the Variables say, read again when SELDOM_SECONDS are over or one was edited here."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read_at = -SELDOM_SECONDS
        self._lines: dict[str, str] = {}
        self._edits: dict[str, Edit] = {}
        self._seen_event = 0

    def read(self) -> dict[str, dict[str, Any]]:
        """model -> `{"line", "edited_by", "edited_at"}`, of models that have a Variable or had one."""
        with self._lock:
            if time.monotonic() - self._read_at > SELDOM_SECONDS:
                self._read_again()
                self._read_at = time.monotonic()
            return {model: self._about(model) for model in self._lines.keys() | self._edits.keys()}

    def set(self, model: str, line: str, user: str) -> None:
        """Make the Variable say this, its description kept, and write into the audit log who did it."""
        key = VARIABLE_PREFIX + model
        with create_session() as session:
            variable = session.scalar(select(Variable).where(Variable.key == key))
            if variable is None:
                session.add(Variable(key=key, val=line))  # type: ignore[no-untyped-call]  # Airflow's
            else:
                variable.set_val(line)
            said = json.dumps({"key": key, "value": "***", "from": "router console"})
            event = "post_variable" if variable is None else "patch_variable"
            session.add(Log(event=event, owner=user, owner_display_name=user, extra=said))
        with self._lock:
            self._read_at = -SELDOM_SECONDS

    def _about(self, model: str) -> dict[str, Any]:
        edit = self._edits.get(model, Edit(None, None))
        line = self._lines.get(model)
        shown = None if line is None else line[:LONGEST_SHOWN]
        return {"line": shown, "edited_by": edit.by, "edited_at": edit.at}

    def _read_again(self) -> None:
        with create_session() as session:
            found = session.scalars(
                select(Variable).where(Variable.key.startswith(VARIABLE_PREFIX, autoescape=True))
            )
            self._lines = {v.key.removeprefix(VARIABLE_PREFIX): str(v.val or "") for v in found}
            newest = (
                select(Log.id, Log.dttm, Log.owner, Log.extra)
                .where(Log.event.in_(EVENTS), Log.id > self._seen_event)
                .order_by(Log.id.desc())
                .limit(NEWEST_EVENTS)
            )
            for number, at, owner, extra in reversed(session.execute(newest).all()):
                self._seen_event = number
                for model in _models_in(extra):
                    self._edits[model] = Edit(owner, at)


def _models_in(extra: str | None) -> set[str]:
    """The models whose Variables an entry of the audit log names."""
    try:
        said = json.loads(extra or "null")
    except ValueError:
        return set()
    return {text.removeprefix(VARIABLE_PREFIX) for text in _strings(said) if text.startswith(VARIABLE_PREFIX)}


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
