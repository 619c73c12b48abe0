"""Converts the messages of a chat request into the single prompt of a task. No I/O.

A single user message is the prompt, unchanged. System and developer messages precede it, separated by an
empty line. A longer conversation keeps its turns, each prefixed with `User:` or `Assistant:`.
"""

from __future__ import annotations

from typing import Any

from router.errors import InputError

SYSTEM_ROLES = frozenset({"system", "developer"})
MAX_MESSAGES = 2000  # and parts of one message: bounds the time that parsing blocks other requests
SPEAKERS = {"user": "User", "assistant": "Assistant"}


def prompt_of(messages: Any) -> str:
    """Returns the prompt of these chat messages. Raises InputError, which names the invalid message."""
    if not isinstance(messages, list) or not messages:
        raise InputError("messages must be a list of at least one message")
    if len(messages) > MAX_MESSAGES:
        raise InputError(f"messages has {len(messages)} entries; the maximum is {MAX_MESSAGES}")
    system: list[str] = []
    turns: list[tuple[str, str]] = []
    for number, message in enumerate(messages, start=1):
        role, text = _parse(message, f"message {number}")
        if role in SYSTEM_ROLES:
            system.append(text)
        else:
            turns.append((role, text))
    if not any(role == "user" for role, _ in turns):
        raise InputError("messages must contain a message with the role user")
    if len(turns) > 1:
        turns = [(role, f"{SPEAKERS[role]}: {text}") for role, text in turns]
    return "\n\n".join([*system, *(text for _, text in turns)])


def _parse(message: Any, where: str) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise InputError(f"{where} must be an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in {*SYSTEM_ROLES, *SPEAKERS}:
        raise InputError(f"{where} has the role {role!r}; use system, developer, user or assistant")
    return role, _text(message.get("content"), where)


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"{where}: content must be text or a list of text parts")
    if len(content) > MAX_MESSAGES:
        raise InputError(f"{where} has {len(content)} parts; the maximum is {MAX_MESSAGES}")
    parts: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InputError(f"{where} has a part of type {kind!r}; only text is supported")
        parts.append(part["text"])
    return "\n".join(parts)
