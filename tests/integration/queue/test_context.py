"""Context lengths in the queue: tasks too long for a model are left to larger ones, or fail unsent."""

from __future__ import annotations

import time
import uuid
from typing import Any

import asyncpg
import pytest

from router.task import new_call_id
from tests.support.queue import Probe

CONTEXTS = {"gemma-2-27b": 8192, "phi-4": 16_384, "mixtral-8x22b": 65_536, "llama-3.3-70b": 131_072}
LARGEST = "llama-3.3-70b"


async def claim(probe: Probe, model: str, *, largest: str = LARGEST, token_limit: int | None = None) -> Any:
    """Claims as a worker of this model does, at four bytes per token."""
    call_id = new_call_id(time.time())
    row = await probe.connection.fetchrow(
        "SELECT * FROM claim_task($1, '{}', 'w1', $2, 512, $3, 0.25, $4, $5)",
        model, call_id, token_limit or CONTEXTS[model], model == largest, token_limit,
    )  # fmt: skip
    return None if row is None else {**dict(row), "call_id": call_id}


async def settle(probe: Probe, call_id: uuid.UUID, outcome: str, error: str, **more: Any) -> str:
    return str(
        await probe.value(
            "SELECT settle_call($1, $2, p_error => $3, p_counted => false)", call_id, outcome, error
        )
    )  # fmt: skip


@pytest.fixture
async def only(probe: Probe) -> Probe:
    """The queue, with only the models of CONTEXTS in use."""
    await probe.run("UPDATE roster SET state = 'paused' WHERE NOT model = ANY ($1)", list(CONTEXTS))
    return probe


async def test_task_is_claimed_only_by_models_that_take_it(only: Probe) -> None:
    task_id = await only.add("word" * 71_000)
    for model in ("gemma-2-27b", "phi-4", "mixtral-8x22b"):
        assert await claim(only, model) is None
    taken = await claim(only, LARGEST)
    assert (taken["task_id"], taken["attempt"]) == (task_id, 1)
    assert await only.value("SELECT count(*) FROM model_calls") == 1


async def test_prompt_that_just_fits_is_not_refused(only: Probe) -> None:
    fits, too_long = await only.add("word" * (8192 - 512)), await only.add("word" * (8192 - 511))
    assert (await claim(only, "gemma-2-27b"))["task_id"] == fits
    assert await claim(only, "gemma-2-27b") is None
    assert (await claim(only, "phi-4"))["task_id"] == too_long


async def test_answer_that_does_not_fit_counts_as_well(only: Probe) -> None:
    task_id = await only.add("short", max_tokens=10_000)
    assert await claim(only, "gemma-2-27b") is None
    assert (await claim(only, "phi-4"))["task_id"] == task_id


async def test_task_that_no_model_takes_fails_once_without_a_call(only: Probe) -> None:
    task_id = await only.add("word" * 200_000)
    for model in CONTEXTS:
        assert await claim(only, model) is None
    task = await only.task(task_id)
    assert task["status"] == "failed"
    assert task["failure"].startswith(
        "the prompt is too long for every model: 800000 bytes are about 200000 tokens"
    )
    assert task["failure"].endswith(f"is 131072 tokens ({LARGEST})")
    assert await only.value("SELECT count(*) FROM model_calls") == 0
    await only.assert_counts_exact()


async def test_thousands_of_too_long_tasks_are_met_once(only: Probe) -> None:
    """A small model moves each of them out of its lane once; later claims do not see them."""
    await only.run("INSERT INTO tasks (prompt) SELECT repeat('word', 10000) FROM generate_series(1, 3000)")
    await only.run("INSERT INTO tasks (prompt) SELECT 'short' FROM generate_series(1, 30)")
    claims = 0
    while (taken := await claim(only, "gemma-2-27b")) is None:
        claims += 1
        assert claims <= 20
    assert taken["prompt"] == "short"
    assert await only.value("SELECT count(*) FROM queue WHERE state = 'long'") == 3000
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        assert (await claim(only, "gemma-2-27b"))["prompt"] == "short"
        seconds.append(time.perf_counter() - began)
    assert sorted(seconds)[10] < 0.02
    first = await claim(only, LARGEST)
    assert first["prompt"] != "short"  # long tasks first: few models take them
    await only.assert_counts_exact()


async def test_priority_comes_before_length(only: Probe) -> None:
    for tokens, priority in ((9_000, 1), (60_000, 0), (20_000, 1), (10_000, 5)):
        await only.add("word" * tokens, priority=priority)
    assert await claim(only, "gemma-2-27b") is None
    order = [len((await claim(only, LARGEST))["prompt"]) // 4 for _ in range(4)]
    assert order == [10_000, 20_000, 9_000, 60_000]


async def test_shortened_prompt_returns_to_all_models(only: Probe) -> None:
    task_id = await only.add("word" * 71_000)
    assert await claim(only, "gemma-2-27b") is None
    await only.run("UPDATE tasks SET prompt = 'short' WHERE id = $1", task_id)
    assert (await claim(only, "gemma-2-27b"))["task_id"] == task_id


async def test_no_call_reserves_more_than_the_token_limit(only: Probe) -> None:
    """One token a byte would be more than the limit ever grants, though the prompt fits."""
    await only.add("word" * 3000)
    assert (await claim(only, "phi-4", token_limit=4000))["reserved_tokens"] == 4000


@pytest.mark.parametrize(
    "error",
    ["400 This model's maximum context length is 16384 tokens. However, you requested 20000.",
     "413 Request Entity Too Large"],
)  # fmt: skip
async def test_refusal_of_the_backend_costs_no_attempt_and_goes_to_larger_models(
    only: Probe, error: str
) -> None:
    task_id = await only.add("\u4e2d" * 9_000)  # more tokens per byte than expected
    taken = await claim(only, "phi-4")
    assert await settle(only, taken["call_id"], "too_long", error) == "retry"
    for model in ("phi-4", "gemma-2-27b"):
        assert await claim(only, model) is None
    taken = await claim(only, "mixtral-8x22b")
    assert (taken["task_id"], taken["attempt"]) == (task_id, 1)
    assert await settle(only, taken["call_id"], "too_long", "413") == "retry"
    taken = await claim(only, LARGEST)
    assert await settle(only, taken["call_id"], "too_long", "413 too large") == "failed"
    failure = (await only.task(task_id))["failure"]
    assert failure.startswith(
        "the prompt is too long for every model: the largest context is 131072 tokens\n"
    )
    assert "413 too large" in failure


async def test_context_shorter_than_configured_leaves_the_task_to_its_equals(only: Probe) -> None:
    """A model whose backend allows less than its configuration says does not fail what others take."""
    await only.run("UPDATE roster SET context_tokens = 131072 WHERE model = 'phi-4'")
    task_id = await only.add("word" * 50_000)
    taken = await claim(only, "phi-4", token_limit=131_072)
    error = "400 This model's maximum context length is 32768 tokens. However, you requested 50512."
    assert await settle(only, taken["call_id"], "too_long", error) == "retry"
    assert await claim(only, "phi-4", token_limit=131_072) is None
    assert (await claim(only, LARGEST))["task_id"] == task_id


async def call(probe: Probe, model: str, prompt: str, outcome: str, **columns: Any) -> uuid.UUID:
    """Logs a call of an own task."""
    task_id = await probe.add(prompt, status="solved")
    call_id = new_call_id(time.time())
    values = {"call_id": call_id, "task_id": task_id, "model": model, "prompt_version": 1, "outcome": outcome,
              "category": "general", "tokens": columns.get("prompt_tokens"), **columns}  # fmt: skip
    version = await probe.value("SELECT prompt_version FROM tasks WHERE id = $1", task_id)
    values["prompt_version"] = version
    names = ", ".join(values)
    places = ", ".join(f"${n}" for n in range(1, len(values) + 1))
    await probe.run(
        f"INSERT INTO model_calls ({names}, finished_at) VALUES ({places}, now())", *values.values()
    )  # fmt: skip
    return call_id


async def learned(probe: Probe, model: str) -> asyncpg.Record:
    await probe.run("SELECT learn_tokens()")
    return await probe.row("SELECT * FROM roster_in_use WHERE model = $1", model)


async def test_tokens_per_byte_are_learned_from_long_prompts(only: Probe) -> None:
    for n in range(25):
        await call(only, "phi-4", "x" * (2000 + n), "answered", prompt_tokens=400)
        await call(only, "gemma-2-27b", "x" * 100, "answered", prompt_tokens=90)  # mostly a template
    before = await only.value("SELECT last_value FROM roster_version")
    found = await learned(only, "phi-4")
    assert found["tokens_per_byte"] == pytest.approx(0.2, rel=0.01)
    assert found["spread"] < 0.01
    assert found["tokens_per_call"] == pytest.approx(400)
    assert (await learned(only, "gemma-2-27b"))["tokens_per_byte"] is None
    assert await only.value("SELECT last_value FROM roster_version") == before + 1  # nothing else changed


async def test_shorter_context_is_learned_from_two_tasks(only: Probe) -> None:
    error = "400 This model's maximum context length is 4096 tokens. However, you requested 9000."
    await call(only, "phi-4", "p1", "too_long", error=error)
    assert (await learned(only, "phi-4"))["context_tokens"] == 16_384
    await call(only, "phi-4", "p2", "too_long", error=error)
    assert (await learned(only, "phi-4"))["context_tokens"] == 4096
    for n in range(3):  # implausible, or refuted by an answer
        await call(only, "gemma-2-27b", f"q{n}", "too_long", error=error.replace("4096", "100"))
        await call(only, LARGEST, f"r{n}", "too_long", error=error.replace("4096", "65536"))
    await call(only, LARGEST, "s", "answered", prompt_tokens=90_000)
    assert (await learned(only, "gemma-2-27b"))["context_tokens"] == 8192
    assert (await learned(only, LARGEST))["context_tokens"] == 131_072


@pytest.mark.parametrize(
    ("outcome", "error", "estimated"),
    [
        ("timeout", "no answer within 180 s", True), ("abandoned", "canceled", True), ("lost", "lease", True),
        ("unavailable", "the connection to the backend broke: reset", True),
        ("unavailable", "502 Bad Gateway", False), ("rate_limited", "429", False), ("error", "500", False),
    ],
)  # fmt: skip
async def test_cost_of_calls_that_were_given_up_is_estimated(
    only: Probe, outcome: str, error: str, estimated: bool
) -> None:
    await only.add("word" * 1000)
    taken = await claim(only, "phi-4")
    await settle(only, taken["call_id"], outcome, error)
    row = await only.call(taken["call_id"])
    assert row["cost_estimated"] is estimated
    expected = (1000 * 0.07 + 512 * 0.14) / 1e6
    assert (None if row["cost"] is None else float(row["cost"])) == (
        pytest.approx(expected) if estimated else None
    )
