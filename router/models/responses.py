"""Interprets replies of the Models Backend: outcomes, usage, error texts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from router.database import MAX_INTEGER, postgres_text
from router.errors import printable
from router.models.bodies import parse_json, web_page
from router.models.replies import MAY_RETRY_LATER, outcome_of, retry_after
from router.settings import BackendSettings
from router.task import CallResult, Outcome

MAX_ERROR_CHARACTERS = 200
MIN_REPEATED = 12  # characters by which an error is taken to repeat the prompt
MAX_ERROR_BYTES = 4096  # of the body of an error
MAX_COST_USD = 1e6
MAX_REASON_CHARACTERS = 2000
_SECRET = re.compile(
    r"(?i)(bearer\s+|\bsk-|(?:api[-_ ]?key|token|password|secret)[\"']?\s*[:=]\s*[\"']?)[^\s\"',;]+"
    r"|(://)[^\s/@]+(?=@)"
)


def error_result(status: int, headers: Mapping[str, str], content: bytes) -> CallResult:
    """Returns the result of a reply whose status is not 2xx."""
    seconds = retry_after(headers)
    outcome = outcome_of(status, content.decode("utf-8", "replace"), seconds)
    location = headers.get("Location", "") if outcome is Outcome.DENIED else ""
    error = f"{status} {error_text(content)}".strip() + (f" (redirect to {location})" if location else "")
    return CallResult(
        outcome, retry_after_seconds=seconds if outcome in MAY_RETRY_LATER else None, error=one_line(error)
    )


def answer_result(document: Any, settings: BackendSettings, content: bytes) -> CallResult:
    """Returns the result of a 2xx reply whose body `content` was parsed to `document`."""
    names = settings.fields
    usage = CallResult(
        Outcome.GARBAGE,
        prompt_tokens=_token_count(value_at(document, names.prompt_tokens)),
        completion_tokens=_token_count(value_at(document, names.completion_tokens)),
        cached_tokens=_token_count(value_at(document, names.cached_tokens)),
        cost_usd=_cost(value_at(document, names.cost_usd)),
        finish_reason=_short_text(value_at(document, names.finish_reason)),
        tool_calls=_tool_calls(value_at(document, names.tool_calls)),
        refusal=_short_text(value_at(document, names.refusal)),
    )
    answer = _text_of(value_at(document, names.answer))
    if usage.tool_calls:
        return replace(usage, outcome=Outcome.ANSWERED, answer=postgres_text(answer or ""))
    if usage.refusal and not answer:
        return replace(usage, outcome=Outcome.REJECTED, error=f"the model refused: {one_line(usage.refusal)}")
    if answer is None:
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
    page = web_page(content, "")
    if page is not None:
        return one_line(page or "a web page")
    try:
        found: Any = parse_json(content)
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
    return _SECRET.sub(r"\1\2***", printable(text, one_line=True))[:MAX_ERROR_CHARACTERS]


def _text_of(value: Any) -> str | None:
    """Returns the text of an answer, which may come in several parts."""
    if isinstance(value, list):
        parts = [part.get("text") for part in value if isinstance(part, dict)]
        return "".join(part for part in parts if isinstance(part, str)) if parts else None
    return value if isinstance(value, str) else None


def _short_text(value: Any) -> str | None:
    return postgres_text(value[:MAX_REASON_CHARACTERS]) if isinstance(value, str) and value else None


def _tool_calls(value: Any) -> tuple[Mapping[str, Any], ...]:
    """Returns the calls of functions, which Postgres can store; whatever is not one is left out."""
    calls = [call for call in value if isinstance(call, dict)] if isinstance(value, list) else []
    return tuple(
        {
            "id": postgres_text(str(call.get("id") or "")),
            "type": "function",
            "function": {
                name: postgres_text(str(function.get(name) or "")) for name in ("name", "arguments")
            },
        }
        for call in calls
        if isinstance(function := call.get("function"), dict)
    )


def without_prompt(error: str | None, prompt: str) -> str | None:
    """Returns the error without what it repeats of the prompt: others may see errors, but not prompts."""
    if not error:
        return error
    flat = " ".join(prompt.split())
    pieces = (error[at : at + MIN_REPEATED] for at in range(len(error) - MIN_REPEATED + 1))
    first = next((at for at, piece in enumerate(pieces) if piece in flat), None)
    return error if first is None else f"{error[:first]}(repeats the prompt)"


def _token_count(value: Any) -> int | None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and 0 <= value <= MAX_INTEGER else None


def _cost(value: Any) -> float | None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and 0 <= value <= MAX_COST_USD else None
