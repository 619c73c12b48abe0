"""Validates the messages of a chat request and lists the capabilities that they need. No I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from router.request.conversation import SPEAKERS, SYSTEM_ROLES
from router.request.errors import RequestError

MAX_MESSAGES = 2000  # bounds the time that parsing blocks other requests
MAX_PARTS = 2000  # of one message
MAX_SHOWN = 50  # characters of an invalid value in an error
ROLES = frozenset({*SYSTEM_ROLES, *SPEAKERS})
# Fields of a message, beside role and content, and the roles that may have them.
FIELDS: Mapping[str, frozenset[str]] = {
    "name": ROLES,
    "tool_call_id": frozenset({"tool"}),
    "tool_calls": frozenset({"assistant"}),
    "refusal": frozenset({"assistant"}),
}
# Fields that are accepted while they are null or empty.
UNSUPPORTED_FIELDS = ("function_call", "audio")
# Kinds of parts, the keys that they must have, and the capability that they need.
PART_KEYS: Mapping[str, tuple[str, type]] = {
    "text": ("text", str),
    "refusal": ("refusal", str),
    "image_url": ("image_url", dict),
    "input_audio": ("input_audio", dict),
    "file": ("file", dict),
}
PART_CAPABILITIES = frozenset({"image_url", "input_audio", "file"})


def check_messages(messages: Any) -> tuple[Mapping[str, Any], ...]:
    """Returns valid messages, unchanged. Raises RequestError, which names the invalid message."""
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list of at least one message", "messages")
    if len(messages) > MAX_MESSAGES:
        raise RequestError(f"messages has {len(messages)} entries; the maximum is {MAX_MESSAGES}", "messages")
    for number, message in enumerate(messages):
        _check_message(message, number)
    if not any(message["role"] == "user" for message in messages):
        raise RequestError("messages must contain a message with the role user", "messages")
    return tuple(messages)


def needs_of_messages(messages: tuple[Mapping[str, Any], ...]) -> Iterator[tuple[str, str]]:
    """Yields each capability that the messages need, with the path of the value that needs it."""
    for number, message in enumerate(messages):
        if message["role"] == "tool" or message.get("tool_calls"):
            yield "tools", f"messages.[{number}]"
        content = message.get("content")
        for at, part in enumerate(content if isinstance(content, list) else ()):
            if part["type"] in PART_CAPABILITIES:
                yield part["type"], f"messages.[{number}].content.[{at}]"


def _check_message(message: Any, number: int) -> None:
    where, path = f"message {number + 1}", f"messages.[{number}]"
    if not isinstance(message, dict):
        raise RequestError(f"{where} must be an object with role and content", path)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise RequestError(
            f"{where} has the role {_shown(role)}; use one of {', '.join(sorted(ROLES))}", path
        )
    for name, value in message.items():
        if name not in {"role", "content"} and value:
            _check_field(name, role, where, path)
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        raise RequestError(
            f"{where} needs tool_call_id, the id of the call it answers", f"{path}.tool_call_id"
        )
    for name in ("name", "refusal"):
        if message.get(name) is not None and not isinstance(message[name], str):
            raise RequestError(f"{where}: {name} must be text", f"{path}.{name}")
    calls = message.get("tool_calls")
    if calls:
        _check_tool_calls(calls, where, path)
    if message.get("content") is not None or not (calls or message.get("refusal")):
        _check_content(message.get("content"), role, where, path)


def _check_field(name: str, role: str, where: str, path: str) -> None:
    if name in UNSUPPORTED_FIELDS or name not in FIELDS:
        shown = name[:MAX_SHOWN]
        raise RequestError(
            f"{where} has {shown}, which is not supported", f"{path}.{shown}", unsupported=True
        )
    if role not in FIELDS[name]:
        raise RequestError(f"{where} has {name}, which the role {role} cannot have", f"{path}.{name}")


def _check_tool_calls(calls: Any, where: str, path: str) -> None:
    if not isinstance(calls, list) or len(calls) > MAX_PARTS:
        raise RequestError(f"{where}: tool_calls must be a list of at most {MAX_PARTS}", f"{path}.tool_calls")
    for at, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        valid = isinstance(function, dict) and _are_texts(call, "id") and call.get("type") == "function"
        if not valid or not _are_texts(function or {}, "name", "arguments"):
            expected = "id, type `function`, and a function with name and arguments (text)"
            raise RequestError(f"{where}: a tool call needs {expected}", f"{path}.tool_calls.[{at}]")


def _check_content(content: Any, role: str, where: str, path: str) -> None:
    if isinstance(content, str):
        return
    if not isinstance(content, list):
        raise RequestError(f"{where}: content must be text or a list of parts", f"{path}.content")
    if len(content) > MAX_PARTS:
        raise RequestError(f"{where} has {len(content)} parts; the maximum is {MAX_PARTS}", f"{path}.content")
    for at, part in enumerate(content):
        _check_part(part, role, where, f"{path}.content.[{at}]")


def _check_part(part: Any, role: str, where: str, path: str) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in PART_KEYS:
        raise RequestError(
            f"{where} has a part of type {_shown(kind)}, which is not supported", path, unsupported=True
        )
    key, expected = PART_KEYS[kind]
    if not isinstance(part.get(key), expected):
        raise RequestError(f"{where}: a part of type {kind} needs {key}", path)
    if kind in PART_CAPABILITIES and role != "user":
        raise RequestError(f"{where}: only user messages may have parts of type {kind}", path)
    if kind == "refusal" and role != "assistant":
        raise RequestError(f"{where}: only assistant messages may have parts of type refusal", path)


def _are_texts(value: Mapping[str, Any], *names: str) -> bool:
    return all(isinstance(value.get(name), str) for name in names)


def _shown(value: Any) -> str:
    return repr(value)[:MAX_SHOWN]
