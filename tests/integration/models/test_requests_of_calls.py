"""A call sends its request whole: messages and parameters arrive as given, by the configured fields."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
from aiohttp import web

from models_backend.process import BackendServer, start_backend
from router.models import ModelsBackend, request_for
from router.request import CAPABILITIES, ModelRequest, Unsupported, read_request
from router.settings import BackendSettings, load_config
from router.task import CallResult, Outcome
from tests.support.calls import call_request
from tests.unit.request.test_model_request import EXAMPLES, TOOL, USER

MODEL = "qwen-2.5-72b"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendServer]:
    folder: Path = tmp_path_factory.mktemp("backend")
    backend = start_backend(folder, "--time-scale", "100000")
    yield backend
    backend.stop()


async def called(url: str, request: ModelRequest, settings: BackendSettings | None = None) -> CallResult:
    call = replace(call_request(MODEL, request.conversation.text), request=request)
    async with ModelsBackend(url, settings or BackendSettings()) as backend:
        return await backend.call(call)


def received(server: BackendServer) -> dict[str, Any] | None:
    rows = requests.get(f"{server.url}/arrivals", params={"limit": 10_000}, timeout=20).json()["arrivals"]
    found: dict[str, Any] | None = rows[-1].get("request")
    return found


@pytest.mark.parametrize("name", sorted(EXAMPLES))
async def test_each_parameter_arrives_as_given(server: BackendServer, name: str) -> None:
    given = {"tools": [TOOL], name: EXAMPLES[name]} if name.startswith("tool_") else {name: EXAMPLES[name]}
    result = await called(server.url, read_request({"messages": [USER], **given}))
    assert result.outcome is Outcome.ANSWERED, result
    assert received(server) == {"messages": [USER], **given}


async def test_a_bare_prompt_is_sent_as_a_prompt(server: BackendServer) -> None:
    await called(server.url, read_request({"prompt": "Why?"}))
    assert received(server) is None


async def test_a_parameter_without_its_capability_is_not_sent(server: BackendServer) -> None:
    settings = BackendSettings(capabilities=CAPABILITIES - {"temperature"}, on_unsupported=Unsupported.IGNORE)
    config = load_config().model_copy(update={"backend": settings})
    request = read_request({"messages": [USER], "temperature": 1, "seed": 3})
    await called(server.url, request_for(config, MODEL, request), settings)
    assert received(server) == {"messages": [USER], "seed": 3}


async def test_calls_of_tools_come_back(server: BackendServer) -> None:
    result = await called(server.url, read_request({"messages": [USER], "tools": [TOOL]}))
    assert (result.outcome, result.answer, result.finish_reason) == (Outcome.ANSWERED, "", "tool_calls")
    assert [call["function"]["name"] for call in result.tool_calls] == ["weather"]


async def test_a_cut_answer_says_so(server: BackendServer) -> None:
    call = replace(call_request(MODEL, "Tell a long story"), max_tokens=3)
    async with ModelsBackend(server.url, BackendSettings()) as backend:
        assert (await backend.call(call)).finish_reason == "length"


@asynccontextmanager
async def replying(reply: Any) -> AsyncIterator[tuple[str, list[Any]]]:
    """A server that answers every POST with `reply`, and the bodies that it received."""
    bodies: list[Any] = []

    async def answer(request: web.Request) -> web.Response:
        bodies.append(await request.json())
        return web.json_response(reply)

    app = web.Application()
    app.router.add_post("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", bodies
    finally:
        await runner.cleanup()


def completion(**message: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
    return {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}


async def test_the_whole_openai_body_can_be_sent_and_a_completion_be_read() -> None:
    settings = BackendSettings.model_validate(
        {
            "body": "openai",
            "paths": {"single": "/v1/chat/completions"},
            "fields": {"parameters": {"seed": "extra.seed"}},
        }
    )
    async with replying(completion(content="Ulm")) as (url, bodies):
        result = await called(url, read_request({"messages": [USER], "temperature": 0, "seed": 5}), settings)
        bare = await called(url, read_request({"prompt": "Why?"}), settings)
    assert (result.answer, result.prompt_tokens, result.cached_tokens, result.finish_reason) == (
        "Ulm",
        9,
        4,
        "stop",
    )
    assert bare.answer == "Ulm"
    assert {"messages": [USER], "temperature": 0, "extra": {"seed": 5}}.items() <= bodies[0].items()
    assert bodies[1]["messages"] == [{"role": "user", "content": "Why?"}]
    assert "prompt" not in bodies[1]


@pytest.mark.parametrize(
    ("message", "outcome", "text"),
    [
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, Outcome.ANSWERED, "ab"),
        ({"content": None, "refusal": "I will not."}, Outcome.REJECTED, None),
        (
            {"content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            Outcome.ANSWERED,
            "",
        ),
        ({"content": None, "tool_calls": "none"}, Outcome.GARBAGE, None),
        ({"content": None, "tool_calls": [7]}, Outcome.GARBAGE, None),
        ({"content": []}, Outcome.GARBAGE, None),
        ({"content": [{"type": "audio"}]}, Outcome.GARBAGE, None),
    ],
)
async def test_shapes_of_answers(message: dict[str, Any], outcome: Outcome, text: str | None) -> None:
    async with replying(completion(**message)) as (url, _):
        result = await called(
            url, read_request({"messages": [USER]}), BackendSettings.model_validate({"body": "openai"})
        )
    assert (result.outcome, result.answer) == (outcome, text)
