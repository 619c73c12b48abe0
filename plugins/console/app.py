"""The console's API and its static files, as one small FastAPI application; see `docs/console.md`."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from pathlib import Path

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.errors import CapacityExceeded, ConfigError, DatabaseError, InputError, RouterError

from . import auth, routes
from .state import ConsoleState

log = logging.getLogger("router.console")

FOLDER = Path(__file__).parent
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
        self.state = ConsoleState()
        self.app = FastAPI(title="Router console", openapi_url=None, docs_url=None, redoc_url=None)
        self.app.state.console = self.state
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
