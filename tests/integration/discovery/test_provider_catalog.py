"""Catalogs of providers: a third-party one, and invalid, slow and broken replies."""

from __future__ import annotations

import asyncio
import gzip
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from models_backend.process import free_port
from router.discovery.catalog_entry import Reading, merged
from router.discovery.catalogs import FileCatalog, ProviderCatalog
from router.errors import CatalogError
from router.settings.discovery import FileCatalogSettings, ProviderCatalogSettings
from router.settings.environment import DEFAULT_CONFIG_FOLDER
from tests.support.waiting import until

KEY = "sk-very-secret-key"
LISTED = {"object": "list", "data": [{"id": "meta-llama/Llama-3.3-70B-Instruct", "context_window": 131072}]}


def catalog(url: str, key: str | None = KEY, **settings: Any) -> ProviderCatalog:
    return ProviderCatalog(ProviderCatalogSettings(kind="provider", name="theirs", **settings), url, key)


@pytest.fixture(scope="module")
def llmock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    url = f"http://127.0.0.1:{(port := free_port())}"

    def is_up() -> bool:
        try:
            return requests.get(f"{url}/health", timeout=1).ok
        except requests.ConnectionError:
            return False

    program = Path(sys.executable).with_name("llmock")
    log = (tmp_path_factory.mktemp("llmock") / "llmock.log").open("wb")
    process = subprocess.Popen([program, "serve", "--port", str(port)], stdout=log, stderr=log)
    until(lambda: process.poll() is not None or is_up())
    assert process.poll() is None, Path(log.name).read_text()
    yield url
    process.terminate()
    process.wait(10)
    log.close()


@pytest.mark.parametrize(
    ("provider", "endpoint", "name", "context"),
    [
        ("groq/openai/v1", "llama-3.3-70b-versatile", "llama-3.3-70b-versatile", 131072),
        (
            "together/v1",
            "meta-llama/Meta-Llama-3.1-70B-Instruct-Turbo",
            "meta-llama-3.1-70b-instruct-turbo",
            131072,
        ),
        ("mistral/v1/", "mistral-large-latest", "mistral-large-latest", None),
    ],
)
def test_providers_model_lists_are_read(
    llmock: str, provider: str, endpoint: str, name: str, context: int | None
) -> None:
    found = catalog(f"{llmock}/{provider}").read()
    model = next(model for model in found.models if model.endpoint == endpoint)
    assert (model.name, model.context_tokens, model.released, model.catalog) == (
        name,
        context,
        None,
        "theirs",
    )


async def test_a_catalog_can_be_read_within_a_running_loop(llmock: str) -> None:
    assert catalog(f"{llmock}/groq/openai/v1").read().models


def test_a_providers_model_is_completed_from_the_file(llmock: str) -> None:
    path = DEFAULT_CONFIG_FOLDER / "llama_catalog.yaml"
    file = FileCatalog(FileCatalogSettings(kind="file", name="llama", path=path.name), path)
    theirs = catalog(f"{llmock}/groq/openai/v1").read().models
    once, _ = merged([*theirs, *file.read().models])
    model = next(model for model in once if model.name == "llama-3.3-70b-versatile")
    assert (model.catalog, model.endpoint) == ("theirs", "llama-3.3-70b-versatile")
    assert (model.license, model.parameters, model.input_price) == ("llama-3.3", 70.6, 0.59)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "refuses the key (401): check LLAMA_API_KEY"),
        (404, "check LLAMA_API_BASE"),
        (503, "answers 503"),
    ],
)
def test_a_refusing_provider_is_reported(llmock: str, status: int, words: str) -> None:
    fault = {"behaviors": [{"type": "fail", "status": status, "message": f"bad key {KEY}"}]}
    requests.post(f"{llmock}/_llmock/scenario", json=fault, timeout=5).raise_for_status()
    with pytest.raises(CatalogError, match="Catalog theirs: ") as refused:
        catalog(f"{llmock}/groq/openai/v1").read()
    assert words in str(refused.value)
    assert KEY not in str(refused.value)


@asynccontextmanager
async def answering(*pieces: bytes, pause_seconds: float = 0.0) -> AsyncIterator[tuple[str, list[str]]]:
    """A server that answers every request with the pieces; its address and the heads of the requests."""
    heads: list[str] = []
    serving: list[asyncio.Task[None]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
        try:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(pause_seconds)
        except ConnectionError:
            pass  # the client closed the connection
        finally:
            writer.close()

    def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.append(asyncio.create_task(answer(reader, writer), name="provider"))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", heads
    server.close()
    for task in serving:
        task.cancel()
    await asyncio.gather(*serving, return_exceptions=True)


def reply(body: bytes, status: int = 200, headers: str = "") -> bytes:
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


async def read(url: str, key: str | None = KEY, **settings: Any) -> Reading:
    return await asyncio.to_thread(catalog(url, key, **settings).read)


async def test_one_request_is_sent_with_the_key() -> None:
    async with answering(reply(json.dumps(LISTED).encode())) as (url, heads):
        found = await read(url)
    assert [model.endpoint for model in found.models] == ["meta-llama/Llama-3.3-70B-Instruct"]
    (head,) = heads
    assert head.startswith("GET /v1/models HTTP/1.1")
    assert f"Authorization: Bearer {KEY}" in head
    async with answering(reply(json.dumps(LISTED["data"]).encode())) as (url, heads):
        assert len((await read(url, None)).models) == 1
    assert "Authorization" not in heads[0]


async def test_prices_per_token_and_per_million_tokens() -> None:
    listed = [
        {"id": "a", "pricing": {"prompt": "0.00000059", "completion": "7.9e-7"}, "context_length": 8192},
        {"id": "b", "pricing": {"input": 0.59, "output": 0.79, "hourly": 0}, "active": True},
        {"id": "c", "pricing": {"prompt": "-1", "completion": "-1"}},
        {"id": "d", "type": "embedding"},
    ]
    async with answering(reply(json.dumps({"data": listed}).encode())) as (url, _):
        found = await read(url)
    assert [(model.input_price, model.output_price) for model in found.models] == [(0.59, 0.79)] * 2
    assert [refusal.name for refusal in found.refusals] == ["c", "d"]


async def test_invalid_names_are_refused_and_an_echoed_key_is_not_shown() -> None:
    names = [
        "../../etc/passwd", "/etc/passwd", "a" * 100_000, "x\u0000y", "\u202ellama", "llama\r\nX: y", "", 7,
        None, f"{KEY}/../x", {"id": "x"}, "<script>", "llama-\ud800", "'; DROP TABLE models; --",
    ]  # fmt: skip
    body = json.dumps({"data": [*({"id": name} for name in names), "text", {"id": "llama-x"}]}).encode()
    async with answering(reply(body)) as (url, _):
        found = await read(url)
    assert [model.name for model in found.models] == ["llama-x"]
    assert len(found.refusals) == len(names) + 1
    for refusal in found.refusals:
        assert (refusal.name + refusal.reason).isprintable()
        assert len(refusal.name + refusal.reason) < 300
        assert KEY not in refusal.name + refusal.reason


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"data": [', "not valid JSON"),
        (b"<html>Bad Gateway</html>", "not valid JSON"),
        (b'{"error": {"message": "quota"}}', "no list of models"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"data": "\xff"}', "not valid UTF-8"),
        (b"", "not valid JSON"),
    ],
)
async def test_a_reply_without_a_list_is_reported(body: bytes, words: str) -> None:
    async with answering(reply(body)) as (url, _):
        with pytest.raises(CatalogError, match="Catalog theirs: ") as refused:
            await read(url)
    assert words in str(refused.value)


async def test_a_reply_over_the_size_limit_is_not_read() -> None:
    piece = b"[" + b" " * (1024 * 1024 - 1)
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 52428800\r\n\r\n"
    async with answering(head, *[piece] * 50) as (url, _):
        with pytest.raises(CatalogError, match=r"larger than 0\.5 MB"):
            await read(url, max_megabytes=0.5)


async def test_a_compressed_reply_is_refused() -> None:
    packed = gzip.compress(b" " * 20_000_000)
    async with answering(reply(packed, headers="Content-Encoding: gzip\r\n")) as (url, _):
        with pytest.raises(CatalogError, match="compressed its list"):
            await read(url)


@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 200 OK\r\nX-Long: ", b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"]
)
async def test_a_slow_reply_has_a_deadline(head: bytes) -> None:
    async with answering(head, *[b"H"] * 1000, pause_seconds=0.05) as (url, _):
        began = time.monotonic()
        with pytest.raises(CatalogError, match=r"no complete reply within 0\.5 s"):
            await read(url, timeout_seconds=0.5)
        assert time.monotonic() - began < 5


async def test_redirects_are_not_followed() -> None:
    async with (
        answering(reply(json.dumps(LISTED).encode())) as (elsewhere, heads),
        answering(reply(b"", 307, f"Location: {elsewhere}/models\r\n")) as (url, _),
    ):
        with pytest.raises(CatalogError, match="redirects are not followed; set LLAMA_API_BASE"):
            await read(url)
        assert heads == []


async def test_an_unavailable_provider_is_reported() -> None:
    with pytest.raises(
        CatalogError, match=r"cannot be reached \(ClientConnectorError\): check LLAMA_API_BASE"
    ):
        await read(f"http://127.0.0.1:{free_port()}/v1")
    async with answering(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{") as (url, _):
        with pytest.raises(CatalogError, match="cannot be reached"):
            await read(url)


@pytest.mark.parametrize(
    ("url", "key", "words"),
    [
        ("ftp://host/v1", KEY, "LLAMA_API_BASE is not an http"),
        ("http://host:port/v1", KEY, "LLAMA_API_BASE is not an http"),
        ("not an address", KEY, "LLAMA_API_BASE is not an http"),
        (f"http://user:{KEY}@host/v1", None, "must not contain a password"),
        (f"http://host/v1?key={KEY}", None, "must not contain a password"),
        ("http://host/v1", f"{KEY}\n", "LLAMA_API_KEY contains characters"),
        ("http://host/v1", "schlüssel", "LLAMA_API_KEY contains characters"),
    ],
)
def test_an_invalid_address_or_key_is_reported(url: str, key: str | None, words: str) -> None:
    with pytest.raises(CatalogError) as refused:
        catalog(url, key).read()
    assert words in str(refused.value)
    assert KEY not in str(refused.value)
