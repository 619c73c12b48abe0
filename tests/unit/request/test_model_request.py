"""Requests are read whole, or rejected by parameter name."""

from __future__ import annotations

import json
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming

from router.request import (
    CAPABILITIES,
    TEXT_CAPABILITIES,
    ModelRequest,
    Parameters,
    RequestError,
    Unsupported,
    check_supported,
    read_request,
)
from router.request.capabilities import HINTS, SAMPLING
from router.request.messages import UNSUPPORTED_FIELDS
from router.request.model_request import REFUSED, TRANSPORT

USER = {"role": "user", "content": "What is the weather in Ulm?"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "city", "schema": {"type": "object"}}}
# A value of each parameter, as it travels.
EXAMPLES: dict[str, Any] = {
    "temperature": 0.2, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "seed": -7, "presence_penalty": 1,
    "frequency_penalty": -2, "repetition_penalty": 1.1, "logit_bias": {"50256": -100}, "stop": ["\n", "END"],
    "response_format": SCHEMA, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False,
    "reasoning_effort": "low", "verbosity": "high", "service_tier": "flex", "metadata": {"run": "7"},
    "user": "u-1", "safety_identifier": "s", "prompt_cache_key": "k", "prompt_cache_retention": "24h",
    "prompt_cache_options": {"mode": "explicit"},
}  # fmt: skip
LOCAL = {"model", "messages", "max_tokens", "max_completion_tokens"}


def rejected(document: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        read_request(document)
    return caught.value


def test_every_parameter_of_the_openai_package_is_carried_or_rejected_by_name():
    known = get_type_hints(CompletionCreateParamsNonStreaming).keys()
    assert known - LOCAL - TRANSPORT - REFUSED.keys() <= Parameters.model_fields.keys()
    assert not REFUSED.keys() & Parameters.model_fields.keys()


def test_every_parameter_has_an_example_and_a_capability():
    assert EXAMPLES.keys() == Parameters.model_fields.keys()
    whole = ModelRequest(read_request({"prompt": "x"}).conversation, parameters=EXAMPLES)
    assert {capability for capability, _ in whole.needs()} | {"json_object"} == TEXT_CAPABILITIES
    assert Parameters.model_fields.keys() >= HINTS | SAMPLING


@given(st.sets(st.sampled_from(sorted(EXAMPLES))))
def test_parameters_are_kept_as_given(names: set[str]):
    given_ = {"tools": [TOOL], **{name: EXAMPLES[name] for name in names}}
    body = {"model": "phi-4", "messages": [USER], "max_tokens": 9, **given_}
    request = read_request(json.loads(json.dumps(body)))
    assert request.parameters == given_
    assert (request.model, request.max_tokens, request.messages) == ("phi-4", 9, (USER,))
    assert request.stored() == body
    assert read_request(request.stored()) == request


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_parameters_that_cannot_be_kept_are_rejected_unless_they_mean_the_default(name: str):
    error = rejected({"messages": [USER], name: {"any": "value"}})
    assert (error.param, error.unsupported) == (name, True)
    for default in (*REFUSED[name], None):
        assert read_request({"messages": [USER], name: default}).parameters == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (-0.1, 2.1, "1", True, float("nan"))),
        ("top_p", 1.5),
        ("seed", 1.5),
        ("seed", 2**63),
        ("stop", [""]),
        ("stop", ["a"] * 5),
        ("stop", 7),
        ("logit_bias", {"7": 101}),
        ("logit_bias", [7]),
        ("response_format", {"type": "xml"}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", "json"),
        ("tools", [{"type": "function"}]),
        ("tools", [{"type": "web_search"}]),
        ("tools", [TOOL] * 129),
        ("tools", [{"type": "function", "function": {"name": "two words"}}]),
        ("tool_choice", "required"),  # without tools
        ("tool_choice", "always"),
        ("parallel_tool_calls", 1),
        ("reasoning_effort", "extreme"),
        ("metadata", {"a": 1}),
        ("metadata", {str(n): "" for n in range(17)}),
        ("user", 7),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("max_tokens", "9"),
        ("max_completion_tokens", 10**9),
        ("model", 7),
        ("model", ""),
        ("prompt", "and messages"),
        ("colour", "red"),
    ],
)
def test_invalid_values_are_rejected_by_name(name: str, value: Any):
    error = rejected({"messages": [USER], name: value})
    assert error.param == name
    assert name in str(error)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("hello", "messages"),
        ([{"role": "assistant", "content": "Hi"}], "messages"),
        ([USER, "x"], "messages.[1]"),
        ([{"role": "robot", "content": "x"}], "messages.[0]"),
        ([{"role": "user"}], "messages.[0].content"),
        ([{"role": "user", "content": 7}], "messages.[0].content"),
        ([{"role": "user", "content": [{"type": "video"}]}], "messages.[0].content.[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.[0].content.[0]"),
        (
            [{"role": "system", "content": [{"type": "image_url", "image_url": {}}]}],
            "messages.[0].content.[0]",
        ),
        ([{"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}], "messages.[0].content.[0]"),
        ([USER, {"role": "tool", "content": "12 C"}], "messages.[1].tool_call_id"),
        ([USER, {"role": "assistant", "tool_calls": [{"id": "a"}]}], "messages.[1].tool_calls.[0]"),
        ([{**USER, "tool_calls": [CALL]}], "messages.[0].tool_calls"),
        ([{**USER, "mood": "good"}], "messages.[0].mood"),
        ([{**USER, "name": 7}], "messages.[0].name"),
        *(([{**USER, name: {"a": 1}}], f"messages.[0].{name}") for name in UNSUPPORTED_FIELDS),
    ],
)
def test_invalid_messages_are_rejected_by_path(messages: Any, param: str):
    assert rejected({"messages": messages}).param == param


def test_a_conversation_with_tools_and_parts_is_kept_and_has_a_text():
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Look:"}, IMAGE]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12 C"},
    ]  # fmt: skip
    request = read_request({"messages": messages})
    assert list(request.messages or ()) == messages
    expected = 'Be brief.\n\nUser: Look:\n[image_url]\n\nAssistant: weather({"city": "Ulm"})\n\nTool: 12 C'
    assert request.conversation.text == expected
    assert list(request.needs()) == [
        ("image_url", "messages.[1].content.[1]"), ("tools", "messages.[2]"), ("tools", "messages.[3]"),
    ]  # fmt: skip


@pytest.mark.parametrize("value", ["a\0b", "\ud800", float("inf"), {"a": {"b": ["\0"]}}, {"\ud800": 1}])
def test_values_that_cannot_be_stored_are_rejected(value: Any):
    function = {"name": "f", "parameters": {"x": value}}
    error = rejected({"messages": [USER], "tools": [{"type": "function", "function": function}]})
    assert error.param == "tools"
    str(error).encode("ascii")


def test_deep_nesting_is_rejected():
    deep: Any = {}
    for _ in range(100):
        deep = {"items": deep}
    tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
    assert "levels deep" in str(rejected({"messages": [USER], "tools": [tool]}))


def test_a_bare_prompt_stores_no_request():
    assert ModelRequest.of_prompt("Why?").stored() is None
    assert read_request({"prompt": "Why?", "max_tokens": 5}).stored() is None
    assert read_request({"prompt": "Why?", "temperature": 0}).stored() == {"temperature": 0}


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_a_missing_capability_is_named_unless_the_parameter_is_only_a_hint(name: str):
    value = EXAMPLES[name]
    request = ModelRequest(read_request({"prompt": "x"}).conversation, parameters={name: value})
    ((capability, path),) = request.needs()
    assert path == name
    assert check_supported(request, CAPABILITIES, who="it", unsupported=Unsupported.REFUSE) == ()
    without = CAPABILITIES - {capability}
    if name in HINTS:
        assert check_supported(request, without, who="it", unsupported=Unsupported.REFUSE) == (name,)
        return
    with pytest.raises(
        RequestError, match=f"{name} needs {capability}, which phi-4 does not support"
    ) as caught:
        check_supported(request, without, who="phi-4", unsupported=Unsupported.REFUSE)
    assert (caught.value.param, caught.value.unsupported) == (name, True)
    if name in SAMPLING:
        assert check_supported(request, without, who="it", unsupported=Unsupported.IGNORE) == (name,)


@pytest.mark.parametrize(
    ("name", "value"),
    [("tools", []), ("tool_choice", "auto"), ("response_format", {"type": "text"}), ("logit_bias", {})],
)
def test_values_that_mean_the_default_need_no_capability(name: str, value: Any):
    assert list(read_request({"messages": [USER], name: value}).needs()) == []
