"""Interpretation of providers' replies."""

from __future__ import annotations

import json
from typing import Any

import pytest

from models_backend.completion import (
    Completion,
    ProviderRefusal,
    completion_of,
    completion_of_events,
    refusal_of,
)


def reply(message: dict[str, Any] | None, reason: str = "stop", **others: Any) -> bytes:
    return json.dumps({"choices": [{"message": message, "finish_reason": reason}], **others}).encode()


def test_a_message_in_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "image_url"}, {"type": "text", "text": "two"}]
    usage = {"prompt_tokens": 1, "completion_tokens": "many"}
    assert completion_of(reply({"content": parts}, usage=usage)) == Completion("one two", 1, None)


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"<html><title>Sign in</title>", 502, "not a chat completion: a web page, 'Sign in'"),
        (b"upstream connect\nerror", 502, "not a chat completion: upstream connect error"),
        (b"", 502, "not a chat completion: (no reason given)"),
        (b"[" * 100_000, 502, "not a chat completion"),
        (b'{"choices": [7]}', 502, "no message in it"),
        (b'{"error": {"code": 429, "message": "slow down"}}', 429, "answered 429: slow down"),
        (b'{"error": {"code": 401}}', 503, "check LLAMA_API_KEY"),
        (b'{"error": {"code": "model_not_found", "message": "no x"}}', 404, "this model: no x. Check LLAMA_"),
        (b'{"error": "the GPU fell off"}', 502, "broke off with an error: the GPU fell off"),
        (reply({"content": None}, "content_filter"), 400, "filter withheld"),
        (reply({"content": None, "refusal": "I will not."}), 400, "the model refused: I will not"),
        (reply({"content": ""}, "length"), 502, "raise max_tokens"),
        (reply({"content": None, "tool_calls": []}), 502, "holds no text"),
        (reply(None), 502, "no message in it"),
    ],
)
def test_an_invalid_reply_is_explained(content: bytes, status: int, words: str) -> None:
    with pytest.raises(ProviderRefusal) as caught:
        completion_of(content)
    assert caught.value.status == status
    assert words in str(caught.value)


def events(*datas: Any) -> bytes:
    lines = (data if isinstance(data, str) else json.dumps(data) for data in datas)
    return b": a comment\n\n" + b"".join(f"data: {line}\r\n\r\n".encode() for line in lines)


def piece(text: str | None, reason: str | None = None, **others: Any) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}, "finish_reason": reason}], **others}


def test_a_stream_ends_by_its_mark_or_its_finish_reason() -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
    whole = Completion("Hello", 3, 2)
    assert completion_of_events(events(piece("Hel"), piece("lo"), usage, "[DONE]")) == whole
    assert completion_of_events(events(piece("Hel"), piece("lo", "stop"), usage)) == whole


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (events(piece("Hel")), 502, "ended before its answer did"),
        (events(piece("Hel"), '{"choi'), 502, 'not JSON: {"choi'),
        (events(piece("Hel"), {"error": {"message": "out of memory"}}), 502, "an error: out of memory"),
        (events(piece("Hel"), {"error": {"code": 503, "message": "full"}}), 503, "503: full"),
        (events(piece(None, "content_filter"), "[DONE]"), 400, "filter withheld"),
        (events("[DONE]"), 502, "holds no text"),
    ],
)
def test_an_invalid_stream_is_explained(content: bytes, status: int, words: str) -> None:
    with pytest.raises(ProviderRefusal) as caught:
        completion_of_events(content)
    assert caught.value.status == status
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("status", "content", "passed_on", "words"),
    [
        (404, b'{"detail": "Not Found"}', 503, "at the provider's address (404): check LLAMA_API_BASE"),
        (404, b'{"error": "model \'x\' not found, pull it first"}', 404, "Check LLAMA_MODELS"),
        (307, b"", 503, "at the provider's address (307): check LLAMA_API_BASE"),
        (400, b'{"error": {"code": "model_not_available", "message": "m"}}', 404, "Check LLAMA_MODELS"),
        (408, b"", 504, "ran out of time (408)"),
        (413, b'{"message": "too long"}', 413, "413: too long"),
        (
            402,
            b'{"error": {"message": "Insufficient credits"}}',
            503,
            "wants to be paid (402): Insufficient credits",
        ),
        (502, b"<html><head><title>Bad Gateway</title>", 502, "502: a web page, 'Bad Gateway'"),
        (500, "naïve \x00\x1b[31m words".encode(), 502, "500: naïve \ufffd\ufffd[31m words"),
    ],
)
def test_a_refusal_names_the_remedy(status: int, content: bytes, passed_on: int, words: str) -> None:
    refusal = refusal_of(status, "7", content)
    assert refusal.status == passed_on
    assert words in str(refusal)
    assert refusal.retry_after == ("30" if passed_on == 503 else None)


@pytest.mark.parametrize(
    ("given", "kept"),
    [("7", "7"), ("Wed, 21 Oct 2026 07:28:00 GMT",) * 2, ("7\r\nx: y", None), ("9" * 99, None)],
)
def test_only_a_valid_retry_after_is_passed_on(given: str, kept: str | None) -> None:
    assert refusal_of(429, given, b"").retry_after == kept
