"""Connections of the HTTP server: bounded in number, and in the time that the headers of a request may take.

A connection is protected while a request of an authenticated client is in progress on it. It belongs to the
client of its last request, before that to its address. Beyond the maximum the owner with the most unprotected
connections loses the one that has waited longest; so does an owner beyond a maximum of its own. Connections
without a key, and idle ones of one client, cannot keep others out.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
import sys
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from router.server.responses import ApiError, ApiResponse

HEADER_SECONDS = 10.0  # for a new connection to send the headers of its request
JITTER = 0.2  # of these seconds: connections that were opened together do not all time out in one moment
BACKLOG = 256  # connections that may wait to be accepted
ACCEPTED = 16  # of these at a time, so that others' requests go on in between
OTHER_FILES = 128  # files, and connections of the router, besides those to models
FILES_PER_REQUEST = 2  # connections to models
MIN_CONNECTIONS = 16
MAX_FILES = 65_536
MAX_OWNED = 1024  # unprotected connections of one client or address
SCOPE_KEY = "router.connection"


def raise_open_files() -> int:
    """Raises the soft limit of open files to the hard one, at most to MAX_FILES; returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = MAX_FILES if hard == unlimited else min(hard, MAX_FILES)
    if soft != unlimited and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return MAX_FILES if soft == unlimited else soft


def max_connections(open_files: int, max_concurrency: int) -> int:
    """Returns how many connections of clients fit into the limit of open files."""
    return max(MIN_CONNECTIONS, open_files - BACKLOG - OTHER_FILES - FILES_PER_REQUEST * max_concurrency)


class Connections:
    """Open connections of one server, at most `limit`."""

    def __init__(
        self, limit: int, header_seconds: float = HEADER_SECONDS, max_owned: int = MAX_OWNED
    ) -> None:
        self.limit = limit
        self.header_seconds = header_seconds
        self._max_owned = max_owned
        self._open: set[BoundedProtocol] = set()
        # By owner; of each the one that has waited longest first.
        self._unprotected: dict[str, dict[BoundedProtocol, None]] = {}

    def opened(self, connection: BoundedProtocol) -> None:
        """Adds a connection, and closes another one, or else this one, if there are too many."""
        self._open.add(connection)
        if len(self._open) > self.limit:
            most = max(self._unprotected.values(), key=len, default={connection: None})
            self._abort(next(iter(most)))
        if connection in self._open:
            self.unprotect(connection)

    def closed(self, connection: BoundedProtocol) -> None:
        self._open.discard(connection)
        self.protect(connection)

    def protect(self, connection: BoundedProtocol) -> None:
        own = self._unprotected.get(connection.owner, {})
        own.pop(connection, None)
        if not own:
            self._unprotected.pop(connection.owner, None)

    def unprotect(self, connection: BoundedProtocol) -> None:
        """Makes a connection one that may be closed; closes the oldest of its owner beyond the maximum."""
        if connection not in self._open:
            return
        own = self._unprotected.setdefault(connection.owner, {})
        own.setdefault(connection)
        if len(own) > self._max_owned:
            self._abort(next(iter(own)))

    def _abort(self, connection: BoundedProtocol) -> None:
        self.closed(connection)
        connection.transport.abort()


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 connection that is one of `bounds`. Errors of the protocol have OpenAI's format as well."""

    def __init__(self, *arguments: Any, bounds: Connections, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._bounds = bounds
        self.owner = ""
        self._is_silent = True
        self._timer: asyncio.TimerHandle | None = None
        app = self.app

        async def in_connection(scope: Scope, receive: Receive, send: Send) -> None:
            await app({**scope, SCOPE_KEY: self}, receive, send)

        self.app = in_connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.owner = self.client[0] if self.client else ""
        self._bounds.opened(self)
        self._limit_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._bounds.closed(self)
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._is_silent = False
        if not self.transport.is_closing():
            super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        if self._is_answering():
            self._stop_timer()
        elif self._timer is None and self.conn.trailing_data[0]:  # a part of the next request
            self._limit_headers()

    def on_response_complete(self) -> None:
        self._bounds.unprotect(self)
        super().on_response_complete()

    def protect(self, client: str) -> None:
        """Keeps the connection open for its request, whose client is authenticated."""
        self._bounds.protect(self)
        self.owner = f"client {client}"

    def unprotect(self) -> None:
        self._bounds.unprotect(self)

    def send_400_response(self, msg: str) -> None:
        error = sys.exc_info()[1]
        hint = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        if hint == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
            msg = "The headers of the request are too large."
        self._refuse(ApiError(hint, msg))

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _limit_headers(self) -> None:
        if not self.transport.is_closing():
            seconds = self._bounds.header_seconds * random.uniform(1 - JITTER, 1)
            self._timer = self.loop.call_later(seconds, self._headers_timed_out)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _headers_timed_out(self) -> None:
        if self._is_silent:
            self.transport.abort()
            return
        seconds = self._bounds.header_seconds
        self._refuse(ApiError(408, f"The headers of the request did not arrive within {seconds:g} s."))

    def _refuse(self, error: ApiError) -> None:
        """Sends an error, unless a response has begun, and closes the connection."""
        if self._is_answering():
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if not self.transport.is_closing() and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = ApiResponse(error.document)
            headers = [*response.raw_headers, (b"connection", b"close")]
            reason = HTTPStatus(error.status).phrase.encode()
            parts: Iterable[h11.Event] = (
                h11.Response(status_code=error.status, headers=headers, reason=reason),
                h11.Data(data=bytes(response.body)),
                h11.EndOfMessage(),
            )
            for part in parts:
                self.transport.write(self.conn.send(part) or b"")
        self.transport.close()
