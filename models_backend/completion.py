"""Interprets a provider's reply: a completion or a refusal. No I/O.

A reply is one JSON document, or a stream of events (`text/event-stream`) that ends with `[DONE]`. A refusal
comes as a status, as an error in a reply of status 200, in the middle of a stream, or as the web page of a
proxy. Each becomes one `ProviderRefusal`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from router.errors import printable

LONGEST_WORDS_CHARACTERS = 200
LONGEST_HEADER_CHARACTERS = 60
SET_RIGHT_SECONDS = 30  # retry interval for errors that an operator has to fix
UNKNOWN_MODEL_CODES = frozenset({"model_not_found", "model_not_available", "model_not_supported"})
_TITLE = re.compile(r"(?is)<title[^>]*>(.*?)</title>")


@dataclass(frozen=True, slots=True)
class Completion:
    """A provider's answer; tokens are None where it did not report them."""

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None
    finish_reason: str = "stop"
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    cached_tokens: int | None = None


class ProviderRefusal(Exception):  # noqa: N818 - a refusal is an answer, too
    """The provider refused; carries status and message for the stand-in's client."""

    def __init__(self, status: int, message: str, retry_after: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


def completion_of(content: bytes) -> Completion:
    """Reads a completion from a JSON document. Raises ProviderRefusal."""
    document = _json(content)
    if not isinstance(document, dict):
        raise ProviderRefusal(502, f"the provider's answer is not a chat completion: {_words(content)}")
    if document.get("error"):
        raise _refusal_within(document)
    choice = _first(document.get("choices"))
    message = choice.get("message")
    if not isinstance(message, dict):
        raise ProviderRefusal(502, "the provider's answer is not a chat completion: no message in it")
    return _completed(_text(message.get("content")), message, choice, document.get("usage"))


def completion_of_events(content: bytes) -> Completion:
    """Joins a stream's events into a completion. Raises ProviderRefusal, also if the stream was cut off."""
    pieces: list[str] = []
    calls: dict[int, dict[str, Any]] = {}
    last: dict[str, Any] = {}
    usage: Any = None
    ended = False
    for data in _events(content):
        if data == b"[DONE]":
            ended = True
            break
        event = _json(data)
        if not isinstance(event, dict):
            raise ProviderRefusal(502, f"a piece of the provider's stream is not JSON: {_words(data)}")
        if event.get("error"):
            raise _refusal_within(event)
        usage = event.get("usage") or usage
        choice = _first(event.get("choices"))
        delta = choice.get("delta")
        if isinstance(delta, dict):
            pieces.append(_text(delta.get("content")) or "")
            _add_calls(calls, delta.get("tool_calls"))
        last = choice if choice.get("finish_reason") else last
    if not ended and not last:
        raise ProviderRefusal(502, "the provider's stream ended before its answer did")
    return _completed("".join(pieces), {"tool_calls": list(calls.values())}, last, usage)


def _add_calls(calls: dict[int, dict[str, Any]], pieces: Any) -> None:
    """Adds the pieces of tool calls: the arguments of a call come in several."""
    for piece in pieces if isinstance(pieces, list) else ():
        function = piece.get("function") or {}
        call = calls.setdefault(
            piece.get("index", 0), {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
        )
        call["id"] = piece.get("id") or call["id"]
        call["function"]["name"] += function.get("name") or ""
        call["function"]["arguments"] += function.get("arguments") or ""


def refusal_of(status: int, retry_after: str | None, content: bytes) -> ProviderRefusal:
    """Interprets a status other than 200."""
    words = _words(content)
    if _is_unknown_model(status, _json(content)):
        return ProviderRefusal(404, f"the provider does not serve this model: {words}. Check LLAMA_MODELS")
    if status in {400, 413, 422, 429, 503}:
        waits = status in {429, 503}
        message = f"the provider answered {status}: {words}"
        return ProviderRefusal(status, message, _header(retry_after) if waits else None)
    if status in {408, 504}:
        return ProviderRefusal(504, f"the provider itself ran out of time ({status}): {words}")
    if status in {401, 403}:
        return not_to_be_had(f"the provider refuses our key ({status}): check LLAMA_API_KEY")
    if status in {402, 404, 405} or status < 400:
        where = f"no chat completions at the provider's address ({status}): check LLAMA_API_BASE"
        return not_to_be_had(f"the provider wants to be paid ({status}): {words}" if status == 402 else where)
    return ProviderRefusal(502, f"the provider answered {status}: {words}")


def not_to_be_had(message: str) -> ProviderRefusal:
    """An error that an operator has to fix: it must not cost a task an attempt."""
    return ProviderRefusal(503, message, str(SET_RIGHT_SECONDS))


def _is_unknown_model(status: int, document: Any) -> bool:
    """Decides by the error code, else by the text: 404 can also mean a wrong address."""
    error = document.get("error") if isinstance(document, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    return code in UNKNOWN_MODEL_CODES or (status == 404 and "model" in str(error).lower())


def _refusal_within(document: dict[str, Any]) -> ProviderRefusal:
    """Reads the error in a reply of status 200; its code counts as the status if it is one."""
    error = document["error"]
    content = json.dumps(document).encode()
    code = error.get("code") if isinstance(error, dict) else None
    if isinstance(code, int) and 400 <= code <= 599:
        return refusal_of(code, None, content)
    if code in UNKNOWN_MODEL_CODES:
        return refusal_of(404, None, content)
    return ProviderRefusal(502, f"the provider broke off with an error: {_words(content)}")


def _completed(text: str | None, message: dict[str, Any], choice: dict[str, Any], usage: Any) -> Completion:
    usage = usage if isinstance(usage, dict) else {}
    calls = tuple(call for call in message.get("tool_calls") or () if isinstance(call, dict))
    if not text and not calls:
        raise _nothing_said(message, choice.get("finish_reason"))
    details = usage.get("prompt_tokens_details")
    counts = (
        usage.get("prompt_tokens"),
        usage.get("completion_tokens"),
        details.get("cached_tokens") if isinstance(details, dict) else None,
    )
    prompt, completion, cached = (count if isinstance(count, int) else None for count in counts)
    reason = choice.get("finish_reason")
    finish = reason if isinstance(reason, str) else "tool_calls" if calls else "stop"
    return Completion(text or "", prompt, completion, finish, calls, cached)


def _nothing_said(message: dict[str, Any], reason: Any) -> ProviderRefusal:
    if reason == "content_filter":
        return ProviderRefusal(400, "the provider's filter withheld the answer")
    if message.get("refusal"):
        return ProviderRefusal(400, f"the model refused: {_one_line(str(message['refusal']))}")
    if reason == "length":
        return ProviderRefusal(502, "all of max_tokens was used before the answer began: raise max_tokens")
    return ProviderRefusal(502, "the provider's answer holds no text")


def _text(content: Any) -> str | None:
    """The text of a message; some providers send it in parts."""
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else None


def _first(choices: Any) -> dict[str, Any]:
    found = choices[0] if isinstance(choices, list) and choices else None
    return found if isinstance(found, dict) else {}


def _events(content: bytes) -> Iterator[bytes]:
    for line in content.splitlines():
        if line.startswith(b"data:"):
            yield line[5:].strip()


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _words(content: bytes) -> str:
    """The error text of a reply, out of the usual JSON shapes, in one line."""
    found: Any = _json(content)
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(key):
            found = found[key]
    if isinstance(found, str):
        return _one_line(found) or "(no reason given)"
    text = content[:4096].decode("utf-8", "replace")
    if "<html" in text.lower():
        title = _TITLE.search(text)
        return f"a web page{f', {_one_line(title[1])!r}' if title else ''}"
    return _one_line(text) or "(no reason given)"


def _one_line(text: str) -> str:
    return printable(text, one_line=True)[:LONGEST_WORDS_CHARACTERS].rstrip(".")


def _header(value: str | None) -> str | None:
    """A header value that is safe to pass on."""
    good = value is not None and value.isascii() and value.isprintable()
    return value if good and len(value or "") <= LONGEST_HEADER_CHARACTERS else None
