"""The stand-in in front of an OpenAI-compatible provider on a local socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

import models_backend.provider
from models_backend.completion import ProviderRefusal
from models_backend.process import BackendServer, free_port, start_backend
from models_backend.provider import Provider
from models_backend.settings import ProviderSettings, ServedModel, provider_from_environment
from router.errors import ConfigError
from router.models.backend import ModelsBackend
from router.settings.router import BackendSettings
from router.task import CallResult, Outcome
from tests.support.calls import call_request

KEY = "sk-very-secret"
COMPLETION = {
    "choices": [{"message": {"role": "assistant", "content": "real words"}}],
    "usage": {"prompt_tokens": 11, "completion_tokens": 2},
}


@dataclass
class OpenAi:
    """Answers every request with `status`, `headers` and `body`, and records the requests."""

    port: int
    status: int = 200
    headers: str = ""
    body: bytes = json.dumps(COMPLETION).encode()
    missing_bytes: int = 0
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lengths = [
            line.split(":")[1] for line in head.lower().split("\r\n") if line.startswith("content-length:")
        ]
        self.asked.append((head, json.loads(await reader.readexactly(int(lengths[0])))))
        reply = f"HTTP/1.1 {self.status} X\r\nContent-Length: {len(self.body) + self.missing_bytes}\r\n"
        writer.write(f"{reply}{self.headers}\r\n".encode() + self.body)
        await writer.drain()
        writer.close()


@pytest.fixture(scope="module")
def provider_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, provider_port: int) -> Iterator[BackendServer]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LLAMA_API_BASE", f"http://127.0.0.1:{provider_port}/v1/")
        environment.setenv("LLAMA_API_KEY", KEY)
        environment.setenv("LLAMA_MODELS", "llama-3.3-70b=meta/llama-70b, llama-4-new=meta/llama-4")
        server = start_backend(tmp_path_factory.mktemp("backend"), "--time-scale", "100")
    yield server
    server.stop()


@pytest.fixture
async def provider(provider_port: int) -> AsyncIterator[OpenAi]:
    provider = OpenAi(provider_port)
    listening = await asyncio.start_server(provider.serve, "127.0.0.1", provider_port)
    yield provider
    listening.close()
    await listening.wait_closed()


async def ask(server: BackendServer, model: str = "llama-3.3-70b") -> CallResult:
    async with ModelsBackend(server.url, BackendSettings()) as backend:
        return await backend.call(call_request(model, "Say it", max_tokens=99, reserved_tokens=1))


async def test_a_real_model_is_forwarded_to_its_provider(server: BackendServer, provider: OpenAi) -> None:
    result = await ask(server)
    assert (result.outcome, result.answer) == (Outcome.ANSWERED, "real words")
    assert (result.prompt_tokens, result.completion_tokens) == (11, 2)
    assert result.cost_usd == pytest.approx((11 * 0.59 + 2 * 0.79) / 1e6)
    head, body = provider.asked[0]
    assert head.startswith("POST /v1/chat/completions HTTP/1.1")
    assert f"Authorization: Bearer {KEY}" in head
    messages = [{"role": "user", "content": "Say it"}]
    assert body == {"model": "meta/llama-70b", "messages": messages, "max_tokens": 99}


async def test_a_real_model_needs_no_config_entry_and_others_stay_simulated(
    server: BackendServer, provider: OpenAi
) -> None:
    assert (await ask(server, "llama-4-new")).answer == "real words"
    mock = await ask(server, "gpt-4o-mini")
    assert mock.answer is not None
    assert mock.answer.startswith("[gpt-4o-mini ")
    assert len(provider.asked) == 1


@pytest.mark.parametrize(
    ("status", "outcome", "words"),
    [
        (429, Outcome.RATE_LIMITED, "429"),
        (503, Outcome.OVERLOADED, "503"),
        (401, Outcome.OVERLOADED, "check LLAMA_API_KEY"),
        (403, Outcome.OVERLOADED, "check LLAMA_API_KEY"),
        (400, Outcome.REJECTED, "said why"),
        (404, Outcome.UNKNOWN_MODEL, "said why"),
        (500, Outcome.UNAVAILABLE, "500"),
        (302, Outcome.OVERLOADED, "302"),
    ],
)
async def test_a_providers_refusal_keeps_its_meaning(
    server: BackendServer, provider: OpenAi, status: int, outcome: Outcome, words: str
) -> None:
    provider.status, provider.headers = status, "Retry-After: 17\r\nLocation: /elsewhere\r\n"
    provider.body = json.dumps({"error": {"message": "the model said why"}}).encode()
    result = await ask(server)
    assert result.outcome is outcome
    again = {429: 17.0, 503: 17.0, 401: 30.0, 403: 30.0, 302: 30.0}
    assert result.retry_after_seconds == again.get(status)
    assert result.error is not None
    assert words in result.error
    assert KEY not in result.error
    assert len(provider.asked) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b"{}",
        b'{"choices": []}',
        b'{"choices": [{"message": {"content": null}}]}',
        b'{"usage": 1}',
    ],
)
async def test_an_invalid_completion_is_a_bad_gateway(
    server: BackendServer, provider: OpenAi, body: bytes
) -> None:
    provider.body = body
    result = await ask(server)
    assert result.outcome is Outcome.UNAVAILABLE
    assert "502" in (result.error or "")


async def test_half_a_body_is_a_bad_gateway(server: BackendServer, provider: OpenAi) -> None:
    provider.missing_bytes = 10
    result = await ask(server)
    assert (result.outcome, result.error) == (
        Outcome.UNAVAILABLE,
        "502 the provider broke off in the middle of its answer",
    )


async def test_an_unreachable_provider_costs_no_attempt(server: BackendServer) -> None:
    result = await ask(server)
    assert result.outcome is Outcome.OVERLOADED
    assert not result.outcome.counts_as_attempt
    assert result.error == "503 the provider refuses connections: check LLAMA_API_BASE"


async def test_unreported_tokens_are_estimated(server: BackendServer, provider: OpenAi) -> None:
    provider.body = json.dumps({"choices": COMPLETION["choices"]}).encode()
    result = await ask(server)
    assert (result.prompt_tokens, result.completion_tokens) == (2, 3)


async def test_a_silent_provider_is_a_gateway_timeout() -> None:
    ended = asyncio.Event()

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        ended.set()

    silent = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{silent.sockets[0].getsockname()[1]}"
    async with Provider(ProviderSettings(url, KEY, {"m": "m"}, timeout_seconds=0.1)) as provider:
        with pytest.raises(ProviderRefusal, match="did not answer in time") as caught:
            await provider.complete("m", "p", 1)
    assert caught.value.status == 504
    await ended.wait()
    silent.close()


async def test_an_endless_answer_is_cut_off(provider: OpenAi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models_backend.provider, "LARGEST_ANSWER_BYTES", 1000)
    provider.body = b" " * 100_000
    url = f"http://127.0.0.1:{provider.port}"
    async with Provider(ProviderSettings(url, KEY, {"m": "m"})) as client:
        with pytest.raises(ProviderRefusal, match="too large"):
            await client.complete("m", "p", 1)


SERVED = {name: ServedModel(name) for name in ("llama-a", "Llama-b", "phi")}


def test_without_a_list_the_llamas_are_real_under_their_own_names() -> None:
    settings = provider_from_environment({"LLAMA_API_BASE": "https://x/v1", "LLAMA_API_KEY": KEY}, SERVED)
    assert settings is not None
    assert settings.models == {"llama-a": "llama-a", "Llama-b": "Llama-b"}
    assert KEY not in repr(settings)


def test_without_an_address_nothing_is_real() -> None:
    assert provider_from_environment({"LLAMA_API_KEY": KEY}, SERVED) is None


@pytest.mark.parametrize(
    "values",
    [
        {"LLAMA_API_BASE": "host"},
        {"LLAMA_API_BASE": "http://"},
        {"LLAMA_API_BASE": "http://h:port/v1"},
        {"LLAMA_API_BASE": "http://user:hunter2@h/v1"},
        {"LLAMA_API_BASE": "http://h/v1?key=hunter2"},
        {"LLAMA_API_BASE": "http://h", "LLAMA_MODELS": "=x"},
        {"LLAMA_API_BASE": "http://h", "LLAMA_API_KEY": "hunter2\nx"},
        {"LLAMA_API_BASE": "http://h", "LLAMA_API_KEY": "hunter2 x"},
        {"LLAMA_API_BASE": "http://h", "LLAMA_STREAM": "yes"},
    ],
)
def test_an_invalid_environment_is_refused(values: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="LLAMA_") as caught:
        provider_from_environment(values, SERVED)
    assert "hunter2" not in str(caught.value)


def test_the_address_may_include_the_completions_path() -> None:
    settings = provider_from_environment({"LLAMA_API_BASE": "https://x/v1/chat/completions/"}, SERVED)
    assert settings is not None
    assert settings.base_url == "https://x/v1"
