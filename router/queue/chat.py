"""Converts the messages of a chat request into the single prompt of a task. No I/O.

A single user message is the prompt, unchanged. System and developer messages precede it, separated by an
empty line. A longer conversation keeps its turns, each prefixed with `User:` or `Assistant:`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from router.errors import InputError

SYSTEM_ROLES = frozenset({"system", "developer"})
MAX_SHOWN = 50  # characters of an invalid value in an error
MAX_MESSAGES = 2000  # and parts of one message: bounds the time that parsing blocks other requests
SPEAKERS = {"user": "User", "assistant": "Assistant"}
# Fields of a message that would change the answer, and are not supported; null and empty ones are accepted.
UNSUPPORTED_FIELDS = ("tool_calls", "tool_call_id", "function_call", "audio")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Chat as one prompt. `text` is sent to models; `question` is the last user turn, `context` all the rest.

    Category and knowledge depend on the question; the context helps where the question alone says too little.
    """

    text: str
    question: str
    context: str = ""


class MessageError(InputError):
    """A message is invalid; `param` is its path in the request, as in `messages.[1].tool_calls`."""

    def __init__(self, message: str, param: str = "messages") -> None:
        super().__init__(message)
        self.param = param


def prompt_of(messages: Any) -> str:
    """Returns the prompt of these chat messages. Raises InputError, which names the invalid message."""
    return read_conversation(messages).text


def read_conversation(messages: Any) -> Conversation:
    """Returns these chat messages as a conversation. Raises MessageError, which names the invalid message."""
    if not isinstance(messages, list) or not messages:
        raise MessageError("messages must be a list of at least one message")
    if len(messages) > MAX_MESSAGES:
        raise MessageError(f"messages has {len(messages)} entries; the maximum is {MAX_MESSAGES}")
    system: list[str] = []
    turns: list[tuple[str, str]] = []
    for number, message in enumerate(messages, start=1):
        role, text = _parse(message, number)
        if role in SYSTEM_ROLES:
            system.append(text)
        else:
            turns.append((role, text))
    asked = max((at for at, (role, _) in enumerate(turns) if role == "user"), default=None)
    if asked is None:
        raise MessageError("messages must contain a message with the role user")
    context = "\n\n".join([*system, *(text for at, (_, text) in enumerate(turns) if at != asked)])
    question = turns[asked][1]
    if len(turns) > 1:
        turns = [(role, f"{SPEAKERS[role]}: {text}") for role, text in turns]
    return Conversation("\n\n".join([*system, *(text for _, text in turns)]), question, context)


def _parse(message: Any, number: int) -> tuple[str, str]:
    where = f"message {number}"
    if not isinstance(message, dict):
        raise MessageError(f"{where} must be an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in {*SYSTEM_ROLES, *SPEAKERS}:
        shown = repr(role)[:MAX_SHOWN]
        raise MessageError(f"{where} has the role {shown}; use system, developer, user or assistant")
    for name in UNSUPPORTED_FIELDS:
        if message.get(name):
            param = f"messages.[{number - 1}].{name}"
            raise MessageError(f"{where} has {name}, which is not supported: only text is", param)
    return role, _text(message.get("content"), where)


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise MessageError(f"{where}: content must be text or a list of text parts")
    if len(content) > MAX_MESSAGES:
        raise MessageError(f"{where} has {len(content)} parts; the maximum is {MAX_MESSAGES}")
    parts: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            shown = repr(kind)[:MAX_SHOWN]
            raise MessageError(f"{where} has a part of type {shown}; only text is supported")
        parts.append(part["text"])
    return "\n".join(parts)
