"""The stand-in's simulated conditions: models that fail, are slow, expensive, worse or missing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from models_backend.__main__ import main
from models_backend.process import BackendServer, start_backend
from router.models.backend import ModelsBackend
from router.settings.router import BackendSettings
from router.task import CallResult, Outcome
from tests.support.calls import call_request, request_id

PROMPT = "Describe the harbour of Genoa"  # its words suggest no category
KNOWN = [{"prompt": f"{PROMPT} {number}", "category": "technical"} for number in range(40)]
SetConditions = Callable[..., Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendServer]:
    folder = tmp_path_factory.mktemp("conditions")
    references = folder / "references.jsonl"
    references.write_text("".join(json.dumps(row) + "\n" for row in KNOWN))
    server = start_backend(
        folder, "--latency", "even:0.05:0.05", "--references", str(references), "--also", "newcomer=10/20"
    )
    yield server
    server.stop()


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
async def conditions(server: BackendServer, http: aiohttp.ClientSession) -> AsyncIterator[SetConditions]:
    """Sets conditions; they end with the test."""

    async def put(*orders: dict[str, Any]) -> int:
        async with http.put(f"{server.url}/conditions", json=orders) as response:
            return response.status

    yield put
    assert await put() == 200


async def ask(server: BackendServer, prompt: str = KNOWN[0]["prompt"], model: str = "phi-4") -> CallResult:
    async with ModelsBackend(server.url, BackendSettings()) as backend:
        return await backend.call(call_request(model, prompt, name=f"to {model}", timeout_seconds=5))


async def test_a_share_of_calls_fails_in_one_category_only(
    server: BackendServer, conditions: SetConditions
) -> None:
    await conditions({"model": "phi-4", "category": "technical", "failing": 0.5})
    results = await asyncio.gather(*(ask(server, row["prompt"]) for row in KNOWN))
    failed = [result.outcome for result in results].count(Outcome.ERROR)
    assert 5 < failed < 35
    assert (await ask(server, model="gpt-4o-mini")).outcome is Outcome.ANSWERED
    others = await asyncio.gather(*(ask(server, f"{PROMPT}, number {n}") for n in range(10)))
    assert {result.outcome for result in others} == {Outcome.ANSWERED}


async def test_conditions_change_latency_price_and_quality(
    server: BackendServer, conditions: SetConditions, http: aiohttp.ClientSession
) -> None:
    usual = await ask(server, model="newcomer")
    await conditions(
        {"model": "newcomer", "latency_factor": 8, "price_factor": 3, "quality": 1.0},
        {"model": "phi-4", "category": "technical", "quality": 0.0},
    )
    changed = await ask(server, model="newcomer")
    bad = await ask(server)
    assert usual.latency_seconds is not None
    assert changed.latency_seconds is not None
    assert changed.latency_seconds > 3 * usual.latency_seconds
    tokens = (changed.prompt_tokens or 0) * 10 + (changed.completion_tokens or 0) * 20
    assert changed.cost_usd == pytest.approx(3 * tokens / 1e6)
    async with http.get(f"{server.url}/flaws") as response:
        page = await response.json()
    good, flawed = page["answers"][-2:]
    assert (good["request_id"], good["flaw"]) == (request_id("to newcomer"), None)
    assert (flawed["model"], flawed["category"]) == ("phi-4", "technical")
    assert flawed["flaw"] is not None
    async with http.get(f"{server.url}/flaws", params={"since": page["next"] - 1}) as response:
        assert await response.json() == {"next": page["next"], "answers": [flawed]}
    assert bad.outcome in (Outcome.ANSWERED, Outcome.GARBAGE)  # an empty answer is not an answer


async def test_a_model_that_is_not_served_is_not_listed_and_unknown(
    server: BackendServer, conditions: SetConditions
) -> None:
    async with ModelsBackend(server.url, BackendSettings()) as backend:
        assert "newcomer" in await backend.models()
        await conditions({"model": "newcomer", "served": False})
        assert "newcomer" not in await backend.models()
        assert (await ask(server, model="newcomer")).outcome is Outcome.UNKNOWN_MODEL
        await conditions()
        assert "newcomer" in await backend.models()


@pytest.mark.parametrize(
    ("orders", "status"),
    [
        ([{"model": "nobody"}], 409),
        ([{"model": "phi-4"}, {"model": "phi-4", "failing": 1}], 409),
        ([{"model": "phi-4", "category": "general", "served": False}], 422),
        ([{"model": "phi-4", "failing": 2}], 422),
        ([{"model": "phi-4", "colour": "grey"}], 422),
    ],
)
async def test_an_invalid_condition_is_refused_and_changes_nothing(
    server: BackendServer,
    conditions: SetConditions,
    http: aiohttp.ClientSession,
    orders: list[Any],
    status: int,
) -> None:
    await conditions({"model": "phi-4", "quality": 0.5})
    assert await conditions(*orders) == status
    async with http.get(f"{server.url}/conditions") as response:
        (order,) = await response.json()
    assert (order["model"], order["quality"]) == ("phi-4", 0.5)


@pytest.mark.parametrize("also", ["newcomer=cheap", "newcomer=1", "newcomer=-1/2", "newcomer=1/inf"])
def test_a_price_that_does_not_parse_is_refused(also: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--also", also]) == 2
    assert "INPUT/OUTPUT" in capsys.readouterr().err


def test_a_reference_line_without_content_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "references.jsonl"
    file.write_text('{"prompt": "why?"}\n')
    assert main(["--references", str(file)]) == 2
    assert "each line must read" in capsys.readouterr().err
