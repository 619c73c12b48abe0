"""The stand-in for the Models Backend as a process, called by the router's client and plain HTTP."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from models_backend.__main__ import main
from models_backend.answers import compose_answer, prompt_digest
from models_backend.latency import latency_seconds
from models_backend.models import PROFILES
from models_backend.process import BackendServer, start_backend
from models_backend.settings import NEW_MODELS
from router.models.backend import ModelsBackend
from router.settings.router import BackendSettings, load_config
from router.task import CallResult, Outcome
from tests.support.calls import call_request, request_id

SCALE = 200.0
JSON = {"Content-Type": "application/json"}
Start = Callable[..., BackendServer]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendServer]:
    server = start_backend(
        tmp_path_factory.mktemp("backend"), "--time-scale", str(SCALE), "--also", "llama-4-scout"
    )
    yield server
    server.stop()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts servers that end with the test."""
    started: list[BackendServer] = []

    def starter(*arguments: str) -> BackendServer:
        started.append(start_backend(tmp_path / str(len(started)), *arguments))
        return started[-1]

    yield starter
    for server in started:
        server.stop()


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
async def faulty(server: BackendServer, http: aiohttp.ClientSession) -> AsyncIterator[Callable[..., Any]]:
    """Activates a fault; all end with the test."""

    async def order(**fields: Any) -> None:
        async with http.post(f"{server.url}/faults", json=fields) as response:
            assert response.status == 201, await response.text()

    yield order
    async with http.delete(f"{server.url}/faults") as response:
        assert response.status == 200


async def ask(
    url: str, prompt: str = "why?", model: str = "phi-4", seconds: float = 10, **fields: Any
) -> CallResult:
    request = call_request(model, prompt, timeout_seconds=seconds, **fields)
    async with ModelsBackend(url, BackendSettings()) as backend:
        return await backend.call(request)


async def until_logged(
    server: BackendServer, condition: Callable[[list[dict[str, Any]]], bool]
) -> list[dict[str, Any]]:
    deadline = time.monotonic() + 5
    while not condition(rows := server.arrivals()):
        assert time.monotonic() < deadline, rows[-3:]
        await asyncio.sleep(0.02)
    return rows


async def test_it_serves_the_models_of_the_shipped_config_and_those_asked_for(server: BackendServer) -> None:
    async with ModelsBackend(server.url, BackendSettings()) as backend:
        assert set(await backend.models()) == {*load_config().models, *NEW_MODELS, "llama-4-scout"}


async def test_an_answer_names_model_and_prompt_and_costs_the_configured_price(server: BackendServer) -> None:
    price = load_config().models["qwen-2.5-72b"]
    prompt = next(p for p in map(str, range(99)) if compose_answer("qwen-2.5-72b", p).flaw is None)
    result = await ask(server.url, prompt, "qwen-2.5-72b")
    assert result.outcome is Outcome.ANSWERED
    assert result.answer is not None
    assert result.answer.startswith(f"[qwen-2.5-72b {prompt_digest(prompt)}]")
    assert result.prompt_tokens is not None
    assert result.completion_tokens is not None
    expected = (
        result.prompt_tokens * price.input_price + result.completion_tokens * price.output_price
    ) / 1e6
    assert result.cost_usd == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("max_tokens", [1, 5, 20])
async def test_no_answer_exceeds_max_tokens(server: BackendServer, max_tokens: int) -> None:
    result = await ask(server.url, "a long story", max_tokens=max_tokens)
    assert result.completion_tokens is not None
    assert result.completion_tokens <= max_tokens


async def test_a_replay_draws_the_same_latencies(start: Start) -> None:
    server = start("--time-scale", "10", "--seed", "3")
    prompts = [f"prompt {number}" for number in range(12)]
    results = await asyncio.gather(*(ask(server.url, prompt, "deepseek-v3") for prompt in prompts))
    for prompt, result in zip(prompts, results, strict=True):
        drawn = latency_seconds("deepseek-v3", prompt, seed=3, time_scale=10)
        assert result.latency_seconds is not None
        assert drawn <= result.latency_seconds < drawn + 0.5


async def test_a_latency_shape_for_all_models(start: Start) -> None:
    server = start("--latency", "even:0.2:0.2")
    result = await ask(server.url)
    assert result.latency_seconds == pytest.approx(0.2, abs=0.15)


async def test_the_arrival_log_has_the_fields_of_the_judge(server: BackendServer) -> None:
    before = time.monotonic()
    result = await ask(server.url, name="for-the-judge", reserved_tokens=321)
    after = time.monotonic()
    rows = await until_logged(
        server, lambda rows: any(row["request_id"] == request_id("for-the-judge") for row in rows)
    )
    row = next(row for row in rows if row["request_id"] == request_id("for-the-judge"))
    assert set(row) == {"at", "ended_at", "model", "request_id", "tokens_reserved", "tokens_used", "status"}
    assert before <= row["at"] <= row["ended_at"] <= after
    assert (row["model"], row["tokens_reserved"], row["status"]) == ("phi-4", 321, 200)
    assert row["tokens_used"] == result.used_tokens


async def test_an_arrival_is_recorded_before_its_body_is_read(server: BackendServer) -> None:
    body = json.dumps({"model": "phi-4", "prompt": "p", "request_id": "slow-body"}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
    sent_at = time.monotonic()
    kind = "Content-Type: application/json"
    writer.write(
        f"POST /single HTTP/1.1\r\nHost: x\r\n{kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    )
    await asyncio.sleep(0.3)  # the body arrives late on purpose
    writer.write(body)
    await reader.readuntil(b"\r\n\r\n")
    writer.close()
    rows = await until_logged(server, lambda rows: any(row["request_id"] == "slow-body" for row in rows))
    assert next(row["at"] for row in rows if row["request_id"] == "slow-body") < sent_at + 0.2


async def test_arrivals_are_read_page_by_page(server: BackendServer, http: aiohttp.ClientSession) -> None:
    async def read(since: int) -> Any:
        async with http.get(f"{server.url}/arrivals", params={"since": str(since)}) as response:
            return await response.json()

    seen = (await read(0))["next"]
    await ask(server.url, name="one more")
    fresh = await read(seen)
    assert [row["request_id"] for row in fresh["arrivals"]] == [request_id("one more")]
    assert fresh["next"] == seen + 1
    assert fresh["counts"]["phi-4"]["200"] >= 1
    assert (await read(fresh["next"]))["arrivals"] == []


async def test_stopping_writes_the_rest_of_the_log_and_what_was_in_flight(start: Start) -> None:
    server = start("--latency", "even:60:60")
    asking = asyncio.create_task(ask(server.url, name="in flight", seconds=30))
    async with aiohttp.ClientSession() as http:
        while True:
            async with http.get(f"{server.url}/health") as response:
                if (await response.json())["in_flight"] == 1:
                    break
    await asyncio.to_thread(server.stop)
    assert (await asking).outcome in {Outcome.ERROR, Outcome.OVERLOADED}
    assert [(row["request_id"], row["status"]) for row in server.arrivals()] == [
        (request_id("in flight"), 499)
    ]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b'{"model": "nobody", "prompt": "p"}', 404, "no model 'nobody'"),
        (b'{"model": "phi-4"}', 422, "prompt is missing"),
        (b'{"model": "phi-4", "prompt": ""}', 422, "prompt is missing"),
        (b'{"model": 7, "prompt": "p"}', 422, "model must be a text"),
        (b'{"model": "phi-4", "prompt": "p", "max_tokens": 0}', 422, "max_tokens must be"),
        (b'{"model": "phi-4", "prompt": "p", "max_tokens": true}', 422, "max_tokens must be"),
        (b"[]", 422, "JSON object"),
        (b"<xml/>", 422, "not JSON"),
        (b"\xff", 422, "not JSON"),
        (json.dumps({"model": "gemma-2-27b", "prompt": "x" * 40_000}).encode(), 400, "do not fit"),
        (b" " * (8 * 1024 * 1024 + 1), 413, "larger than"),
    ],
)
async def test_an_invalid_request_is_refused_with_a_message(
    server: BackendServer, http: aiohttp.ClientSession, body: bytes, status: int, words: str
) -> None:
    async def chunked() -> AsyncIterator[bytes]:
        yield body

    async with http.post(f"{server.url}/single", data=chunked(), headers=JSON) as response:
        assert response.status == status
        error = (await response.json())["error"]
    assert words in error["message"]


async def test_a_batch_waits_for_its_slowest_and_keeps_the_order(
    server: BackendServer, http: aiohttp.ClientSession
) -> None:
    prompts = [f"batch {number}" for number in range(20)]
    slowest = max(latency_seconds("phi-4", prompt, time_scale=SCALE) for prompt in prompts)
    began = time.monotonic()
    async with http.post(f"{server.url}/batch", json={"model": "phi-4", "prompts": prompts}) as response:
        results = (await response.json())["results"]
    assert time.monotonic() - began >= slowest
    expected = [compose_answer("phi-4", prompt).text for prompt in prompts]
    assert [result["answer"] for result in results] == expected


async def test_one_bad_request_of_a_batch_fails_alone(
    server: BackendServer, http: aiohttp.ClientSession
) -> None:
    requests = [{"model": "nobody", "prompt": "p"}, {"model": "phi-4", "prompt": "p"}]
    async with http.post(f"{server.url}/batch", json={"requests": requests}) as response:
        assert [result["status"] for result in (await response.json())["results"]] == [404, 200]


async def test_a_quota_refuses_excess_calls_with_a_retry_time(start: Start) -> None:
    server = start(
        "--time-scale", "1000", "--quota", "phi-4=5/2s, 100/min", "--quota", "gpt-4o-mini=1000 tokens/min"
    )
    results = await asyncio.gather(*(ask(server.url, str(number)) for number in range(8)))
    refused = [result for result in results if result.outcome is Outcome.RATE_LIMITED]
    assert len(refused) == 3
    assert all(result.retry_after_seconds in {1.0, 2.0} for result in refused)
    assert (await ask(server.url, "x", "llama-3.1-8b")).outcome is not Outcome.RATE_LIMITED
    assert (await ask(server.url, "x", "gpt-4o-mini", max_tokens=900)).outcome is not Outcome.RATE_LIMITED
    full = await ask(server.url, "x", "gpt-4o-mini", max_tokens=200)
    assert full.outcome is Outcome.RATE_LIMITED
    assert full.retry_after_seconds is not None
    assert 55 < full.retry_after_seconds <= 60


async def test_a_quota_limits_concurrency(start: Start) -> None:
    server = start("--latency", "even:0.3:0.3", "--quota", "phi-4=2 at once")
    outcomes = [result.outcome for result in await asyncio.gather(*(ask(server.url) for _ in range(3)))]
    assert outcomes.count(Outcome.RATE_LIMITED) == 1
    assert (await ask(server.url)).outcome is not Outcome.RATE_LIMITED


# Faults ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "outcome", "retry_after"),
    [
        ("error", Outcome.ERROR, None),
        ("rate_limit", Outcome.RATE_LIMITED, 3.0),
        ("overload", Outcome.OVERLOADED, 3.0),
        ("empty", Outcome.GARBAGE, None),
        ("hang", Outcome.TIMEOUT, None),
        ("slow_drip", Outcome.TIMEOUT, None),
    ],
)
async def test_each_fault_affects_its_model_only(
    server: BackendServer, faulty: Callable[..., Any], kind: str, outcome: Outcome, retry_after: float | None
) -> None:
    await faulty(model="phi-4", kind=kind, retry_after_seconds=3)
    result = await ask(server.url, seconds=0.5)
    assert (result.outcome, result.retry_after_seconds) == (outcome, retry_after)
    assert (await ask(server.url, model="gpt-4o-mini")).outcome is Outcome.ANSWERED


async def test_garbage_is_200_without_an_answer_in_several_ways(
    server: BackendServer, faulty: Callable[..., Any]
) -> None:
    await faulty(kind="garbage")
    results = [await ask(server.url) for _ in range(3)]
    assert {result.outcome for result in results} == {Outcome.GARBAGE}
    assert len({result.error for result in results}) == 3


async def test_a_slow_drip_sends_byte_by_byte(
    server: BackendServer, faulty: Callable[..., Any], http: aiohttp.ClientSession
) -> None:
    await faulty(kind="slow_drip")
    async with http.post(f"{server.url}/single", json={"model": "phi-4", "prompt": "p"}) as response:
        chunks = [await response.content.readany() for _ in range(5)]
    assert b"".join(chunks) == b'{"model": "phi-4"'[: len(b"".join(chunks))]
    assert max(map(len, chunks)) <= 2


@pytest.mark.parametrize("kind", ["hang", "slow_drip"])
async def test_a_hanging_call_ends_when_its_client_disconnects(
    server: BackendServer, faulty: Callable[..., Any], kind: str
) -> None:
    await faulty(kind=kind)
    await ask(server.url, name=f"left a {kind}", seconds=0.3)
    rows = await until_logged(
        server, lambda rows: any(row["request_id"] == request_id(f"left a {kind}") for row in rows)
    )
    assert rows[-1]["status"] == 499


async def test_a_fault_has_a_share_and_an_end(
    server: BackendServer, faulty: Callable[..., Any], http: aiohttp.ClientSession
) -> None:
    await faulty(kind="error", share=0.5, seconds=60)
    outcomes = [result.outcome for result in await asyncio.gather(*(ask(server.url) for _ in range(60)))]
    assert 10 < outcomes.count(Outcome.ERROR) < 50
    async with http.delete(f"{server.url}/faults"):
        pass
    await faulty(kind="error", seconds=0.05)
    await asyncio.sleep(0.06)
    assert (await ask(server.url)).outcome is Outcome.ANSWERED
    async with http.get(f"{server.url}/faults") as response:
        assert await response.json() == []


async def test_a_thousand_calls_hang_while_others_are_answered(
    server: BackendServer, faulty: Callable[..., Any]
) -> None:
    await faulty(model="phi-4", kind="hang")
    async with ModelsBackend(server.url, BackendSettings()) as backend:

        async def one(model: str, seconds: float) -> Outcome:
            request = call_request(model, max_tokens=64, reserved_tokens=1, timeout_seconds=seconds)
            return (await backend.call(request)).outcome

        hanging = [asyncio.create_task(one("phi-4", 4)) for _ in range(1000)]
        others = await asyncio.gather(*(one("gpt-4o-mini", 8) for _ in range(50)))
        assert set(others) == {Outcome.ANSWERED}
        assert set(await asyncio.gather(*hanging)) == {Outcome.TIMEOUT}


# What it draws ---------------------------------------------------------------------------------------------


def test_latencies_are_deterministic_and_shaped_like_measured_ones() -> None:
    drawn = sorted(latency_seconds("m", str(number), shape="llmperf") for number in range(20_000))
    assert (
        latency_seconds("m", "p", seed=1)
        == latency_seconds("m", "p", seed=1)
        != latency_seconds("m", "p", seed=2)
    )
    for share, seconds in ((0.1, 1.4), (0.25, 1.95), (0.5, 2.5), (0.75, 3.5), (0.9, 4.0), (0.99, 7.4)):
        assert drawn[int(share * len(drawn))] == pytest.approx(seconds, rel=0.1)
    assert drawn[-1] > 60


@pytest.mark.parametrize("model", [*PROFILES, "a-stranger"])
def test_every_model_takes_from_a_second_to_two_minutes(model: str) -> None:
    drawn = [latency_seconds(model, str(number)) for number in range(3000)]
    assert 1 <= min(drawn) < 5
    assert 30 < max(drawn) <= 120


def test_every_latency_shape_is_drawn() -> None:
    even = [latency_seconds("m", str(number), shape="even:1:120") for number in range(5000)]
    assert sum(even) / len(even) == pytest.approx(60.5, rel=0.03)
    skewed = sorted(latency_seconds("m", str(number), shape="lognormal:12:1:1:120") for number in range(5000))
    assert skewed[2500] == pytest.approx(12, rel=0.07)
    assert 1 <= skewed[0] < skewed[-1] == 120


@pytest.mark.parametrize(
    "shape", ["", "even", "even:2:1", "even:a:b", "even:1:inf", "lognormal:0:1:1:2", "normal:1:2"]
)
def test_an_invalid_shape_is_refused_with_the_grammar(shape: str) -> None:
    with pytest.raises(ValueError, match="lognormal:MEDIAN:SIGMA:LOW:HIGH"):
        latency_seconds("m", "p", shape=shape)


@pytest.mark.parametrize("model", PROFILES)
@pytest.mark.parametrize("category", ["technical", "creative", "general"])
def test_answers_are_as_good_as_the_models_table_says(model: str, category: str) -> None:
    answers = [compose_answer(model, str(number), category=category) for number in range(3000)]
    good = sum(answer.flaw is None for answer in answers) / len(answers)
    assert good == pytest.approx(PROFILES[model].quality[category], abs=0.03)


def test_a_good_answer_states_the_reference_and_a_bad_one_does_not() -> None:
    for number in range(200):
        prompt = f"what is {number} squared?"
        answer = compose_answer("phi-4", prompt, references={prompt: f"={number**2}="})
        assert (f"={number**2}=" in answer.text) == (answer.flaw is None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--latency", "often"), "not a latency shape"),
        (("--time-scale", "0"), "time scale"),
        (("--quota", "phi-4"), "MODEL=TARGET"),
        (("--quota", "nobody=1/s"), "'nobody' is not served"),
        (("--quota", "phi-4=1 a year"), "Cannot parse 'a year'"),
        (("--models", "/nowhere/models.yaml"), "does not exist"),
        (("--models", "/nowhere/else.yaml"), "must name a models.yaml"),
        (("--references", "/nowhere"), "No such file"),
    ],
)
def test_an_invalid_command_line_is_refused_with_a_message(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_an_occupied_port_is_reported_by_the_starter(server: BackendServer, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="address already in use"):
        start_backend(tmp_path, port=int(server.url.rsplit(":", 1)[1]))
