"""HTTP client of the Models Backend, the only way to a model.

Backend failures are returned as a CallResult, never raised. Only exceptions of `before_send`, the check of
the permit, are raised. The check runs between acquiring a connection and
writing the first byte to it, and no await separates the check from the write.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import replace
from http import HTTPStatus
from types import TracebackType

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from typing_extensions import Self

from router.errors import BackendUnavailable
from router.models.bodies import decompressed, parse_json, web_page
from router.models.call_request import CallRequest
from router.models.documents import request_document
from router.models.responses import (
    MAX_ERROR_BYTES,
    answer_result,
    error_result,
    error_text,
    model_names,
    one_line,
    without_prompt,
)
from router.settings import BackendSettings, backend_address
from router.task import CallResult, Outcome

KEEPALIVE_SECONDS = 4.0  # below the 5 s after which uvicorn closes an idle connection: reuse never races that
DNS_SECONDS = 30
LARGE_JSON_BYTES = 256 * 1024  # above it, parsing would block the event loop for milliseconds
NO_CONNECTION = "no connection to the backend"
MODELS_SECONDS = 10.0
ERROR_BODY_SECONDS = 5.0


class ModelsBackend:
    """Pooled client of one Models Backend for thousands of concurrent calls; use it as `async with`.

    A `session` that is passed in must be closed by the caller, and must neither trace nor compress requests:
    both put an await between the permit's check and the write.
    """

    def __init__(
        self, base_url: str, settings: BackendSettings, session: aiohttp.ClientSession | None = None, *,
        token: str | None = None,
    ) -> None:  # fmt: skip
        """Raises ConfigError if `base_url` is not an http(s) URL. A `token` is sent with every request."""
        self._base_url = backend_address(base_url).url
        self._settings = settings
        self._session = session
        self._headers = {"Authorization": f"Bearer {token}"} if token else None
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
        """Closes the connections, unless the session was passed in. May be called twice."""
        if self._owns_session and self._session is not None:
            session, self._session = self._session, None
            await session.close()

    async def call(
        self, request: CallRequest, *, before_send: Callable[[], None] | None = None
    ) -> CallResult:
        """Sends one prompt and returns the result within `request.timeout_seconds`, connecting included.

        Exceptions of `before_send` pass through unchanged, with nothing written. `Outcome.UNSENT` means that
        `before_send` was not reached, so that the permit was not used.
        """
        body = _GuardedBody(json.dumps(request_document(request, self._settings)).encode(), before_send)
        timeout = aiohttp.ClientTimeout(total=request.timeout_seconds, connect=self._settings.connect_seconds)
        try:
            result = await self._exchange(body, timeout)
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            if body.refusal is not None:
                raise body.refusal from None
            return _broken(error, body.sent_at, request.timeout_seconds)
        error_shown = without_prompt(result.error, request.prompt)
        return replace(result, error=error_shown, latency_seconds=_since(body.sent_at))

    async def _exchange(self, body: _GuardedBody, timeout: aiohttp.ClientTimeout) -> CallResult:
        url = self._base_url + self._settings.paths.single
        limit = self._settings.max_answer_bytes
        # A redirect would send a second request on one permit, so none is followed.
        async with self._open().post(
            url, data=body, headers=self._headers, timeout=timeout, allow_redirects=False
        ) as response:
            if response.status >= HTTPStatus.MULTIPLE_CHOICES or response.status < HTTPStatus.OK:
                content = await _error_body(response)
                return error_result(response.status, response.headers, content)
            content = await _read_up_to(response, limit)
        if len(content) > limit:
            return CallResult(Outcome.GARBAGE, error=f"the backend's answer is larger than {limit} bytes")
        page = web_page(content, response.content_type)
        if page is not None:
            error = f"a web page instead of an answer: {one_line(page)}"
            return CallResult(Outcome.UNAVAILABLE, error=error)
        try:
            if len(content) > LARGE_JSON_BYTES:
                document = await asyncio.to_thread(parse_json, content, response.charset)
            else:
                document = parse_json(content, response.charset)
        except (ValueError, RecursionError):
            error = f"the backend's answer is not JSON: {one_line(content)}"
            return CallResult(Outcome.GARBAGE, error=error)
        return answer_result(document, self._settings, content)

    async def models(self) -> list[str]:
        """Returns the names of the models that the backend can call now. Raises BackendUnavailable."""
        url = self._base_url + self._settings.paths.models
        timeout = aiohttp.ClientTimeout(total=MODELS_SECONDS, connect=self._settings.connect_seconds)
        limit = self._settings.max_answer_bytes
        try:
            async with self._open().get(
                url, headers=self._headers, timeout=timeout, allow_redirects=False
            ) as response:
                content = await _read_up_to(response, limit)
                status = response.status
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            raise BackendUnavailable(f"The Models Backend does not answer: {one_line(error)}") from error
        if status != HTTPStatus.OK:
            raise BackendUnavailable(
                f"The Models Backend does not list its models: {status} {error_text(content)}"
            )
        try:
            return model_names(parse_json(content) if len(content) <= limit else None)
        except (ValueError, RecursionError) as error:
            expected = 'expected ["name", ...] or {"models": [{"name": ...}, ...]}'
            raise BackendUnavailable(
                f"The Models Backend's list of models cannot be read; {expected}"
            ) from error

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("ModelsBackend is not open: use it as `async with ModelsBackend(...)`")
        return self._session


class _GuardedBody(aiohttp.payload.Payload):
    """Request body that runs the check right before its bytes and the headers go to the socket.

    aiohttp holds the headers back until the first write of the body and then sends both in one synchronous
    step: after the check, the request is on the socket before anything else can run.
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
                self.refusal = refusal  # aiohttp would wrap it
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
        trust_env=False,  # a proxy from the environment would delay calls after their permit
        headers={"Accept": "application/json", "Accept-Encoding": "identity"},
        auto_decompress=False,  # an encoding that is named by mistake must not discard the answer
    )


async def _read_up_to(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """Reads the body up to the first chunk beyond `limit`; a result longer than `limit` is incomplete."""
    content = bytearray()
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > limit:
            response.close()
            break
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding == "identity":
        return bytes(content)
    return await asyncio.to_thread(decompressed, bytes(content), encoding, limit)


async def _error_body(response: aiohttp.ClientResponse) -> bytes:
    """Reads the beginning of an error's body; the status alone counts if it does not come or breaks off."""
    try:
        content = await asyncio.wait_for(_read_up_to(response, MAX_ERROR_BYTES), ERROR_BODY_SECONDS)
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
        response.close()
        return b""
    return content[:MAX_ERROR_BYTES]


def _broken(error: Exception, sent_at: float | None, timeout_seconds: float) -> CallResult:
    if sent_at is None:
        return CallResult(Outcome.UNSENT, error=f"{NO_CONNECTION}: {one_line(error)}")
    if isinstance(error, asyncio.TimeoutError):
        outcome, message = Outcome.TIMEOUT, f"no answer within {timeout_seconds:g} s"
    else:
        outcome, message = Outcome.UNAVAILABLE, f"the connection to the backend broke: {one_line(error)}"
    return CallResult(outcome, error=message, latency_seconds=_since(sent_at), may_go_on=True)


def _since(start: float | None) -> float | None:
    return None if start is None else time.monotonic() - start
