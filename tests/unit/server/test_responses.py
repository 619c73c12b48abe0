"""Formats of completions and streams."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from router.answering.answer import Answer
from router.server.responses import CHUNK_CHARACTERS, MAX_MESSAGE, ApiError, Reply, routing_of
from router.task import AnswerRank

ANSWER = Answer(
    text="Because of Rayleigh.",
    model="phi-4",
    rank=AnswerRank.CHOSEN_MODEL,
    category="general",
    confidence=0.9,
    reason="classifier",
    preferred="phi-4",
    fallback="llama-3.1-8b",
    provisional=False,
    seconds=1.5,
    cost_usd=0.001,
    prompt_tokens=11,
    completion_tokens=5,
    sources=(),
    task_id=17,
    calls=(),
)
PASSAGES = dataclasses.replace(
    ANSWER, model=None, rank=AnswerRank.PASSAGES, sources=("sky.md",), task_id=None, completion_tokens=None
)


def reply(answer: Answer = ANSWER, **more: Any) -> Reply:
    return Reply(answer, "chatcmpl-1", 1_800_000_000, **more)


def events(of: Reply, *, include_usage: bool = False) -> list[Any]:
    lines = b"".join(of.events(include_usage=include_usage)).decode().strip().split("\n\n")
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_an_error_may_carry_the_routing_and_its_message_is_bounded() -> None:
    error = ApiError(504, "x" * 5000, code="no_answer", routing=routing_of(PASSAGES))
    assert error.document["router"]["sources"] == ["sky.md"]
    assert error.document["router"]["rank"] == 1
    assert len(error.document["error"]["message"]) == MAX_MESSAGE + 3


def test_an_answer_that_was_not_logged_has_no_task_header() -> None:
    answer = dataclasses.replace(ANSWER, task_id=None)
    assert "x-router-task" not in reply(answer).headers()


@pytest.mark.parametrize(
    ("stops", "max_tokens", "text", "reason"),
    [
        ((), None, "Because of Rayleigh.", "stop"),
        ((), 5, "Because of Rayleigh.", "length"),
        ((), 6, "Because of Rayleigh.", "stop"),
        (("Ray", " of"), 5, "Because", "stop"),
        (("Mie",), 5, "Because of Rayleigh.", "length"),
        (("Because",), None, "", "stop"),
    ],
)
def test_stop_texts_and_finish_reason(
    stops: tuple[str, ...], max_tokens: int | None, text: str, reason: str
) -> None:
    (choice,) = reply(stops=stops, max_tokens=max_tokens).completion()["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, reason)


def test_a_long_answer_is_streamed_in_chunks() -> None:
    text = "Lorem ipsum — dolor. " * 40
    answer = dataclasses.replace(ANSWER, text=text)
    *chunks, last = events(reply(answer))
    contents = [chunk["choices"][0]["delta"]["content"] for chunk in chunks]
    assert "".join(contents) == text
    assert max(map(len, contents)) == CHUNK_CHARACTERS
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert last["router"]["task_id"] == 17
    assert all("usage" not in event for event in (*chunks, last))


def test_usage_is_the_last_chunk_if_requested() -> None:
    *before, usage = events(reply(), include_usage=True)
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 16)
    assert [event["usage"] for event in before] == [None] * len(before)
