"""Who may call: programs that know the token, if there is one, and no web pages.

A web page can make a browser send requests to this machine: with its own Origin, or after its name was bound
to this machine's address (DNS rebinding) with its own Host. Neither is served. Names without a dot and
addresses cannot be bound by others.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from router.settings import TOKEN_VARIABLE

MIN_TOKEN_CHARACTERS = 16
OPEN_PATHS = frozenset({"/health"})  # tells nothing but that the process is alive
WITH_BODY = frozenset({"POST", "PUT", "PATCH"})


@dataclass(frozen=True, slots=True)
class Access:
    """Token that callers must send (None: none), and names with a dot under which the backend is reached."""

    token: str | None = None
    hosts: frozenset[str] = frozenset()


class AccessGuard:
    """Middleware that rejects requests before their body is read."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refused = refusal(scope["method"], scope["path"], Headers(scope=scope), self._access)
        if refused is None:
            await self._app(scope, receive, send)
            return
        status, message = refused
        body = json.dumps({"error": {"type": "forbidden", "message": message}}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def refusal(method: str, path: str, headers: Headers, access: Access) -> tuple[int, str] | None:
    """Returns status and message for a request that is not served; None for others."""
    host = _name(f"//{headers.get('host', '')}")
    if not _is_own(host, access.hosts):
        return 403, "the Host is not this server; name it with --allow-host"
    if headers.get("sec-fetch-site", "none") not in {"none", "same-origin"}:
        return 403, "requests of web pages are not served"
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != headers.get("host"):
        return 403, "requests of web pages are not served"
    if access.token is not None and path not in OPEN_PATHS:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        is_same = hmac.compare_digest(token.strip().encode(), access.token.encode())
        if scheme.lower() != "bearer" or not is_same:
            return 401, f"send the token of {TOKEN_VARIABLE} as `Authorization: Bearer TOKEN`"
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if method in WITH_BODY and kind != "application/json":
        return 415, "send JSON, with `Content-Type: application/json`"
    return None


def _is_own(host: str | None, allowed: Collection[str]) -> bool:
    if not host:
        return False
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host in allowed
    return True


def _name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
