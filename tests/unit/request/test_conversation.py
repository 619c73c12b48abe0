"""The text of a chat: one prompt, its question and its context."""

from __future__ import annotations

from typing import Any

import pytest

from router.request import read_request
from tests.unit.request.test_model_request import rejected


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        ([("user", "Hi")], "Hi"),
        ([("system", "Be brief."), ("user", "Hi")], "Be brief.\n\nHi"),
        ([("user", "Hi"), ("developer", "Be brief.")], "Be brief.\n\nHi"),
        (
            [("system", "S"), ("user", "A?"), ("assistant", "B."), ("user", "C?")],
            "S\n\nUser: A?\n\nAssistant: B.\n\nUser: C?",
        ),
        ([("user", [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}])], "one\ntwo"),
    ],
)
def test_messages_are_joined_into_one_prompt(messages: list[tuple[str, Any]], prompt: str):
    assert (
        read_request(
            {"messages": [{"role": role, "content": content} for role, content in messages]}
        ).conversation.text
        == prompt
    )


@pytest.mark.parametrize(
    "messages",
    [
        None,
        ["Hi"],
        [{"role": "tool", "content": "x"}],
        [{"role": "system", "content": "x"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "video", "video": {}}]}],
        [{"role": ["user"], "content": "x"}],
        [{"role": "user", "content": ""}] * 2001,
        [{"role": "user", "content": [{"type": "text", "text": ""}] * 2001}],
    ],
)
def test_unsupported_messages_are_refused(messages: Any):
    rejected({"messages": messages})


@pytest.mark.parametrize(
    ("turns", "question", "context"),
    [
        ("user:Why?", "Why?", ""),
        ("system:Be brief.|user:Why?", "Why?", "Be brief."),
        ("user:Hi|assistant:Hello!|user:Why?", "Why?", "Hi\n\nHello!"),
        ("user:Hi|system:Be brief.|assistant:Hello!|user:Why?", "Why?", "Be brief.\n\nHi\n\nHello!"),
        ("user:Why?|assistant:Because", "Why?", "Because"),  # an answer to be continued
        ("user:Hi|user:Why?", "Why?", "Hi"),
    ],
)
def test_the_last_user_turn_is_the_question_and_the_rest_its_context(
    turns: str, question: str, context: str
) -> None:
    messages = [dict(zip(("role", "content"), turn.split(":"), strict=True)) for turn in turns.split("|")]
    chat = read_request({"messages": messages}).conversation
    assert (chat.question, chat.context) == (question, context)
