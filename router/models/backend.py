"""The HTTP client of the Models Backend: the only way to a model.

A call never raises for what the backend does: whatever happens becomes a `CallResult`. The one exception that
passes through is that of `before_send`, the check of the permit, which runs between having a connection and
writing the first byte to it; there is no await between that check and the write.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import replace
from http import HTTPStatus
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from typing_extensions import Self

from router.errors import BackendUnavailable, ConfigError
from router.models.responses import (
    _UNSTORABLE,
    LARGEST_ERROR_BYTES,
    _amount,
    _count,
    _error_text,
    _get,
    _model_names,
    _one_line,
    _refused,
    _words,
)
from router.settings import BackendSettings
from router.task import CallResult, Outcome

KEEPALIVE_SECONDS = 4.0  # below the 5 s after which uvicorn closes an idle connection: reuse never races that
DNS_SECONDS = 30
LARGE_JSON_BYTES = 256 * 1024  # above it, parsing would hold the loop for milliseconds
NO_CONNECTION = "no connection to the backend"
MODELS_SECONDS = 10.0


class ModelsBackend:
    """A pooled client of one Models Backend, to be used as `async with`; safe for thousands of calls at once.

    A `session` that is handed in stays the caller's to close, and must not trace or compress requests: both
    put an await between the permit's check and the write.
    """

    def __init__(
        self, base_url: str, settings: BackendSettings, session: aiohttp.ClientSession | None = None
    ) -> None:
        self._base_url = _checked(base_url)
        self._settings = settings
        self._session = session
        self._owns_session = session is None

    async def __aenter__(self) -> Self:
        if self._session is None:
            self._session = _new_session(self._settings)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections unless the session was handed in; closing twice is the same as once."""
        if self._owns_session and self._session is not None:
            session, self._session = self._session, None
            await session.close()

    async def call(
        self,
        *,
        model_endpoint: str,
        prompt: str,
        max_tokens: int,
        request_id: str,
        tokens_reserved: int,
        timeout_seconds: float,
        before_send: Callable[[], None] | None = None,
    ) -> CallResult:
        """Send one prompt and return what came of it within `timeout_seconds`, connecting included.

        What `before_send` raises passes through unchanged, with nothing written. `Outcome.UNSENT` says that
        the request never got as far as `before_send`, so that its permit was not used.
        """
        names = self._settings.fields
        document: dict[str, Any] = {}
        for path, value in (
            (names.model, model_endpoint),
            (names.prompt, prompt),
            (names.max_tokens, max_tokens),
            (names.request_id, request_id),
            (names.tokens_reserved, tokens_reserved),
        ):
            _put(document, path, value)
        body = _GuardedBody(json.dumps(document).encode(), before_send)
        timeout = aiohttp.ClientTimeout(total=timeout_seconds, connect=self._settings.connect_seconds)
        try:
            result = await self._exchange(body, timeout)
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            if body.refusal is not None:
                raise body.refusal from None
            return _broken(error, body.sent_at, timeout_seconds)
        return replace(result, latency_seconds=_since(body.sent_at))

    async def _exchange(self, body: _GuardedBody, timeout: aiohttp.ClientTimeout) -> CallResult:
        url = self._base_url + self._settings.paths.single
        # A redirect would send a second request on one permit, so none is followed.
        async with self._open().post(url, data=body, timeout=timeout, allow_redirects=False) as response:
            if not response.ok or response.status >= HTTPStatus.MULTIPLE_CHOICES:
                content = await _read_up_to(response, LARGEST_ERROR_BYTES)
                return _refused(response.status, response.headers, content[:LARGEST_ERROR_BYTES])
            limit = self._settings.max_answer_bytes
            content = await _read_up_to(response, limit)
        if len(content) > limit:
            return CallResult(Outcome.GARBAGE, error=f"the backend's answer is larger than {limit} bytes")
        return await self._answered(content)

    async def _answered(self, content: bytes) -> CallResult:
        try:
            if len(content) > LARGE_JSON_BYTES:
                document = await asyncio.to_thread(json.loads, content)
            else:
                document = json.loads(content)
        except (ValueError, RecursionError):
            return CallResult(
                Outcome.GARBAGE, error=f"the backend's answer is not JSON: {_one_line(content)}"
            )
        names = self._settings.fields
        usage = CallResult(
            Outcome.GARBAGE,
            prompt_tokens=_count(_get(document, names.prompt_tokens)),
            completion_tokens=_count(_get(document, names.completion_tokens)),
            cost_usd=_amount(_get(document, names.cost_usd)),
        )
        answer = _get(document, names.answer)
        if not isinstance(answer, str):
            return replace(
                usage, error=f"the backend's JSON holds no text at {names.answer!r}: {_one_line(content)}"
            )
        if not answer.strip():
            return replace(usage, error="the model's answer is empty")
        return replace(usage, outcome=Outcome.ANSWERED, answer=_UNSTORABLE.sub("\ufffd", answer))

    async def models(self) -> list[str]:
        """The names that the backend can call now. BackendUnavailable says why they cannot be had."""
        url = self._base_url + self._settings.paths.models
        timeout = aiohttp.ClientTimeout(total=MODELS_SECONDS, connect=self._settings.connect_seconds)
        limit = self._settings.max_answer_bytes
        try:
            async with self._open().get(url, timeout=timeout, allow_redirects=False) as response:
                content = await _read_up_to(response, limit)
                status = response.status
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            raise BackendUnavailable(f"The Models Backend does not answer: {_words(error)}") from error
        if status != HTTPStatus.OK:
            raise BackendUnavailable(
                f"The Models Backend refuses to list its models: {status} {_error_text(content)}"
            )
        try:
            return _model_names(json.loads(content) if len(content) <= limit else None)
        except (ValueError, RecursionError) as error:
            expected = 'expected ["name", ...] or {"models": [{"name": ...}, ...]}'
            raise BackendUnavailable(
                f"The Models Backend's list of models cannot be read; {expected}"
            ) from error

    async def healthy(self) -> bool:
        """Whether the backend's health path answers 2xx within `connect_seconds`; never raises."""
        url = self._base_url + self._settings.paths.health
        timeout = aiohttp.ClientTimeout(total=self._settings.connect_seconds)
        try:
            async with self._open().get(url, timeout=timeout, allow_redirects=False) as response:
                return 200 <= response.status < HTTPStatus.MULTIPLE_CHOICES  # noqa: PLR2004 - the 2xx
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
            return False

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("ModelsBackend is not open: use it as `async with ModelsBackend(...)`")
        return self._session


class _GuardedBody(aiohttp.payload.Payload):
    """The request's body, which runs the check right before its bytes go to the socket, headers and all.

    aiohttp holds the headers back until the body's first write and sends both in one go, synchronously: what
    the check has allowed is on the socket before anything else can run.
    """

    def __init__(self, content: bytes, before_send: Callable[[], None] | None) -> None:
        super().__init__(content, content_type="application/json")
        self._size = len(content)
        self._before_send = before_send
        self.sent_at: float | None = None
        self.refusal: BaseException | None = None

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return bytes(self._value).decode(encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        if self._before_send is not None:
            try:
                self._before_send()
            except Exception as refusal:
                self.refusal = refusal  # aiohttp would hand it on wrapped
                raise
        self.sent_at = time.monotonic()
        await writer.write(self._value)


def _new_session(settings: BackendSettings) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(
        limit=settings.max_connections,
        keepalive_timeout=KEEPALIVE_SECONDS,
        ttl_dns_cache=DNS_SECONDS,
        resolver=aiohttp.ThreadedResolver(),  # the system's own, with /etc/hosts and search domains
    )
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,  # a proxy from the environment would be a second door, with delays of its own
        headers={"Accept": "application/json", "Accept-Encoding": "identity"},
    )


def _checked(base_url: str) -> str:
    parts = urlsplit(base_url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigError(
            "The Models Backend's address is no http(s) URL. Set MODELS_BACKEND_URL=http://host:8100"
        )
    return base_url.rstrip("/")


async def _read_up_to(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """At most a little more than `limit` bytes; longer says that there was more, and the rest is not read."""
    content = bytearray()
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > limit:
            response.close()
            break
    return bytes(content)


def _broken(error: Exception, sent_at: float | None, timeout_seconds: float) -> CallResult:
    if sent_at is None:
        return CallResult(Outcome.UNSENT, error=f"{NO_CONNECTION}: {_words(error)}")
    if isinstance(error, asyncio.TimeoutError):
        words = f"no answer within {timeout_seconds:g} s"
        return CallResult(Outcome.TIMEOUT, error=words, latency_seconds=_since(sent_at), may_go_on=True)
    words = f"the connection to the backend broke: {_words(error)}"
    return CallResult(Outcome.ERROR, error=words, latency_seconds=_since(sent_at), may_go_on=True)


def _put(document: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        document = document.setdefault(key, {})
    document[last] = value


def _since(moment: float | None) -> float | None:
    return None if moment is None else time.monotonic() - moment
