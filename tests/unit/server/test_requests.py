"""Validation of chat requests."""

from __future__ import annotations

from typing import Any

import pytest

from router.server.requests import Catalog, parse_chat
from router.server.responses import ApiError
from router.task import AnswerRank

CATALOG = Catalog({"phi-4": 512, "llama-3.3-70b": 1024}, ("general", "technical"), fallback_tokens=300)
REQUEST = {"model": "auto", "messages": [{"role": "user", "content": "Why?"}]}


def rejected(**changes: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_chat({**REQUEST, **changes}, CATALOG)
    return caught.value


def test_model_and_messages_are_enough() -> None:
    chat = parse_chat(REQUEST, CATALOG)
    assert (chat.request.conversation.text, chat.request.model, chat.category) == ("Why?", None, None)
    assert (chat.stream, chat.include_usage, chat.stops) == (False, False, ())


@pytest.mark.parametrize(
    ("name", "model", "category"),
    [("auto", None, None), ("auto:technical", None, "technical"), ("phi-4", "phi-4", None)],
)
def test_model_parameter(name: str, model: str | None, category: str | None) -> None:
    chat = parse_chat({**REQUEST, "model": name}, CATALOG)
    assert (chat.requested_model, chat.request.model, chat.category) == (name, model, category)


@pytest.mark.parametrize("name", ["gpt-5", "auto:", "auto:sport", "phi-4:technical", "AUTO"])
def test_an_unknown_model_is_404(name: str) -> None:
    error = rejected(model=name)
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert repr(name) in str(error)


@pytest.mark.parametrize("name", ["", None, 7])
def test_a_missing_model_is_400(name: Any) -> None:
    assert (rejected(model=name).status, rejected(model=name).param) == (400, "model")


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("n", 2),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy"}),
        ("logprobs", True),
        ("store", True),
        ("prompt", "Why?"),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("max_tokens", "9"),
        ("max_completion_tokens", 10**9),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("stop", [""]),
        ("stop", ["a"] * 5),
        ("stop", 7),
        ("router", "general"),
        ("router", {"speed": 1}),
        ("messages", []),
    ],
)
def test_unsupported_and_invalid_parameters_are_named(param: str, value: Any) -> None:
    error = rejected(**{param: value})
    assert (error.status, error.param) == (400, param)
    assert param in str(error) or param == "messages"


@pytest.mark.parametrize(
    "options",
    [
        {"category": "sport"},
        {"deadline_seconds": -1},
        {"deadline_seconds": True},
        {"deadline_seconds": 10**400},
    ],
)
def test_router_parameter_is_validated(options: dict[str, Any]) -> None:
    assert rejected(router=options).param == f"router.{next(iter(options))}"


def test_all_parameters_are_read() -> None:
    options = {"category": "general", "deadline_seconds": 0.05}
    more = {"max_tokens": 7, "stream": True, "stream_options": {"include_usage": True}, "stop": "\n"}
    chat = parse_chat({**REQUEST, **more, "router": options}, CATALOG)
    assert (chat.request.max_tokens, chat.stream, chat.include_usage, chat.stops) == (7, True, True, ("\n",))
    assert (chat.category, chat.deadline_seconds) == ("general", 0.05)


@pytest.mark.parametrize(
    ("model", "rank", "requested", "max_tokens"),
    [
        ("phi-4", AnswerRank.CHOSEN_MODEL, None, 512),
        ("phi-4", AnswerRank.CHOSEN_MODEL, 100, 100),
        ("phi-4", AnswerRank.CHOSEN_MODEL, 4096, 512),
        ("phi-4", AnswerRank.FALLBACK_MODEL, None, 300),
        ("gone", AnswerRank.CHOSEN_MODEL, 7, 7),
        (None, AnswerRank.PASSAGES, 7, None),
    ],
)
def test_longest_answer_in_tokens(
    model: str | None, rank: AnswerRank, requested: int | None, max_tokens: int | None
) -> None:
    assert CATALOG.max_tokens(model, rank, requested) == max_tokens


@pytest.mark.parametrize("document", [None, [], "x", 7])
def test_a_body_that_is_not_an_object_is_400(document: Any) -> None:
    with pytest.raises(ApiError, match="must be a JSON object"):
        parse_chat(document, CATALOG)
