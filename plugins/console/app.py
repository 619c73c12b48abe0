"""FastAPI application with the console's API and static files; see `docs/console.md`."""

from __future__ import annotations

import asyncio
import hashlib
import html
import logging
import secrets
from pathlib import Path

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.errors import CapacityExceeded, ConfigError, DatabaseError, InputError, RouterError

from . import auth, routes
from .state import ConsoleState

log = logging.getLogger("router.console")

FOLDER = Path(__file__).parent
UNAUTHORIZED = 401
STATIC = {
    "page": ("page.html", "text/html; charset=utf-8"),
    **{
        name: (name, "text/javascript; charset=utf-8")
        for name in (
            "console.js",
            "draw.js",
            "labels.js",
            "models.js",
            "model_row.js",
            "queue.js",
            "clients.js",
            "lists.js",
            "spend.js",
            "task.js",
            "ranking.js",
            "discovery.js",
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


# For a browser that opens the page without a login: the frame's outer page goes to Airflow's own.
LOGGED_OUT = """<!doctype html>
<html lang="en">
  <head>
    <meta charset="utf-8" />
    <meta name="viewport" content="width=device-width, initial-scale=1" />
    <title>Logged out · Router</title>
  </head>
  <body>
    <h1>You are logged out</h1>
    <p>{reason} <a href="../" target="_top">Log in to Airflow</a>, then open Browse, Router again.</p>
  </body>
</html>
"""


class Console:
    """ASGI application; `app` is the FastAPI application inside the middleware."""

    def __init__(self) -> None:
        self.state = ConsoleState()
        self.app = FastAPI(title="Router console", openapi_url=None, docs_url=None, redoc_url=None)
        self.app.state.console = self.state
        self.app.include_router(routes.api, prefix="/api")
        for path in STATIC:
            self.app.add_api_route(f"/{path}", _static, methods=["GET"], name=path)
        self.app.add_api_route(
            "/{anything:path}", _not_found, methods=["GET", "PUT", "POST", "PATCH", "DELETE", "HEAD"]
        )
        for kind in (RequestValidationError, RouterError):
            self.app.add_exception_handler(kind, _error_response)
        self.app.add_exception_handler(StarletteHTTPException, _http_error)
        self.app.add_exception_handler(Exception, _unexpected_error)
        self._middleware = ResponseMiddleware(self.app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._middleware(scope, receive, send)


class ResponseMiddleware:
    """ASGI middleware: adds security headers to every response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                own = list(message["headers"])
                if not any(name == b"cache-control" for name, _ in own):
                    added.append((b"cache-control", b"no-store"))
                message = {**message, "headers": own + added}
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            if not started:
                raise  # otherwise Starlette raises again what `_unexpected_error` has logged and answered


async def _static(request: Request, _user: auth.Reader) -> Response:
    name, kind = STATIC[request.scope["route"].name]
    content = await asyncio.to_thread((FOLDER / name).read_bytes)
    etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = {"etag": etag, "cache-control": "private, no-cache"}
    if request.headers.get("if-none-match") in (etag, f"W/{etag}"):
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=kind, headers=headers)


async def _not_found(_user: auth.Reader) -> Response:
    raise HTTPException(404, "There is nothing at this path.")


async def _unexpected_error(request: Request, error: Exception) -> JSONResponse:
    """Logs the error under a reference, and returns a response that names the reference only."""
    reference = secrets.token_hex(4)
    path = request.url.path
    log.error("console: unexpected error, reference=%s path=%s", reference, path, exc_info=error)
    return JSONResponse(
        {"error": f"Unexpected error. See reference {reference} in the api-server's log."}, 500
    )


async def _http_error(request: Request, error: Exception) -> Response:
    """Returns the response for an HTTPException: JSON, or for the page without a login a page."""
    assert isinstance(error, StarletteHTTPException)
    if error.status_code == UNAUTHORIZED and request.url.path.endswith("/page"):
        page = LOGGED_OUT.format(reason=html.escape(str(error.detail).rstrip(".") + "."))
        return HTMLResponse(page, UNAUTHORIZED, headers=error.headers)
    return JSONResponse({"error": str(error.detail)}, error.status_code, headers=error.headers)


async def _error_response(_request: Request, error: Exception) -> Response:
    """Returns the response for an error: its message with the matching status."""
    if isinstance(error, CapacityExceeded):
        wait = {"retry-after": f"{error.retry_after_seconds:.0f}"}
        return JSONResponse({"error": str(error)}, 503, headers=wait)
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        return JSONResponse({"error": f"{first['loc'][-1]}: {first['msg']}"}, 422)
    if isinstance(error, (ConfigError, InputError)):
        return JSONResponse({"error": str(error)}, 422)
    if isinstance(error, DatabaseError):
        return JSONResponse({"error": str(error)}, 503)
    log.warning("console: request failed: %s", error)
    return JSONResponse({"error": "This is not possible now. See the api-server's log."}, 503)
