"""The HTTP client of the Models Backend: the only way to a model.

A call never raises for what the backend does: whatever happens becomes a `CallResult`. The one exception that
passes through is that of `before_send`, the check of the permit, which runs between having a connection and
writing the first byte to it; there is no await between that check and the write.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from typing_extensions import Self

from router.errors import BackendUnavailable, ConfigError
from router.settings.router import BackendSettings
from router.task import CallResult, Outcome

KEEPALIVE_SECONDS = 4.0  # below the 5 s after which uvicorn closes an idle connection: reuse never races that
DNS_SECONDS = 30
LONGEST_RETRY_AFTER_SECONDS = 86_400.0
LONGEST_WORDS_CHARACTERS = 200
LARGEST_ERROR_BYTES = 4096  # more of a refusal than its first words is never read
LARGE_JSON_BYTES = 256 * 1024  # above it, parsing would hold the loop for milliseconds
LARGEST_COUNT = 2**31 - 1  # what the call log can hold
NO_CONNECTION = "no connection to the backend"
LARGEST_COST_USD = 1e6
MODELS_SECONDS = 10.0

_SECRET = re.compile(
    r"(?i)(bearer\s+|\bsk-|(?:api[-_ ]?key|token|password|secret)[\"']?\s*[:=]\s*[\"']?)[^\s\"',;]+"
    r"|(://)[^\s/@]+(?=@)"
)
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")  # neither UTF-8 nor a Postgres text can hold them


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


# What these say is said to whoever calls, and would be to any prompt: none may lose an attempt by it.
_SHUT_DOOR = (
    HTTPStatus.UNAUTHORIZED,
    HTTPStatus.PAYMENT_REQUIRED,
    HTTPStatus.METHOD_NOT_ALLOWED,
    HTTPStatus.PROXY_AUTHENTICATION_REQUIRED,
)
_OUTCOMES: dict[int, Outcome] = {
    HTTPStatus.TOO_MANY_REQUESTS: Outcome.RATE_LIMITED,
    HTTPStatus.SERVICE_UNAVAILABLE: Outcome.OVERLOADED,
    HTTPStatus.NOT_FOUND: Outcome.UNKNOWN_MODEL,
    **dict.fromkeys(_SHUT_DOOR, Outcome.OVERLOADED),
    # Perhaps the prompt's fault (a filter's word), perhaps not: it counts, and the model rests if it goes on.
    HTTPStatus.FORBIDDEN: Outcome.ERROR,
    HTTPStatus.REQUEST_TIMEOUT: Outcome.ERROR,
    HTTPStatus.TOO_EARLY: Outcome.ERROR,
}


def _refused(status: int, headers: Mapping[str, str], content: bytes) -> CallResult:
    outcome = _OUTCOMES.get(status)
    if outcome is None:
        client_error = HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR
        outcome = Outcome.REJECTED if client_error else Outcome.ERROR
    rests = outcome in {Outcome.RATE_LIMITED, Outcome.OVERLOADED}
    return CallResult(
        outcome,
        retry_after_seconds=_retry_after(headers) if rests else None,
        error=f"{status} {_error_text(content)}".strip(),
    )


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds from now, by the header's number or by its date against the backend's own clock."""
    value = headers.get("Retry-After", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            until = parsedate_to_datetime(value).timestamp()
            now = parsedate_to_datetime(headers["Date"]).timestamp() if "Date" in headers else time.time()
        except (TypeError, ValueError, OverflowError):
            return None
        seconds = until - now
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_SECONDS) if math.isfinite(seconds) else None


def _error_text(content: bytes) -> str:
    """The refusal's own words, out of the usual shapes of JSON errors."""
    try:
        found: Any = json.loads(content)
    except (ValueError, RecursionError):
        return _one_line(content)
    for key in ("error", "detail", "message"):
        if isinstance(found, dict) and found.get(key):
            found = found[key]
    return _one_line(found if isinstance(found, str) else json.dumps(found))


def _words(error: BaseException) -> str:
    return _one_line(str(error) or type(error).__name__)


def _one_line(text: str | bytes) -> str:
    """One line for people, without control characters and without anything that looks like a secret."""
    if isinstance(text, bytes):
        text = text[:LARGEST_ERROR_BYTES].decode("utf-8", "replace")
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return _SECRET.sub(r"\1\2***", line)[:LONGEST_WORDS_CHARACTERS]


def _model_names(document: Any) -> list[str]:
    if isinstance(document, dict):
        document = document.get("models", document.get("data"))
    if isinstance(document, dict):
        return [str(name) for name in document]
    if not isinstance(document, list):
        raise ValueError("neither a list nor an object of models")  # noqa: TRY004 - the caller's one kind
    names = [row if isinstance(row, str) else _get(row, "name") or _get(row, "id") for row in document]
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError("a model without a name")
    return names


def _put(document: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        document = document.setdefault(key, {})
    document[last] = value


def _get(document: Any, path: str) -> Any:
    for key in path.split("."):
        if isinstance(document, list) and key.isdecimal() and int(key) < len(document):
            document = document[int(key)]
        elif isinstance(document, dict):
            document = document.get(key)
        else:
            return None
    return document


def _count(value: Any) -> int | None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and 0 <= value <= LARGEST_COUNT else None


def _amount(value: Any) -> float | None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and 0 <= value <= LARGEST_COST_USD else None


def _since(moment: float | None) -> float | None:
    return None if moment is None else time.monotonic() - moment
