"""The stand-in honors messages and parameters, and its log shows them as they came."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import requests

from models_backend.process import BackendServer, start_backend

USER = {"role": "user", "content": "Name a city and its size."}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city", "days"], "additionalProperties": False}}},
    {"type": "function", "function": {"name": "news"}},
]  # fmt: skip
CITY = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
SCHEMAS: dict[str, Any] = {
    "any": {},
    "scalars": {"type": "object", "additionalProperties": False, "required": [*"abcd"], "properties": {
        "a": {"type": "string", "maxLength": 5}, "b": {"type": "integer", "minimum": 7, "multipleOf": 5},
        "c": {"type": "number", "exclusiveMaximum": 0}, "d": {"type": "boolean"}}},
    "choices": {"type": "object", "required": ["kind", "same"], "properties": {
        "kind": {"enum": ["city", "town"]}, "same": {"const": [1, None]}}},
    "list": {"type": "array", "minItems": 3, "items": {"type": ["string", "null"], "minLength": 200}},
    "tuple": {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "null"}], "minItems": 2},
    "reference": {"$defs": {"city": CITY}, "type": "object", "required": ["capital"],
                  "properties": {"capital": {"$ref": "#/$defs/city"}}},
    "nullable": {"type": "object", "required": ["city"], "properties": {
        "city": {"anyOf": [{"type": "null"}, CITY]}}},
    "all of": {"allOf": [CITY, {"required": ["mayor"], "properties": {"mayor": {"type": "string"}}}]},
    "formats": {"type": "object", "required": ["at", "mail"], "properties": {
        "at": {"type": "string", "format": "date-time"}, "mail": {"type": "string", "format": "email"}}},
    "tree": {"$defs": {"node": {"type": "object", "required": ["left"], "properties": {
        "left": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}}, "$ref": "#/$defs/node"},
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendServer]:
    folder: Path = tmp_path_factory.mktemp("backend")
    backend = start_backend(folder, "--time-scale", "100000")
    yield backend
    backend.stop()


def call(server: BackendServer, **fields: Any) -> dict[str, Any]:
    body = {"model": "qwen-2.5-72b", "messages": [USER], "max_tokens": 900, **fields}
    response = requests.post(f"{server.url}/single", json=body, timeout=20)
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_an_answer_is_valid_by_its_schema(server: BackendServer, schema: dict[str, Any]):
    format_ = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}}
    found = call(server, response_format=format_)
    jsonschema.validate(json.loads(found["answer"]), schema)
    assert found["finish_reason"] == "stop"


def test_a_json_object_is_one(server: BackendServer):
    assert isinstance(json.loads(call(server, response_format={"type": "json_object"})["answer"]), dict)


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        ("auto", "weather"),
        ("required", "weather"),
        ({"type": "function", "function": {"name": "news"}}, "news"),
    ],
)
def test_tools_are_called_with_arguments_of_their_schema(server: BackendServer, choice: Any, name: str):
    found = call(server, tools=TOOLS, tool_choice=choice)
    (made,) = found["tool_calls"]
    assert (made["function"]["name"], found["finish_reason"], found["answer"]) == (name, "tool_calls", "")
    schema = next(tool["function"] for tool in TOOLS if tool["function"]["name"] == name).get(
        "parameters", {}
    )
    jsonschema.validate(json.loads(made["function"]["arguments"]), schema)


def test_no_tool_is_called_after_its_result_or_against_the_choice(server: BackendServer):
    made = call(server, tools=TOOLS)["tool_calls"]
    result = {"role": "tool", "tool_call_id": made[0]["id"], "content": "12 C"}
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": made}, result]
    for found in (call(server, tools=TOOLS, messages=turns), call(server, tools=TOOLS, tool_choice="none")):
        assert (found["finish_reason"], "tool_calls" in found) == ("stop", False)


def test_an_answer_ends_at_a_stop_text_and_at_its_longest_length(server: BackendServer):
    whole = call(server)["answer"]
    word = whole.split()[3]
    assert call(server, stop=["not in it", word])["answer"] == whole[: whole.index(word)]
    cut = call(server, max_tokens=5)
    assert (cut["answer"], cut["finish_reason"]) == (whole[:20], "length")


def test_only_a_temperature_without_a_seed_varies_answers(server: BackendServer):
    def answers(**fields: Any) -> int:
        return len({call(server, request_id=str(n), **fields)["answer"] for n in range(12)})

    assert answers() == answers(temperature=0) == answers(temperature=1, seed=7) == 1
    assert answers(temperature=1) > 1


def test_the_log_shows_messages_and_parameters_as_they_came(server: BackendServer):
    given = {"messages": [USER], "tools": TOOLS, "temperature": 0.5, "metadata": {"a": "b"}, "seed": 3}
    call(server, request_id="whole", **given)
    call(server, request_id="bare", prompt="Why?", messages=None)
    arrivals = requests.get(f"{server.url}/arrivals", params={"limit": 10_000}, timeout=20).json()["arrivals"]
    logged = {row["request_id"]: row for row in arrivals}
    assert logged["whole"]["request"] == given
    assert "request" not in logged["bare"]


@pytest.mark.parametrize(
    "fields",
    [{"messages": []}, {"messages": [{"role": "user"}]}, {"messages": "x"}, {"messages": None}],
)
def test_invalid_messages_are_refused(server: BackendServer, fields: dict[str, Any]):
    response = requests.post(f"{server.url}/single", json={"model": "phi-4", **fields}, timeout=20)
    assert response.status_code == 422


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "teapot"}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/missing"}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}},
        {"tools": [{"type": "function"}]},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "gone"}}},
    ],
)
def test_a_request_that_cannot_be_answered_is_refused(server: BackendServer, fields: dict[str, Any]):
    body = {"model": "phi-4", "messages": [USER], **fields}
    response = requests.post(f"{server.url}/single", json=body, timeout=20)
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request")
