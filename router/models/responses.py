"""Interprets replies of the Models Backend: outcomes, usage, error texts."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

from router.database import MAX_INTEGER, postgres_text
from router.settings import BackendSettings
from router.task import CallResult, Outcome

MAX_RETRY_AFTER_SECONDS = 86_400.0
MAX_ERROR_CHARACTERS = 200
MAX_ERROR_BYTES = 4096  # of the body of an error
MAX_COST_USD = 1e6
_SECRET = re.compile(
    r"(?i)(bearer\s+|\bsk-|(?:api[-_ ]?key|token|password|secret)[\"']?\s*[:=]\s*[\"']?)[^\s\"',;]+"
    r"|(://)[^\s/@]+(?=@)"
)
# Other 4xx are REJECTED, everything else is an ERROR.
_OUTCOMES: dict[int, Outcome] = {
    HTTPStatus.TOO_MANY_REQUESTS: Outcome.RATE_LIMITED,
    HTTPStatus.SERVICE_UNAVAILABLE: Outcome.OVERLOADED,
    HTTPStatus.NOT_FOUND: Outcome.UNKNOWN_MODEL,
    # These concern the router's access and not the prompt: no task may lose an attempt by them.
    HTTPStatus.UNAUTHORIZED: Outcome.OVERLOADED,
    HTTPStatus.PAYMENT_REQUIRED: Outcome.OVERLOADED,
    HTTPStatus.METHOD_NOT_ALLOWED: Outcome.OVERLOADED,
    HTTPStatus.PROXY_AUTHENTICATION_REQUIRED: Outcome.OVERLOADED,
    # Caused by the prompt (a content filter) or not: the attempt counts, and repetition trips the breaker.
    HTTPStatus.FORBIDDEN: Outcome.ERROR,
    HTTPStatus.REQUEST_TIMEOUT: Outcome.ERROR,
    HTTPStatus.TOO_EARLY: Outcome.ERROR,
}


def error_result(status: int, headers: Mapping[str, str], content: bytes) -> CallResult:
    """Returns the result of a reply whose status is not 2xx."""
    client_error = HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR
    default = Outcome.REJECTED if client_error else Outcome.ERROR
    outcome = _OUTCOMES.get(status, default)
    unavailable = outcome in {Outcome.RATE_LIMITED, Outcome.OVERLOADED}
    return CallResult(
        outcome,
        retry_after_seconds=_retry_after(headers) if unavailable else None,
        error=f"{status} {error_text(content)}".strip(),
    )


def answer_result(document: Any, settings: BackendSettings, content: bytes) -> CallResult:
    """Returns the result of a 2xx reply whose body `content` was parsed to `document`."""
    names = settings.fields
    usage = CallResult(
        Outcome.GARBAGE,
        prompt_tokens=_token_count(value_at(document, names.prompt_tokens)),
        completion_tokens=_token_count(value_at(document, names.completion_tokens)),
        cost_usd=_cost(value_at(document, names.cost_usd)),
    )
    answer = value_at(document, names.answer)
    if not isinstance(answer, str):
        return replace(
            usage, error=f"the backend's JSON contains no text at {names.answer!r}: {one_line(content)}"
        )
    if not answer.strip():
        return replace(usage, error="the model's answer is empty")
    return replace(usage, outcome=Outcome.ANSWERED, answer=postgres_text(answer))


def model_names(document: Any) -> list[str]:
    """Reads a list of models in one of the usual shapes. Raises ValueError for any other."""
    if isinstance(document, dict):
        document = document.get("models", document.get("data"))
    if isinstance(document, dict):
        return [str(name) for name in document]
    if not isinstance(document, list):
        raise ValueError("neither a list nor an object of models")  # noqa: TRY004 - callers expect one type
    names = [
        row if isinstance(row, str) else value_at(row, "name") or value_at(row, "id") for row in document
    ]
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError("a model without a name")
    return names


def value_at(document: Any, path: str) -> Any:
    """Returns the value at a dotted path, or None; a number indexes a list."""
    for key in path.split("."):
        if isinstance(document, list) and key.isdecimal() and int(key) < len(document):
            document = document[int(key)]
        elif isinstance(document, dict):
            document = document.get(key)
        else:
            return None
    return document


def error_text(content: bytes) -> str:
    """Returns the message of an error reply, out of the usual shapes of JSON errors."""
    try:
        found: Any = json.loads(content)
    except (ValueError, RecursionError):
        return one_line(content)
    for key in ("error", "detail", "message"):
        if isinstance(found, dict) and found.get(key):
            found = found[key]
    return one_line(found if isinstance(found, str) else json.dumps(found))


def one_line(text: str | bytes | BaseException) -> str:
    """Returns one printable line of at most MAX_ERROR_CHARACTERS, with anything like a secret masked."""
    if isinstance(text, bytes):
        text = text[:MAX_ERROR_BYTES].decode("utf-8", "replace")
    elif isinstance(text, BaseException):
        text = str(text) or type(text).__name__
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return _SECRET.sub(r"\1\2***", line)[:MAX_ERROR_CHARACTERS]


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Returns the header in seconds; a date is read against the backend's own clock."""
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
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS) if math.isfinite(seconds) else None


def _token_count(value: Any) -> int | None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and 0 <= value <= MAX_INTEGER else None


def _cost(value: Any) -> float | None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and 0 <= value <= MAX_COST_USD else None
