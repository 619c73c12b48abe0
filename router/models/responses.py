"""What replies of the Models Backend mean: outcomes, usage, error texts."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

from router.task import CallResult, Outcome

LONGEST_RETRY_AFTER_SECONDS = 86_400.0
LONGEST_WORDS_CHARACTERS = 200
LARGEST_ERROR_BYTES = 4096  # more of a refusal than its first words is never read
LARGEST_COUNT = 2**31 - 1  # what the call log can hold
LARGEST_COST_USD = 1e6
_SECRET = re.compile(
    r"(?i)(bearer\s+|\bsk-|(?:api[-_ ]?key|token|password|secret)[\"']?\s*[:=]\s*[\"']?)[^\s\"',;]+"
    r"|(://)[^\s/@]+(?=@)"
)
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")  # neither UTF-8 nor a Postgres text can hold them
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
