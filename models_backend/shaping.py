"""Shapes a composed answer as the request's parameters demand: stop texts, JSON, calls of tools."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models_backend.answers import CHARACTERS_A_TOKEN, prompt_digest, token_count
from models_backend.schemas import UnsupportedSchemaError, compose_json

MAX_FIELD_CHARACTERS = 120  # of the answer's text in a field of JSON


@dataclass(frozen=True, slots=True)
class Shaped:
    """An answer with its finish reason, as in OpenAI's API."""

    text: str
    finish_reason: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of text and calls."""
        return token_count(self.text) + sum(token_count(json.dumps(call)) for call in self.tool_calls)


def shaped(text: str, request: Mapping[str, Any], *, max_tokens: int) -> Shaped:
    """Returns the answer `text` as the parameters demand. Raises UnsupportedSchemaError.

    With tools, the model calls the chosen one or the first, unless the last message is a tool's result.
    """
    function = _called(request)
    if function is not None:
        arguments = compose_json(
            function.get("parameters") or {"type": "object"}, text[:MAX_FIELD_CHARACTERS]
        )
        call_id = f"call_{prompt_digest(json.dumps([function['name'], text]))}"
        content = {"name": function["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
        return Shaped("", "tool_calls", ({"id": call_id, "type": "function", "function": content},))
    whole = _formatted(text, request.get("response_format") or {})
    end, length = _stopped(whole, request.get("stop")), max_tokens * CHARACTERS_A_TOKEN
    return Shaped(end[:length], "length" if len(end) > length else "stop")


def _called(request: Mapping[str, Any]) -> Mapping[str, Any] | None:
    choice, tools = request.get("tool_choice", "auto"), request.get("tools") or []
    messages = request.get("messages") or []
    if choice == "none" or not tools or (messages and messages[-1].get("role") == "tool"):
        return None
    functions: list[Mapping[str, Any]] = [tool["function"] for tool in tools]
    if isinstance(choice, dict):
        named = choice["function"]["name"]
        found = next((function for function in functions if function["name"] == named), None)
        if found is None:
            raise UnsupportedSchemaError(f"tool_choice names no tool: {named!r}")
        return found
    return functions[0]


def _formatted(text: str, response_format: Mapping[str, Any]) -> str:
    kind = response_format.get("type", "text")
    if kind == "json_object":
        return json.dumps({"answer": text}, ensure_ascii=False)
    if kind == "json_schema":
        schema = response_format["json_schema"].get("schema") or {}
        return json.dumps(compose_json(schema, text[:MAX_FIELD_CHARACTERS]), ensure_ascii=False)
    return text


def _stopped(text: str, stop: Any) -> str:
    stops = [stop] if isinstance(stop, str) else stop or []
    return text[: min((text.index(each) for each in stops if each in text), default=len(text))]
