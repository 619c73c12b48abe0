"""Starts and undoes searches for better models from the console, in a thread of the api-server."""

from __future__ import annotations

import contextvars
import logging
import threading
from collections.abc import Callable
from typing import Any

from airflow.models.log import Log
from airflow.models.variable import Variable
from airflow.utils.session import create_session
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select

from router.errors import RouterError
from router.settings import Addresses, config_folder, load_config, load_discovery, load_learning

log = logging.getLogger("router.console")

START_SECONDS = 30.0  # to read the catalogs


class SearchBody(BaseModel):
    """Body that starts a search. Default: all categories."""

    model_config = ConfigDict(extra="forbid")

    categories: list[str] | None = Field(default=None, max_length=100)


class UndoBody(BaseModel):
    """Body that undoes the last change of a model, or everything of the last search that admitted one."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(default=None, max_length=100)


class Searches:
    """Runs at most one search at a time; the database refuses a second one of another process.

    A search that the api-server's end interrupts has changed nothing, or the next one completes it.
    """

    def __init__(self, addresses: Callable[[], Addresses]) -> None:
        self._addresses = addresses

    def start(self, user: str, categories: list[str] | None) -> int | None:
        """Starts a search and returns its number, once it has one. Raises what keeps it from starting."""
        begun = threading.Event()
        found: dict[str, Any] = {"search": None, "error": None}

        def work() -> None:
            try:
                self._run(user, categories, found, begun)
            except RouterError as error:  # after the start it is recorded with the search
                found["error"] = error
            except Exception as error:
                log.exception("console: the search failed")
                found["error"] = error
            finally:
                begun.set()

        # A daemon: it must not keep the api-server from ending. The context has the actor.
        act = contextvars.copy_context().run
        threading.Thread(target=act, args=(work,), name="router console search", daemon=True).start()
        begun.wait(START_SECONDS)
        if found["search"] is None and found["error"] is not None:
            raise found["error"]
        number: int | None = found["search"]
        return number

    def undo(self, user: str, model: str | None) -> list[dict[str, Any]]:
        """Undoes the last change of a model, or everything of the last search that admitted a model."""
        from router.discovery import undo_search  # noqa: PLC0415 - takes a second

        undone = undo_search(
            self._addresses().database_url, config_folder(), by=user, model=model, variables=_Variables(user)
        )
        return [{"model": one.model, "what": one.what, "notes": one.notes} for one in undone]

    def _run(
        self, user: str, categories: list[str] | None, found: dict[str, Any], begun: threading.Event
    ) -> None:
        from router.discovery import SearchProgress, run_search  # noqa: PLC0415 - takes a second

        folder = config_folder()
        config = load_config(folder)

        def note_start(_line: str) -> None:
            if progress.search is not None and not begun.is_set():
                found["search"] = progress.search
                begun.set()

        progress = SearchProgress(note_start)
        run_search(
            self._addresses(), config, load_learning(folder, config.categories),
            load_discovery(folder, config.categories), folder, categories=categories, by=user,
            variables=_Variables(user), progress=progress,
        )  # fmt: skip


class _Variables:
    """Implements `router.discovery.publishing.Variables` on Airflow's database, with audit log entries."""

    def __init__(self, user: str) -> None:
        self._user = user

    def variables(self, prefix: str = "") -> dict[str, str]:
        with create_session() as session:
            found = session.scalars(select(Variable).where(Variable.key.startswith(prefix, autoescape=True)))
            return {variable.key: str(variable.val or "") for variable in found}

    def create_variable(self, key: str, value: str, description: str = "") -> bool:
        if key in self.variables(key):
            return False
        self.set_variable(key, value, description)
        return True

    def set_variable(self, key: str, value: str, description: str | None = None) -> None:
        with create_session() as session:
            variable = session.scalar(select(Variable).where(Variable.key == key))
            if variable is None:
                session.add(Variable(key=key, val=value, description=description))  # type: ignore[no-untyped-call]  # Airflow's
            else:
                variable.set_val(value)
            session.add(self._entry("post_variable" if variable is None else "patch_variable", key))

    def delete_variable(self, key: str) -> None:
        with create_session() as session:
            variable = session.scalar(select(Variable).where(Variable.key == key))
            if variable is not None:
                session.delete(variable)
                session.add(self._entry("delete_variable", key))

    def _entry(self, event: str, key: str) -> Log:
        extra = f'{{"key": "{key}", "value": "***", "from": "router console"}}'
        return Log(event=event, owner=self._user, owner_display_name=self._user, extra=extra)
