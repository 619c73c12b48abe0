"""Text of a chat: what is classified, counted, and sent to backends that take one prompt. No I/O.

A single user message is the prompt, unchanged. System and developer messages precede it, separated by an
empty line. A longer conversation keeps its turns, each prefixed with its speaker.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

SYSTEM_ROLES = frozenset({"system", "developer"})
SPEAKERS = {"user": "User", "assistant": "Assistant", "tool": "Tool"}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Chat as one prompt. `text` is sent to models; `question` is the last user turn, `context` all the rest.

    Category and knowledge depend on the question; the context helps where the question alone says too little.
    """

    text: str
    question: str
    context: str = ""


def conversation_of(messages: Iterable[Mapping[str, Any]]) -> Conversation:
    """Returns the text of valid messages, of which at least one is the user's."""
    system: list[str] = []
    turns: list[tuple[str, str]] = []
    for message in messages:
        text = _text(message)
        if message["role"] in SYSTEM_ROLES:
            system.append(text)
        else:
            turns.append((message["role"], text))
    asked = max(at for at, (role, _) in enumerate(turns) if role == "user")
    context = "\n\n".join([*system, *(text for at, (_, text) in enumerate(turns) if at != asked)])
    question = turns[asked][1]
    if len(turns) > 1:
        turns = [(role, f"{SPEAKERS[role]}: {text}") for role, text in turns]
    return Conversation("\n\n".join([*system, *(text for _, text in turns)]), question, context)


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    texts = [content] if isinstance(content, str) else [_part_text(part) for part in content or ()]
    if message.get("refusal"):
        texts.append(message["refusal"])
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    texts += [f"{function['name']}({function['arguments']})" for function in functions]
    return "\n".join(texts)


def _part_text(part: Mapping[str, Any]) -> str:
    kind = part["type"]
    return str(part[kind]) if kind in {"text", "refusal"} else f"[{kind}]"


def schema_text(value: Any) -> str:
    """Returns a JSON value as the text by which its tokens are estimated."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
