"""The door of the HTTP server: who is there, how much may come in, and how errors leave.

Plain ASGI around the paths, so that nothing of a request is read before its key was seen.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.server.api_keys import ApiKeys
from router.server.responses import ApiError

log = logging.getLogger("router.serve")

BODY_SECONDS = 30.0  # for a whole request to come in
SEND_SECONDS = 30.0  # for a client to take a piece of the reply
MOST_UNREAD_BYTES = 64 * 1024 * 1024
DISCARD_SECONDS = 5.0
SERVED = "POST /v1/chat/completions, GET /v1/models"
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server takes on, and how often a stream that waits shows a sign of life."""

    max_body_bytes: int = 4 * 1024 * 1024
    at_once: int = 64
    keep_alive_seconds: float = 10.0


@dataclass(frozen=True, slots=True)
class RequestInfo:
    """One request at the door: its id, as the reply's `x-request-id`, and the client whose key it showed."""

    request_id: str
    client: str


class ClientGone(Exception):  # noqa: N818 - a state of the world
    """The client hung up, or does not take what it asked for."""


class AuthMiddleware:
    """Lets in who shows a key of `keys`; without keys, who comes to this machine's own address."""

    def __init__(self, app: ASGIApp, keys: ApiKeys | None) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._visit(scope, _Incoming(receive), _Outgoing(send))

    async def _visit(self, scope: Scope, receive: _Incoming, send: _Outgoing) -> None:
        began = time.monotonic()
        try:
            visit = RequestInfo(send.request_id, self._who(Headers(scope=scope)))
            await self._app({**scope, "app": self._app, "visit": visit}, receive, send)
        except ApiError as error:
            address = (scope.get("client") or ["?"])[0]
            log.info("%s from %s refused: %d %s", send.request_id, address, error.status, error)
            await _refuse(error, receive, send)
        except HTTPException as error:
            await _refuse(_no_such_path(scope, error), receive, send, error.headers or {})
        except ClientGone as error:
            log.warning("%s given up after %.1f s: %s", send.request_id, time.monotonic() - began, error)
        except Exception:
            log.exception("%s: a fault of the program", send.request_id)
            words = f"The server made a mistake; its log has it under {send.request_id}."
            await _refuse(ApiError(500, words), receive, send)

    def _who(self, headers: Headers) -> str:
        if self._keys is None:
            # A page in somebody's browser can be made to reach us under its own name, never under ours.
            if _host(headers) not in LOOPBACK or "origin" in headers:
                raise ApiError(403, "Without keys only programs of this machine are served.")
            return "this machine"
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not key.strip():
            raise ApiError(
                401, "You didn't provide an API key. Send it as `Authorization: Bearer KEY`.",
                code="missing_api_key",
            )  # fmt: skip
        client = self._keys.client(key.strip())
        if client is None:
            raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key")
        return client


def _host(headers: Headers) -> str | None:
    """The host that the client took us for."""
    try:
        return urlsplit(f"//{headers.get('host', '')}").hostname
    except ValueError:
        return None


class _Incoming:
    """`receive` that knows whether the whole request was read."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.whole = False

    async def __call__(self) -> Message:
        message = await self._receive()
        self.whole = self.whole or not message.get("more_body")
        return message

    async def discard(self) -> None:
        """Take in what is still to come, within bounds: who is still sending would not see our reply."""
        ends_at, size = time.monotonic() + DISCARD_SECONDS, 0
        while not self.whole and size < MOST_UNREAD_BYTES and time.monotonic() < ends_at:
            try:
                message = await asyncio.wait_for(self(), DISCARD_SECONDS)
            except asyncio.TimeoutError:
                return
            size += len(message.get("body", b""))


class _Outgoing:
    """`send` that names the request in every reply, knows whether one has begun, and never waits long."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.request_id = f"req_{uuid.uuid4().hex}"
        self.started = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            name = (b"x-request-id", self.request_id.encode())
            message = {**message, "headers": [*message.get("headers", []), name]}
        try:
            await asyncio.wait_for(self._send(message), SEND_SECONDS)
        except asyncio.TimeoutError:
            raise ClientGone(f"the client took nothing of the reply for {SEND_SECONDS:g} s") from None


async def _refuse(
    refusal: ApiError, receive: _Incoming, send: _Outgoing, headers: Mapping[str, str] | None = None
) -> None:
    if send.started:
        return  # nothing can be taken back
    await receive.discard()
    await send_json(send, refusal.status, refusal.document, {**refusal.headers, **(headers or {})})


def _no_such_path(scope: Scope, error: HTTPException) -> ApiError:
    where = f"{scope['method']} {scope['path']}"[:200]
    words = "Invalid URL" if error.status_code == HTTPStatus.NOT_FOUND else "Not allowed"
    return ApiError(error.status_code, f"{words} ({where}). Served are {SERVED}.")


async def read_body(scope: Scope, receive: Receive, limits: Limits) -> bytes:
    """The request's body. ApiError: 413 if it is too large, 408 if it takes too long to come."""
    try:
        return await asyncio.wait_for(_read(Headers(scope=scope), receive, limits), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(408, f"The request did not come in whole within {BODY_SECONDS:g} s.") from None


async def _read(headers: Headers, receive: Receive, limits: Limits) -> bytes:
    too_large = ApiError(413, f"The body is larger than {limits.max_body_bytes} bytes.", code="too_large")
    announced = headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limits.max_body_bytes:
        raise too_large
    content = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("the client hung up before it had sent its request")
        content += message.get("body", b"")
        if len(content) > limits.max_body_bytes:
            raise too_large
        if not message.get("more_body"):
            return bytes(content)


async def send_json(
    send: Send, status: int, document: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> None:
    """A whole reply."""
    body = json.dumps(document, ensure_ascii=False, default=str).encode("utf-8", "replace")
    kind = {"content-type": "application/json", "content-length": str(len(body))}
    await send_head(send, status, {**kind, **(headers or {})})
    await send({"type": "http.response.body", "body": body})


async def send_head(send: Send, status: int, headers: Mapping[str, str]) -> None:
    """The beginning of a reply. A header's value that is not Latin-1 is sent with question marks."""
    pairs = [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
