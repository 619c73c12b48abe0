"""The one prompt that a chat request comes down to, since a task holds one text. No I/O.

One user message, the usual case, is the prompt as it stands. System (or developer) messages go before it,
separated by an empty line. A longer conversation keeps its turns: each begins with `User:` or `Assistant:`.
"""

from __future__ import annotations

from typing import Any

from router.errors import InputError

SYSTEM_ROLES = frozenset({"system", "developer"})
MOST_MESSAGES = 2000  # and parts of one: reading them must not hold others up
SPEAKERS = {"user": "User", "assistant": "Assistant"}


def prompt_of(messages: Any) -> str:
    """The prompt that these chat messages ask; InputError names the message that cannot be put into one."""
    if not isinstance(messages, list) or not messages:
        raise InputError("messages must be a list of at least one message")
    if len(messages) > MOST_MESSAGES:
        raise InputError(f"messages has {len(messages)} entries; at most {MOST_MESSAGES} are taken")
    system: list[str] = []
    turns: list[tuple[str, str]] = []
    for number, message in enumerate(messages, start=1):
        role, text = _read(message, f"message {number}")
        if role in SYSTEM_ROLES:
            system.append(text)
        else:
            turns.append((role, text))
    if not any(role == "user" for role, _ in turns):
        raise InputError("messages hold no message of the role user")
    if len(turns) == 1:
        spoken = turns[0][1]
    else:
        spoken = "\n\n".join(f"{SPEAKERS[role]}: {text}" for role, text in turns)
    return "\n\n".join([*system, spoken])


def _read(message: Any, where: str) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise InputError(f"{where} is no object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in {*SYSTEM_ROLES, *SPEAKERS}:
        raise InputError(f"{where} has the role {role!r}; known are system, developer, user and assistant")
    return role, _text(message.get("content"), where)


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"{where} has no content that is text")
    if len(content) > MOST_MESSAGES:
        raise InputError(f"{where} has {len(content)} parts; at most {MOST_MESSAGES} are taken")
    parts: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InputError(f"{where} holds a part of type {kind!r}; only text can be sent")
        parts.append(part["text"])
    return "\n".join(parts)
