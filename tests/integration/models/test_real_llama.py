"""Real models behind the Models Backend, at an OpenAI-compatible provider simulated by `llmock serve`.

llmock has the addresses and error bodies of real LLaMA providers (here Groq's), and fails on demand.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from local.redis import RedisServer
from models_backend.completion import ProviderRefusal
from models_backend.process import BackendServer, free_port, start_backend
from models_backend.provider import Provider
from models_backend.settings import ProviderSettings
from router.answering.router import Router
from router.database import connect, rows
from router.models.backend import ModelsBackend
from router.models.roster import sync_roster
from router.settings.environment import Addresses
from router.settings.models import ModelSettings
from router.settings.router import BackendSettings, RouterConfig, WorkerSettings
from router.task import CallResult, Outcome
from router.workers.engine import Engine
from router.workers.worker import Worker
from tests.support.calls import call_request
from tests.support.waiting import until

KEY = "sk-very-secret-key"
THEIRS = "llama-3.3-70b-versatile"
OURS = "llama-3.3-70b"


@dataclass(frozen=True)
class Llmock:
    """The provider. `script` sets how it treats the next requests."""

    url: str

    @property
    def base(self) -> str:
        return f"{self.url}/groq/openai/v1"

    def script(self, *behaviors: dict[str, Any]) -> None:
        reply = requests.post(f"{self.url}/_llmock/scenario", json={"behaviors": behaviors}, timeout=5)
        reply.raise_for_status()

    def reset(self) -> None:
        requests.post(f"{self.url}/_llmock/reset", timeout=5).raise_for_status()

    def asked(self) -> list[dict[str, Any]]:
        found = requests.get(f"{self.url}/_llmock/requests", timeout=5).json()
        return list(found["requests"])

    def is_up(self) -> bool:
        try:
            return requests.get(f"{self.url}/health", timeout=1).ok
        except requests.ConnectionError:
            return False


@pytest.fixture(scope="module")
def llmock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Llmock]:
    port = free_port()
    program = Path(sys.executable).with_name("llmock")
    log = (tmp_path_factory.mktemp("llmock") / "llmock.log").open("wb")
    options = ("--port", str(port), "--response-style", "echo")
    process = subprocess.Popen([program, "serve", *options], stdout=log, stderr=log)
    provider = Llmock(f"http://127.0.0.1:{port}")
    until(lambda: process.poll() is not None or provider.is_up())
    assert process.poll() is None, Path(log.name).read_text()
    yield provider
    process.terminate()
    process.wait(10)
    log.close()


@pytest.fixture
def provider(llmock: Llmock) -> Llmock:
    llmock.reset()
    return llmock


@pytest.fixture(scope="module")
def backend(llmock: Llmock, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendServer]:
    with pytest.MonkeyPatch.context() as environment:
        for name, value in named(llmock).items():
            environment.setenv(name, value)
        server = start_backend(tmp_path_factory.mktemp("backend"), "--time-scale", "100")
    yield server
    server.stop()


def named(llmock: Llmock) -> dict[str, str]:
    """Environment that forwards one model to the provider."""
    return {"LLAMA_API_BASE": llmock.base, "LLAMA_API_KEY": KEY, "LLAMA_MODELS": f"{OURS}={THEIRS}"}


async def call(backend: BackendServer, model: str = OURS) -> CallResult:
    async with ModelsBackend(backend.url, BackendSettings()) as client:
        return await client.call(call_request(model, "Why is the sky blue?", max_tokens=99))


async def test_configured_model_is_forwarded_and_others_are_simulated(
    provider: Llmock, backend: BackendServer
) -> None:
    real, mock = await call(backend), await call(backend, "gpt-4o-mini")
    assert (real.outcome, real.answer) == (Outcome.ANSWERED, "Hello! You said: Why is the sky blue?")
    assert real.prompt_tokens is not None
    assert real.completion_tokens is not None
    assert real.cost_usd == pytest.approx((real.prompt_tokens * 0.59 + real.completion_tokens * 0.79) / 1e6)
    assert (mock.answer or "").startswith("[gpt-4o-mini ")
    asked = provider.asked()
    assert [(one["path"], one["model"]) for one in asked] == [("/groq/openai/v1/chat/completions", THEIRS)]


@pytest.mark.usefixtures("redis_client")
async def test_batch_is_solved_by_the_real_model(
    provider: Llmock, backend: BackendServer, database: str, redis_server: RedisServer
) -> None:
    only = {OURS: ModelSettings(target="3000/min", ranks={"general": 1})}
    config = RouterConfig(models=only, worker=WorkerSettings(idle_leave_seconds=0.3))
    with connect(database) as connection:
        sync_roster(connection, config)
        rows(connection, "INSERT INTO tasks (prompt, category) VALUES ('Why?', 'general')")
    engine = Engine(
        Addresses(database_url=database, redis_url=redis_server.url, backend_url=backend.url), config
    )
    await engine.start()
    await asyncio.wait_for(Worker(engine, OURS, "run-1", frozenset(only)).run(), 30)
    await engine.stop()
    with connect(database) as connection:
        (task,) = rows(connection, "SELECT status, answer, answered_by FROM tasks")
    assert task == {"status": "solved", "answer": "Hello! You said: Why?", "answered_by": OURS}


@pytest.mark.usefixtures("redis_client")
async def test_prompt_is_routed_to_the_real_model(
    provider: Llmock, backend: BackendServer, database: str, redis_server: RedisServer, tmp_path: Path
) -> None:
    where = {"ROUTER_DATABASE_URL": database, "ROUTER_REDIS_URL": redis_server.url}
    router = Router.from_config(
        environment={**where, "MODELS_BACKEND_URL": backend.url, "ROUTER_DATA": str(tmp_path)}
    )
    await router.open(classify=False)
    answer = await router.answer("Why is the sky blue?", category="general")
    await router.close()
    assert answer.text == "Hello! You said: Why is the sky blue?"
    assert (answer.model, answer.preferred, answer.provisional) == (OURS, OURS, False)


FAULTS = [
    ({"status": 401}, Outcome.OVERLOADED, "the provider refuses our key (401): check LLAMA_API_KEY"),
    ({"status": 404, "code": "model_not_found"}, Outcome.UNKNOWN_MODEL, "does not serve this model"),
    ({"status": 400, "message": "no such role"}, Outcome.REJECTED, "answered 400: no such role"),
    ({"status": 429, "retry_after": 7}, Outcome.RATE_LIMITED, "answered 429"),
    ({"status": 503, "retry_after": 3}, Outcome.OVERLOADED, "answered 503"),
    ({"status": 500}, Outcome.UNAVAILABLE, "answered 500"),
    ({"status": 504}, Outcome.UNAVAILABLE, "the provider itself ran out of time (504)"),
    ({"status": 500, "message": f"no {KEY} here"}, Outcome.UNAVAILABLE, "answered 500: no *** here"),
]


@pytest.mark.parametrize(("fault", "outcome", "words"), FAULTS)
async def test_provider_error_is_reported_without_the_key(
    provider: Llmock, backend: BackendServer, fault: dict[str, Any], outcome: Outcome, words: str
) -> None:
    provider.script({"type": "fail", **fault})
    result = await call(backend)
    assert result.outcome is outcome
    assert words in (result.error or "")
    assert KEY not in (result.error or "")
    assert result.retry_after_seconds == (30.0 if fault["status"] == 401 else fault.get("retry_after"))
    assert len(provider.asked()) == 1


def settings(provider: Llmock, **others: Any) -> ProviderSettings:
    return ProviderSettings(provider.base, KEY, {OURS: THEIRS}, **others)


async def test_slow_provider_times_out(provider: Llmock) -> None:
    provider.script({"type": "delay", "seconds": 2})
    async with Provider(settings(provider, timeout_seconds=0.3)) as client:
        with pytest.raises(ProviderRefusal, match="did not answer in time") as caught:
            await client.complete(OURS, "p", 5)
    assert caught.value.status == 504


async def test_stream_is_joined_and_counted(provider: Llmock) -> None:
    async with Provider(settings(provider)) as client:
        whole = await client.complete(OURS, "Why is the sky blue?", 50)
    async with Provider(settings(provider, stream=True)) as client:
        assert await client.complete(OURS, "Why is the sky blue?", 50) == whole
    assert [one["stream"] for one in provider.asked()] == [False, True]


@pytest.mark.parametrize(
    ("fault", "status", "words"),
    [
        ({"kind": "disconnect"}, 502, "the provider broke off in the middle of its answer"),
        ({"kind": "truncate"}, 502, "the provider's stream ended before its answer did"),
        ({"kind": "malformed"}, 502, "a piece of the provider's stream is not JSON"),
        ({"kind": "stall", "stall_seconds": 3}, 504, "the provider did not answer in time"),
    ],
)
async def test_broken_stream_is_an_error(
    provider: Llmock, fault: dict[str, Any], status: int, words: str
) -> None:
    provider.script({"type": "stream_fault", "after_chunks": 2, **fault})
    async with Provider(settings(provider, stream=True, silence_seconds=0.3)) as client:
        with pytest.raises(ProviderRefusal) as caught:
            await client.complete(OURS, "Why is the sky blue?", 50)
    assert caught.value.status == status
    assert str(caught.value).startswith(words)


def check(environment: dict[str, str]) -> tuple[int, str]:
    """Returns exit code and output of `python -m models_backend --check`."""
    command = [sys.executable, "-m", "models_backend", "--check"]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=30, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_check_reports_an_answer_or_the_error(provider: Llmock) -> None:
    code, words = check(named(provider))
    assert code == 0
    assert f"{OURS} = {THEIRS}: answered 'Hello! You said: Answer with the one word: yes'" in words
    code, words = check({**named(provider), "LLAMA_API_BASE": f"{provider.url}/nowhere"})
    assert code == 1
    assert "no chat completions at the provider's address (404): check LLAMA_API_BASE" in words
    assert KEY not in words
