"""Audit log entries of the console's writes, in Airflow's own audit log and in the router's table."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass
from typing import Any

from airflow.models.log import Log
from airflow.utils.session import create_session
from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from router.database import connect
from router.errors import RouterError
from router.status import record_audit

log = logging.getLogger("router.console")

READING = frozenset({"GET", "HEAD"})
EVENT_CHARACTERS = 60  # of the column


@dataclass(frozen=True, slots=True)
class Change:
    """What a request changed; never prompts, answers or secrets."""

    object: str
    before: str | None = None
    after: str | None = None


def describe(request: Request, name: str, *, before: str | None = None, after: str | None = None) -> None:
    """Adds object and values to the entry of this request."""
    request.state.change = Change(name, before, after)


async def store(url: Callable[[], str], action: str, name: str, **values: str | None) -> None:
    """Records a change that Postgres does not see in the router's own audit log."""

    def write() -> None:
        with connect(url()) as connection:
            record_audit(connection, action, name, **values)

    try:
        await asyncio.to_thread(write)
    except RouterError as error:
        log.warning("console: no entry in the table audit_log: action=%s error=%s", action, error)


class AuditedRoute(APIRoute):
    """Route that leaves an entry in Airflow's audit log for each write that succeeded."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def audited(request: Request) -> Response:
            response = await handle(request)
            if request.method not in READING and not request.scope["path"].endswith(UNAUDITED):
                await asyncio.to_thread(_log_event, f"router {self.name}", request)
            return response

        return audited


UNAUDITED = ("/ask/open",)  # opens connections only


def _log_event(event: str, request: Request) -> None:
    user, change = request.state.user, getattr(request.state, "change", None)
    about = {**request.path_params, "from": "router console", **(asdict(change) if change else {})}
    with create_session() as session:
        session.add(
            Log(
                event=event[:EVENT_CHARACTERS], owner=user.get_name(), owner_display_name=user.get_name(),
                extra=json.dumps(about),
            )
        )  # fmt: skip
