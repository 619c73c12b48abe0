"""ASGI middleware of the server: request ids, error responses, authentication, CORS and body limits.

Nothing of a body is read before its client is authenticated.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import urlsplit

from starlette.authentication import AuthCredentials, AuthenticationBackend, SimpleUser
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.server.api_keys import ApiKeys
from router.server.connections import SCOPE_KEY
from router.server.responses import ApiError, ApiResponse
from router.server.slots import Uploads

log = logging.getLogger("router.serve")

BODY_SECONDS = 30.0  # for a whole request to arrive
SEND_SECONDS = 30.0  # for a client to take one message of the response
MAX_DISCARDED_BYTES = 64 * 1024 * 1024
DISCARD_SECONDS = 5.0
PATHS = "POST /v1/chat/completions, GET /v1/models"
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
LOCAL_USER = "this machine"  # who asks where no API keys are needed; as a client ''
CORS_SECONDS = 600
EXPOSED_HEADERS = (
    *("x-request-id", "retry-after", "retry-after-ms"),
    *("x-router-category", "x-router-model", "x-router-provisional", "x-router-task"),
)


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of the server, and the interval of keep-alive comments in a stream."""

    max_body_bytes: int = 4 * 1024 * 1024
    max_concurrency: int = 64
    keep_alive_seconds: float = 10.0


class ClientGone(Exception):  # noqa: N818 - not an error of the server
    """The client disconnected, or does not read the response."""


def protected(app: ASGIApp, keys: ApiKeys | None, origins: Sequence[str] = ()) -> ASGIApp:
    """Returns the app behind authentication, with errors in OpenAI's format.

    Without `keys` only local programs, and web pages of `origins`, are served. Pages of other origins cannot
    use the app: browsers ask first.
    """
    inner = AuthenticationMiddleware(app, backend=KeyAuthentication(keys, origins))
    if not origins:
        return ErrorMiddleware(inner)
    return CorsMiddleware(
        ErrorMiddleware(inner), allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"],
        expose_headers=EXPOSED_HEADERS, max_age=CORS_SECONDS,
    )  # fmt: skip


class CorsMiddleware(CORSMiddleware):
    """Answers the preflight requests of browsers; rejects those of other origins in OpenAI's format."""

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == HTTPStatus.OK:
            return response
        kept = MutableHeaders(response.headers)
        del kept["content-length"], kept["content-type"]
        document = ApiError(403, f"{bytes(response.body).decode()}.").document
        return ApiResponse(document, HTTPStatus.FORBIDDEN, dict(kept))


def request_client(request: Request) -> str:
    """Returns the client of an authenticated request: the owner of its API key; '' without keys."""
    name: str = request.user.username
    return "" if name == LOCAL_USER else name


class KeyUser(SimpleUser):
    """Owner of an API key, and the models that the key may use; None: all."""

    def __init__(self, username: str, models: frozenset[str] | None = None) -> None:
        super().__init__(username)
        self.models = models


class KeyAuthentication(AuthenticationBackend):
    """Authenticates clients by `Authorization: Bearer KEY`. Raises ApiError."""

    def __init__(self, keys: ApiKeys | None, origins: Sequence[str] = ()) -> None:
        self._keys = keys
        self._origins = origins

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, KeyUser]:
        user = self._user(conn.headers)
        if SCOPE_KEY in conn.scope:
            conn.scope[SCOPE_KEY].protect(user.username)
        return AuthCredentials(["authenticated"]), user

    def _user(self, headers: Headers) -> KeyUser:
        if self._keys is None:
            # A web page can make a browser send requests here, but with its own Host or Origin.
            origin = headers.get("origin")
            if _host(headers) not in LOOPBACK or (origin is not None and origin not in self._origins):
                raise ApiError(403, "Without API keys only programs on this machine are served.")
            return KeyUser(LOCAL_USER)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(
                401, "You didn't provide an API key. Send it as `Authorization: Bearer KEY`.",
                code="missing_api_key",
            )  # fmt: skip
        found = self._keys.find(key.strip())
        if found is None:
            raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key")
        if found.is_expired():
            text = f"The API key expired at {found.expires:%Y-%m-%d %H:%M} UTC. Ask for a new one."
            raise ApiError(401, text, code="expired_api_key")
        return KeyUser(found.client, None if found.models is None else frozenset(found.models))


def _host(headers: Headers) -> str | None:
    try:
        return urlsplit(f"//{headers.get('host', '')}").hostname
    except ValueError:
        return None


class ErrorMiddleware:
    """Adds a request id to every response, and sends errors in OpenAI's format."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        began = time.monotonic()
        body, response = _Body(receive), _Response(send)
        request_id = response.request_id
        state = {**scope.get("state", {}), "request_id": request_id}
        try:
            await self._app({**scope, "app": self, "state": state}, body, response)
        except ApiError as error:
            address = (scope.get("client") or ["?"])[0]
            text = " ".join(str(error).split())  # one line, whatever the client sent
            log.info("%s from %s rejected: %d %s", request_id, address, error.status, text)
            await _send_error(error, scope, body, response)
        except HTTPException as error:
            await _send_error(_path_error(scope, error), scope, body, response, error.headers)
        except ClientGone as error:
            log.warning("%s canceled after %.1f s: %s", request_id, time.monotonic() - began, error)
        except Exception:
            log.exception("unexpected error in %s", request_id)
            text = f"Internal server error. The server's log has the details of {request_id}."
            await _send_error(ApiError(500, text), scope, body, response)


class _Body:
    """`receive` that can discard the rest of the body."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._complete = False

    async def __call__(self) -> Message:
        message = await self._receive()
        self._complete = self._complete or not message.get("more_body")
        return message

    @property
    def is_complete(self) -> bool:
        return self._complete

    async def discard(self) -> None:
        """Reads what is still to come, within bounds: a client that is sending does not read the response."""
        ends_at, size = time.monotonic() + DISCARD_SECONDS, 0
        while not self._complete and size < MAX_DISCARDED_BYTES and time.monotonic() < ends_at:
            try:
                message = await asyncio.wait_for(self(), DISCARD_SECONDS)
            except asyncio.TimeoutError:
                return
            size += len(message.get("body", b""))


class _Response:
    """`send` that adds the request id, and raises ClientGone if the client does not read."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.request_id = f"req_{uuid.uuid4().hex}"
        self.started = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            header = (b"x-request-id", self.request_id.encode())
            message = {**message, "headers": [*message.get("headers", []), header]}
        try:
            await asyncio.wait_for(self._send(message), SEND_SECONDS)
        except asyncio.TimeoutError:
            raise ClientGone(f"the client did not read the response for {SEND_SECONDS:g} s") from None


async def _send_error(
    error: ApiError, scope: Scope, body: _Body, response: _Response, headers: Mapping[str, str] | None = None
) -> None:
    if response.started:
        return
    if SCOPE_KEY in scope:
        scope[SCOPE_KEY].unprotect()
    await body.discard()
    closing = {} if body.is_complete else {"connection": "close"}
    reply = ApiResponse(error.document, error.status, {**error.headers, **(headers or {}), **closing})
    await reply(scope, body, response)


def _path_error(scope: Scope, error: HTTPException) -> ApiError:
    path = f"{scope['method']} {scope['path']}"[:200]
    text = "Invalid URL" if error.status_code == HTTPStatus.NOT_FOUND else "Method not allowed"
    return ApiError(error.status_code, f"{text} ({path}). Available: {PATHS}.")


async def read_body(request: Request, limits: Limits, uploads: Uploads) -> bytes:
    """Returns the body. Raises ApiError: 413 if it is too large, 408 if it takes too long."""
    try:
        reading = _read(request, limits.max_body_bytes)
        return await uploads.receive(request.user.username, reading, BODY_SECONDS)
    except ClientDisconnect:
        raise ClientGone("the client disconnected before its request was complete") from None


async def _read(request: Request, max_bytes: int) -> bytes:
    too_large = ApiError(413, f"The body is larger than {max_bytes} bytes.", code="too_large")
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise too_large
    content = bytearray()
    async for piece in request.stream():
        content += piece
        if len(content) > max_bytes:
            raise too_large
    return bytes(content)
