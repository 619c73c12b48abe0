"""Requests with parameters travel whole from the table to the backend, and answers come back whole."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from router.settings.environment import Addresses
from router.settings.models import ModelSettings
from router.settings.router import RouterConfig
from tests.integration.workers.test_worker import (  # noqa: F401 - fixtures
    MODELS,
    Backend,
    addresses,
    ask,
    backend,
    config,
    running,
    server,
    solved,
    until,
    working,
)
from tests.unit.request.test_model_request import EXAMPLES, IMAGE, TOOL, USER

SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "city", "schema": {
        "type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}},
}  # fmt: skip
FIRST, SECOND = MODELS


def insert(addresses: Addresses, request: Any, prompt: str | None = None) -> int:  # noqa: F811
    row = ask(
        addresses, "INSERT INTO tasks (prompt, category, request) VALUES (%s, 'general', %s) RETURNING id",
        prompt, json.dumps(request),
    )  # fmt: skip
    return int(row[0]["id"])


def task(addresses: Addresses, task_id: int) -> dict[str, Any]:  # noqa: F811
    return ask(addresses, "SELECT * FROM tasks WHERE id = %s", task_id)[0]


def without(model: str, capability: str) -> RouterConfig:
    """The config with a model that does not have the capability."""
    whole = config()
    able = whole.backend.capabilities - {capability}
    one: ModelSettings = whole.models[model].model_copy(update={"capabilities": able})
    return whole.model_copy(update={"models": {**whole.models, model: one}})


async def test_every_parameter_arrives_as_it_was_inserted(addresses: Addresses, backend: Backend) -> None:  # noqa: F811
    given = [
        {"messages": [USER], **({"tools": [TOOL]} if name.startswith("tool_") else {}), name: value}
        for name, value in EXAMPLES.items()
    ]
    ids = [insert(addresses, request) for request in given]
    async with running(addresses, config()) as engine, working(engine):
        await until(lambda: solved(addresses) == len(given))
    calls = {str(row["call_id"]): row["task_id"] for row in ask(addresses, "SELECT * FROM model_calls")}
    arrived = {calls[row["request_id"]]: row["request"] for row in backend.arrivals()}
    assert arrived == dict(zip(ids, given, strict=True))
    assert task(addresses, ids[0])["prompt"] == USER["content"]


async def test_an_answer_of_a_schema_and_calls_of_tools_come_back(
    addresses: Addresses,  # noqa: F811
) -> None:
    formatted = insert(addresses, {"messages": [USER], "response_format": SCHEMA})
    called = insert(addresses, {"messages": [USER], "tools": [TOOL]})
    cut = insert(addresses, {"messages": [USER], "seed": 1, "max_tokens": 3})
    async with running(addresses, config()) as engine, working(engine):
        await until(lambda: solved(addresses) == 3)
    assert set(json.loads(task(addresses, formatted)["answer"])) == {"name"}
    assert task(addresses, formatted)["answer_message"] is None
    message = task(addresses, called)["answer_message"]
    assert (message["finish_reason"], message["tool_calls"][0]["function"]["name"]) == (
        "tool_calls",
        "weather",
    )
    assert (task(addresses, cut)["answer_message"], task(addresses, cut)["max_tokens"]) == (
        {"finish_reason": "length"}, 3,
    )  # fmt: skip


async def test_a_named_model_answers_alone_and_others_go_on(addresses: Addresses) -> None:  # noqa: F811
    pinned = [insert(addresses, {"messages": [USER], "model": SECOND}) for _ in range(30)]
    free = [insert(addresses, {"seed": number}, "why?") for number in range(30)]
    async with running(addresses, config()) as engine, working(engine):
        await until(lambda: solved(addresses) == 60)
    by = {row["id"]: row["answered_by"] for row in ask(addresses, "SELECT id, answered_by FROM tasks")}
    assert {by[task_id] for task_id in pinned} == {SECOND}
    assert FIRST in {by[task_id] for task_id in free}
    assert not ask(addresses, "SELECT FROM model_calls WHERE outcome <> 'answered'")


async def test_a_need_is_served_by_the_models_that_meet_it(addresses: Addresses) -> None:  # noqa: F811
    ids = [insert(addresses, {"messages": [USER], "tools": [TOOL]}) for _ in range(20)]
    async with running(addresses, without(FIRST, "tools")) as engine, working(engine):
        await until(lambda: solved(addresses) == 20)
    answered = ask(addresses, "SELECT DISTINCT answered_by FROM tasks WHERE id = ANY (%s)", ids)
    assert answered == [{"answered_by": SECOND}]
    calls = ask(addresses, "SELECT count(*) AS n, max(attempt) AS attempt FROM model_calls")
    assert calls == [{"n": 20, "attempt": 1}]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ([1], "JSON of the type array"),
        ("text", "JSON of the type string"),
        ({"messages": []}, "the prompt is empty"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role 'robot'"),
        ({"messages": [USER], "temperature": "hot"}, "temperature is invalid"),
        ({"messages": [USER], "n": 2}, "n does not support this value"),
        ({"messages": [USER], "colour": "red"}, "colour"),
        ({"messages": [USER], "model": "gone"}, "the model gone, which is not in use"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}]}, "image_url"),
    ],
)  # fmt: skip
async def test_an_invalid_request_fails_its_task_alone_and_unsent(
    addresses: Addresses,  # noqa: F811
    request_: Any,
    words: str,
) -> None:
    bad = insert(addresses, request_)
    good = insert(addresses, {"messages": [USER]})
    async with running(addresses, config()) as engine, working(engine):
        await until(lambda: task(addresses, bad)["status"] == "failed")
        await until(lambda: task(addresses, good)["status"] == "solved")
    assert words in task(addresses, bad)["failure"]
    assert not ask(addresses, "SELECT FROM model_calls WHERE task_id = %s", bad)


async def test_a_request_that_no_model_can_do_fails_with_the_reason(addresses: Addresses) -> None:  # noqa: F811
    settings = config()
    able = settings.backend.capabilities - {"tools"}
    settings = settings.model_copy(
        update={"backend": settings.backend.model_copy(update={"capabilities": able})}
    )
    bad = insert(addresses, {"messages": [USER], "tools": [TOOL]})
    async with running(addresses, settings) as engine, working(engine):
        await until(lambda: task(addresses, bad)["status"] == "failed")
    assert "no model in use can do what the request needs" in task(addresses, bad)["failure"]


async def test_tasks_pinned_to_a_model_that_retires_fail(addresses: Addresses) -> None:  # noqa: F811
    async with running(addresses, config()) as engine:
        bad = insert(addresses, {"messages": [USER], "model": SECOND})
        async with working(engine, FIRST):
            await until(lambda: ask(addresses, "SELECT state FROM queue")[0]["state"] == "pinned")
            await asyncio.sleep(0.5)
            assert task(addresses, bad)["status"] == "unsolved"
            ask(addresses, "UPDATE roster SET state = 'retired' WHERE model = %s", SECOND)
            await until(lambda: task(addresses, bad)["status"] == "failed")
    assert f"the model {SECOND}, which is not in use" in task(addresses, bad)["failure"]


async def test_a_prompt_that_is_too_long_for_its_named_model_fails(addresses: Addresses) -> None:  # noqa: F811
    small = config()
    models = {
        **small.models,
        SECOND: small.models[SECOND].model_copy(update={"context_tokens": 2000}),
        FIRST: small.models[FIRST].model_copy(update={"context_tokens": 100_000}),
    }
    long = {"messages": [{"role": "user", "content": "why? " * 4000}]}
    pinned = insert(addresses, {**long, "model": SECOND})
    free = insert(addresses, {**long, "seed": 1})
    async with running(addresses, small.model_copy(update={"models": models})) as engine, working(engine):
        await until(lambda: task(addresses, pinned)["status"] == "failed")
        await until(lambda: task(addresses, free)["status"] == "solved")
    assert f"too long for {SECOND}, the only model that may answer" in task(addresses, pinned)["failure"]
    assert task(addresses, free)["answered_by"] == FIRST


async def test_an_edited_prompt_replaces_the_messages_and_an_edited_request_the_prompt(
    addresses: Addresses,  # noqa: F811
    backend: Backend,  # noqa: F811
) -> None:
    edited = insert(addresses, {"messages": [USER], "seed": 5})
    ask(addresses, "UPDATE tasks SET prompt = 'Another one' WHERE id = %s", edited)
    assert task(addresses, edited)["request"] == {"seed": 5}
    replaced = insert(addresses, {"messages": [USER], "seed": 6})
    turns = [USER, {"role": "assistant", "content": "Cold."}, {"role": "user", "content": "How cold?"}]
    ask(addresses, "UPDATE tasks SET request = %s WHERE id = %s", json.dumps({"messages": turns}), replaced)
    text = "User: What is the weather in Ulm?\n\nAssistant: Cold.\n\nUser: How cold?"
    assert task(addresses, replaced)["prompt"] == text
    async with running(addresses, config()) as engine, working(engine):
        await until(lambda: solved(addresses) == 2)
    assert sorted(map(str, (row.get("request") for row in backend.arrivals()))) == sorted(
        map(str, ({"seed": 5}, {"messages": turns}))
    )


async def test_a_changed_request_of_a_solved_task_is_solved_again(addresses: Addresses) -> None:  # noqa: F811
    one = insert(addresses, {"messages": [USER], "tools": [TOOL]})
    async with running(addresses, config()) as engine, working(engine):
        await until(lambda: solved(addresses) == 1)
        assert task(addresses, one)["answer_message"]
        changed = json.dumps({"messages": [USER], "seed": 1})
        ask(addresses, "UPDATE tasks SET request = %s WHERE id = %s", changed, one)
        await until(lambda: task(addresses, one)["status"] == "solved")
    found = task(addresses, one)
    assert (bool(found["answer"]), found["answer_message"]) == (True, None)
