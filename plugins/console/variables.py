"""Traffic Variables in Airflow's metadata database: reads them with their last editor, and sets them.

Setting one changes the same row and writes the same audit log entry as Airflow's own form.
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
MAX_EVENTS = 500  # audit log entries that the first read looks at
CACHE_SECONDS = 5.0
MAX_LINE_CHARACTERS = 500


@dataclass(frozen=True, slots=True)
class Edit:
    """Author and time of the last edit of a model's Variable."""

    by: str | None
    at: datetime | None


class TrafficVariables:
    """The Variables, cached for CACHE_SECONDS or until one is set."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read_at = -CACHE_SECONDS
        self._lines: dict[str, str] = {}
        self._edits: dict[str, Edit] = {}
        self._last_event = 0

    def read(self) -> dict[str, dict[str, Any]]:
        """Returns model -> `{"line", "edited_by", "edited_at"}` for models that have or had a Variable."""
        with self._lock:
            if time.monotonic() - self._read_at > CACHE_SECONDS:
                self._read_again()
                self._read_at = time.monotonic()
            return {model: self._about(model) for model in self._lines.keys() | self._edits.keys()}

    def set(self, model: str, line: str, user: str) -> str | None:
        """Sets a Variable, keeping its description, with an audit log entry. Returns the line before."""
        key = VARIABLE_PREFIX + model
        with create_session() as session:
            variable = session.scalar(select(Variable).where(Variable.key == key))
            before = None if variable is None else str(variable.val or "")[:MAX_LINE_CHARACTERS]
            if variable is None:
                session.add(Variable(key=key, val=line))  # type: ignore[no-untyped-call]  # Airflow's
            else:
                variable.set_val(line)
            extra = json.dumps({"key": key, "value": "***", "from": "router console"})
            event = "post_variable" if variable is None else "patch_variable"
            session.add(Log(event=event, owner=user, owner_display_name=user, extra=extra))
        with self._lock:
            self._read_at = -CACHE_SECONDS
        return before

    def _about(self, model: str) -> dict[str, Any]:
        edit = self._edits.get(model, Edit(None, None))
        line = self._lines.get(model)
        shown = None if line is None else line[:MAX_LINE_CHARACTERS]
        return {"line": shown, "edited_by": edit.by, "edited_at": edit.at}

    def _read_again(self) -> None:
        with create_session() as session:
            found = session.scalars(
                select(Variable).where(Variable.key.startswith(VARIABLE_PREFIX, autoescape=True))
            )
            self._lines = {v.key.removeprefix(VARIABLE_PREFIX): str(v.val or "") for v in found}
            newest = (
                select(Log.id, Log.dttm, Log.owner, Log.extra)
                .where(Log.event.in_(EVENTS), Log.id > self._last_event)
                .order_by(Log.id.desc())
                .limit(MAX_EVENTS)
            )
            for number, at, owner, extra in reversed(session.execute(newest).all()):
                self._last_event = number
                for model in _models_in(extra):
                    self._edits[model] = Edit(owner, at)


def _models_in(extra: str | None) -> set[str]:
    """Returns the models whose Variables an audit log entry names."""
    try:
        value = json.loads(extra or "null")
    except ValueError:
        return set()
    return {
        text.removeprefix(VARIABLE_PREFIX) for text in _strings(value) if text.startswith(VARIABLE_PREFIX)
    }


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
