"""The console's API and its static files, as one small FastAPI application; see `docs/console.md`."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from airflow.models.connection import Connection
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from model_worker import addresses_of
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.database import Connection as Database
from router.database import connect
from router.errors import CapacityExceeded, ConfigError, DatabaseError, InputError, RouterError
from router.queue.tasks import Retried
from router.settings.environment import Addresses, config_folder

from . import auth, dashboard, discovery, routes, tasks
from .ask import Asks
from .live import Kept, Live, as_line
from .readers import Reads
from .variables import TrafficVariables

log = logging.getLogger("router.console")

FOLDER = Path(__file__).parent
KEPT_SECONDS = 5.0  # of what changes once a night
STATIC = {
    "page": ("page.html", "text/html; charset=utf-8"),
    **{
        name: (name, "text/javascript; charset=utf-8")
        for name in (
            "console.js",
            "draw.js",
            "traffic.js",
            "model_row.js",
            "work.js",
            "lists.js",
            "story.js",
            "priorities.js",
            "search.js",
            "ask.js",
        )
    },
    "console.css": ("console.css", "text/css; charset=utf-8"),
}
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
        " frame-ancestors 'self'; base-uri 'none'; form-action 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class Console:
    """ASGI application; `app` is the FastAPI application behind its careful door."""

    def __init__(self) -> None:
        self.reads = Reads(lambda: addresses().database_url)
        self.variables = TrafficVariables()
        self._board = dashboard.Board()
        self.history = dashboard.History()
        reviews, criteria = tasks.Reviews(), discovery.Criteria(config_folder())
        self.priorities = self._kept(lambda connection: tasks.priorities(connection, reviews))
        self.search = self._kept(lambda connection: discovery.found(connection, criteria))
        self.live = Live(self._read_board)
        self.asks = Asks(addresses)
        self.app = FastAPI(title="Router console", openapi_url=None, docs_url=None, redoc_url=None)
        self.app.state.console = self
        self.app.include_router(routes.api, prefix="/api")
        for path in STATIC:
            self.app.add_api_route(f"/{path}", _static, methods=["GET"], name=path)
        self.app.add_api_route(
            "/{anything:path}", _nothing, methods=["GET", "PUT", "POST", "PATCH", "DELETE", "HEAD"]
        )
        for kind in (StarletteHTTPException, RequestValidationError, RouterError):
            self.app.add_exception_handler(kind, _refuse)
        self._door = Careful(self.app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._door(scope, receive, send)

    async def close(self) -> None:
        """End what is under way, and disconnect."""
        await self.live.close()
        await self.asks.close()
        await asyncio.to_thread(self.reads.close)

    async def retry(self, category: str | None, task_ids: list[int] | None) -> Retried:
        """Set failed tasks back to unsolved."""

        def write() -> Retried:
            with connect(addresses().database_url) as connection:
                return tasks.retry(connection, category, task_ids)

        return await asyncio.to_thread(write)

    def _kept(self, read: Callable[[Database], dict[str, Any]]) -> Kept:
        return Kept(lambda: self.reads.run(lambda connection: as_line(read(connection))), KEPT_SECONDS)

    async def _read_board(self) -> dict[str, Any]:
        redis_url = await asyncio.to_thread(lambda: addresses().redis_url)
        now = await self.reads.run(lambda connection: self._board.read(connection, redis_url))
        with contextlib.suppress(Exception):  # without it the targets in force are shown all the same
            now["variables"] = await asyncio.to_thread(self.variables.read)
        return now


class Careful:
    """ASGI middleware: the headers of every answer, and a plain word instead of a fault of the program."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def send_with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                more = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                own = list(message["headers"])
                if not any(name == b"cache-control" for name, _ in own):
                    more.append((b"cache-control", b"no-store"))
                message = {**message, "headers": own + more}
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            number = secrets.token_hex(4)
            log.exception("fault %s in the console, at %s", number, scope.get("path"))
            if not begun:
                words = f"Something went wrong here. The api-server's log has it as fault {number}."
                await JSONResponse({"error": words}, 500)(scope, receive, send_with_headers)


async def _static(request: Request, _user: auth.Reader) -> Response:
    name, kind = STATIC[request.scope["route"].name]
    content = await asyncio.to_thread((FOLDER / name).read_bytes)
    mark = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = {"etag": mark, "cache-control": "private, no-cache"}
    if request.headers.get("if-none-match") in (mark, f"W/{mark}"):
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=kind, headers=headers)


async def _nothing(_user: auth.Reader) -> Response:
    raise HTTPException(404, "There is nothing here.")


async def _refuse(_request: Request, error: Exception) -> JSONResponse:
    """What went wrong, in words for people, with the HTTP status that fits."""
    if isinstance(error, StarletteHTTPException):
        return JSONResponse({"error": str(error.detail)}, error.status_code, headers=error.headers)
    if isinstance(error, CapacityExceeded):
        wait = {"retry-after": f"{error.retry_after_seconds:.0f}"}
        return JSONResponse({"error": str(error)}, 503, headers=wait)
    if isinstance(error, RequestValidationError):
        fault = error.errors()[0]
        return JSONResponse({"error": f"{fault['loc'][-1]}: {fault['msg']}"}, 422)
    if isinstance(error, (ConfigError, InputError)):
        return JSONResponse({"error": str(error)}, 422)
    if isinstance(error, DatabaseError):
        return JSONResponse({"error": str(error)}, 503)
    log.warning("the console cannot do it: %s", error)
    return JSONResponse({"error": "This cannot be done now. The api-server's log says why."}, 503)


def addresses() -> Addresses:
    """What the three Connections hold; they are asked each time, as they may be edited."""
    names = ("router_db", "router_redis", "models_backend")
    return addresses_of(*(Connection.get_connection_from_secrets(name) for name in names))
