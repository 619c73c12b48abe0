"""Client of the Models Backend against real sockets: the result of every kind of reply and failure."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest

from models_backend.process import free_port
from router.errors import BackendUnavailable, ConfigError, PermitExpired
from router.models.backend import ModelsBackend
from router.settings.router import BackendFields, BackendSettings
from router.task import CallResult, Outcome
from tests.support.calls import call_request, request_id

GOOD = {"model": "m", "answer": "42", "usage": {"prompt_tokens": 3, "completion_tokens": 4}, "cost_usd": 0.5}


@dataclass
class Scripted:
    """A server that sends scripted bytes and records what it receives."""

    reply: bytes
    then_close: bool = False
    release: asyncio.Event = field(default_factory=asyncio.Event)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    bytes_seen: int = 0
    connections: int = 0
    url: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                self.heads.append(head)
                length = next(
                    (
                        int(line[15:])
                        for line in head.lower().split("\r\n")
                        if line.startswith("content-length:")
                    ),
                    0,
                )
                body = await reader.readexactly(length)
                self.bytes_seen += len(head) + len(body)
                if body:
                    self.bodies.append(json.loads(body))
                await self.release.wait()
                writer.write(self.reply)
                await writer.drain()
                if self.then_close:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def scripted(reply: bytes, *, then_close: bool = False, held: bool = False) -> AsyncIterator[Scripted]:
    script = Scripted(reply, then_close)
    if not held:
        script.release.set()
    server = await asyncio.start_server(script.serve, "127.0.0.1", 0)
    script.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield script
    finally:
        script.release.set()
        server.close()


def http(status: int, document: object = None, headers: dict[str, str] | None = None) -> bytes:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    lines = [
        f"HTTP/1.1 {status} Any",
        f"Content-Length: {len(body)}",
        *(f"{k}: {v}" for k, v in (headers or {}).items()),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def call(
    backend: ModelsBackend,
    before_send: Callable[[], None] | None = None,
    timeout_seconds: float = 5,
    prompt: str = "p",
) -> CallResult:
    request = call_request(
        "m", prompt, name="r1", max_tokens=16, reserved_tokens=20, timeout_seconds=timeout_seconds
    )
    return await backend.call(request, before_send=before_send)


async def result_of(reply: bytes, settings: BackendSettings | None = None, **options: Any) -> CallResult:
    async with (
        scripted(reply, **options) as script,
        ModelsBackend(script.url, settings or BackendSettings()) as backend,
    ):
        return await call(backend)


async def until(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0.005)


def acquired(backend: ModelsBackend) -> int:
    assert backend._session is not None
    connector = backend._session.connector
    assert connector is not None
    return len(connector._acquired)


async def test_answer_has_usage_and_latency() -> None:
    result = await result_of(http(200, GOOD))
    assert (result.outcome, result.answer, result.used_tokens, result.cost_usd) == (
        Outcome.ANSWERED,
        "42",
        7,
        0.5,
    )
    assert result.latency_seconds is not None
    assert 0 < result.latency_seconds < 1
    assert result.error is None


async def test_field_names_and_paths_are_configurable() -> None:
    fields = BackendFields(
        model="llm.name", prompt="llm.input", answer="choices.0.message.content", prompt_tokens="used.in",
        completion_tokens="used.out", cost_usd="price",
    )  # fmt: skip
    settings = BackendSettings.model_validate({"fields": fields, "paths": {"single": "/v1/ask"}})
    document = {"choices": [{"message": {"content": "hi"}}], "used": {"in": 1, "out": 2}, "price": 3}
    async with (
        scripted(http(200, document)) as script,
        ModelsBackend(script.url + "/api/", settings) as backend,
    ):
        result = await call(backend)
    assert result.outcome is Outcome.ANSWERED
    assert (result.answer, result.prompt_tokens, result.completion_tokens, result.cost_usd) == (
        "hi",
        1,
        2,
        3.0,
    )
    assert script.heads[0].startswith("POST /api/v1/ask HTTP/1.1")
    expected = {
        "llm": {"name": "m", "input": "p"},
        "max_tokens": 16,
        "request_id": request_id("r1"),
        "tokens_reserved": 20,
    }
    assert script.bodies == [expected]


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (429, Outcome.RATE_LIMITED), (500, Outcome.ERROR), (409, Outcome.ERROR), (507, Outcome.ERROR),
        (404, Outcome.UNKNOWN_MODEL), (410, Outcome.UNKNOWN_MODEL), (413, Outcome.TOO_LONG),
        (400, Outcome.REJECTED), (422, Outcome.REJECTED), (451, Outcome.REJECTED),
        # An outage behind a gateway:
        *((status, Outcome.UNAVAILABLE) for status in (408, 425, 499, 502, 503, 504, 520, 524, 529, 599)),
        # These concern the router's access and not the prompt, which must not lose an attempt:
        *((status, Outcome.DENIED) for status in (301, 302, 307, 401, 402, 403, 405, 407, 415, 501, 511)),
    ],
)  # fmt: skip
async def test_error_status_maps_to_outcome(status: int, outcome: Outcome) -> None:
    result = await result_of(http(status, {"error": {"message": "reason"}}, {"Location": "/single"}))
    assert result.outcome is outcome
    redirect = " (redirect to /single)" if outcome is Outcome.DENIED else ""
    assert result.error == f"{status} reason{redirect}"
    assert result.answer is None


async def test_redirect_is_not_followed() -> None:
    async with scripted(http(307, {}, {"Location": "/single"})) as script:
        async with ModelsBackend(script.url, BackendSettings()) as backend:
            await call(backend)
        assert len(script.heads) == 1


async def test_other_errors_have_no_retry_after() -> None:
    assert (await result_of(http(500, {}, {"Retry-After": "7"}))).retry_after_seconds is None


@pytest.mark.parametrize(
    "document",
    [b"", b'{"answer": "cut o', b"\xff\xfe", b"[" * 100_000, {"usage": {}}, {"answer": None},
     {"answer": 42}, {"answer": ["x"]}, {"answer": ""}, {"answer": " \n"}, [], "42"],
)  # fmt: skip
async def test_success_without_an_answer_is_garbage(document: object) -> None:
    result = await result_of(http(200, document))
    assert result.outcome is Outcome.GARBAGE
    assert result.error
    assert "\n" not in result.error


async def test_empty_answer_keeps_its_usage_and_cost() -> None:
    result = await result_of(http(200, {**GOOD, "answer": ""}))
    assert (result.outcome, result.used_tokens, result.cost_usd) == (Outcome.GARBAGE, 7, 0.5)


@pytest.mark.parametrize("count", [-1, 2**31, True, 1.5, "3", None])
async def test_invalid_token_counts_are_ignored(count: object) -> None:
    result = await result_of(http(200, {"answer": "x", "usage": {"prompt_tokens": count}, "cost_usd": count}))
    assert result.outcome is Outcome.ANSWERED
    assert result.prompt_tokens is None


async def test_characters_that_postgres_cannot_store_are_replaced() -> None:
    result = await result_of(http(200, b'{"answer": "a\\u0000b\\ud800c"}'))
    assert result.answer == "a\ufffdb\ufffdc"


async def test_oversized_answer_is_not_read_to_its_end() -> None:
    endless = b"HTTP/1.1 200 OK\r\nContent-Length: 900000000\r\n\r\n" + b" " * 200_000
    async with scripted(endless) as script:
        settings = BackendSettings(max_answer_bytes=50_000)
        async with ModelsBackend(script.url, settings) as backend:
            result = await call(backend)
            assert acquired(backend) == 0
    assert result.outcome is Outcome.GARBAGE
    assert "larger than 50000 bytes" in (result.error or "")


async def test_large_answer_within_the_limit_is_complete() -> None:
    answer = "x" * 3_000_000
    assert (await result_of(http(200, {"answer": answer}))).answer == answer


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nConte",
        b"SSH-2.0-OpenSSH\r\n\r\n",
    ],
    ids=["no reply", "half a body", "half a head", "not HTTP"],
)
async def test_broken_connection_is_an_outage(reply: bytes) -> None:
    result = await result_of(reply, then_close=True)
    assert (result.outcome, result.may_go_on) == (Outcome.UNAVAILABLE, True)
    assert result.latency_seconds is not None


async def test_timeout_drops_the_connection() -> None:
    async with (
        scripted(http(200, GOOD), held=True) as script,
        ModelsBackend(script.url, BackendSettings()) as backend,
    ):
        result = await call(backend, timeout_seconds=0.1)
        assert acquired(backend) == 0
    assert result.outcome is Outcome.TIMEOUT
    assert result.latency_seconds == pytest.approx(0.1, abs=0.1)


async def test_unreachable_backend_gives_unsent() -> None:
    checks: list[None] = []
    async with ModelsBackend(f"http://127.0.0.1:{free_port()}", BackendSettings()) as backend:
        result = await call(backend, before_send=lambda: checks.append(None))
        with pytest.raises(BackendUnavailable, match="does not answer"):
            await backend.models()
    assert result.outcome is Outcome.UNSENT
    assert not checks


async def test_error_is_one_line_without_secrets() -> None:
    detail = (
        "bad\r\nkey sk-abc123DEF, Authorization: Bearer eyJhbGciOi.x, api_key=hunter2 at http://u:pw@host/ "
        + "x" * 999
    )
    result = await result_of(http(500, {"detail": detail}))
    assert result.error is not None
    assert len(result.error) <= 210
    assert "***@host/" in result.error
    assert result.error.isprintable()
    for secret in ("abc123", "eyJ", "hunter2", "pw"):
        assert secret not in result.error


async def test_proxy_of_the_environment_and_cookies_are_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    async with scripted(http(200, GOOD, {"Set-Cookie": "seen=1"})) as script:
        async with ModelsBackend(script.url, BackendSettings()) as backend:
            assert [(await call(backend)).outcome for _ in range(2)] == [Outcome.ANSWERED] * 2
        assert "cookie" not in script.heads[1].lower()
        assert script.connections == 1


async def test_session_that_was_passed_in_stays_open() -> None:
    async with scripted(http(200, GOOD)) as script, aiohttp.ClientSession() as session:
        async with ModelsBackend(script.url, BackendSettings(), session) as backend:
            assert (await call(backend)).outcome is Outcome.ANSWERED
        assert not session.closed


def test_invalid_address_is_rejected_without_echoing_it() -> None:
    with pytest.raises(ConfigError, match="MODELS_BACKEND_URL") as caught:
        ModelsBackend("user:secret@host", BackendSettings())
    assert "secret" not in str(caught.value)


# Check of the permit


def expired() -> None:
    raise PermitExpired("the permit has expired")


@pytest.mark.parametrize("reused", [False, True], ids=["new connection", "reused connection"])
async def test_expired_permit_writes_nothing(reused: bool) -> None:
    async with scripted(http(200, GOOD)) as script, ModelsBackend(script.url, BackendSettings()) as backend:
        if reused:
            await call(backend)
        seen = script.bytes_seen
        with pytest.raises(PermitExpired, match="the permit has expired"):
            await call(backend, before_send=expired)
        assert acquired(backend) == 0
        assert (
            await call(backend)
        ).outcome is Outcome.ANSWERED  # follows anything that the expired call had written
        assert len(script.heads) == (3 if reused else 2) - 1
        assert script.bytes_seen > seen
        assert script.connections == 2


async def test_check_runs_after_a_connection_is_acquired() -> None:
    order: list[str] = []
    settings = BackendSettings(max_connections=1)
    async with (
        scripted(http(200, GOOD), held=True) as script,
        ModelsBackend(script.url, settings) as backend,
    ):
        first = asyncio.create_task(call(backend, before_send=lambda: order.append("first checked")))
        await until(lambda: bool(script.heads))
        second = asyncio.create_task(call(backend, before_send=lambda: order.append("second checked")))
        await until(lambda: bool(backend._open().connector._waiters))  # type: ignore[union-attr]
        order.append("first may end")
        script.release.set()
        await asyncio.gather(first, second)
    assert order == ["first checked", "first may end", "second checked"]


@pytest.mark.parametrize("prompt", ["p", "p" * 3_000_000], ids=["small", "larger than the socket's buffer"])
async def test_request_is_on_the_socket_before_anything_else_can_run(prompt: str) -> None:
    """The loop is blocked right after the check; a server in another thread must still get the request."""
    arrived = threading.Event()
    seen_while_loop_was_blocked: list[bool] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65_536)
                arrived.set()
                while connection.recv(65_536):
                    pass

        server = threading.Thread(target=serve)
        server.start()

        def check() -> None:
            assert not arrived.is_set()
            asyncio.get_running_loop().call_soon(lambda: seen_while_loop_was_blocked.append(arrived.wait(2)))

        async with ModelsBackend(
            f"http://127.0.0.1:{listener.getsockname()[1]}", BackendSettings()
        ) as backend:
            result = await call(backend, check, timeout_seconds=0.5, prompt=prompt)
        server.join(5)
    assert result.outcome is Outcome.TIMEOUT
    assert seen_while_loop_was_blocked == [True]


async def test_thousands_of_expired_permits_leak_no_connections() -> None:
    settings = BackendSettings(max_connections=8)
    async with scripted(http(200, GOOD)) as script, ModelsBackend(script.url, settings) as backend:
        calls = [call(backend, before_send=expired if number % 2 else None) for number in range(2000)]
        results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)
        assert acquired(backend) == 0
        assert len(script.heads) == 1000
    for number, result in enumerate(results):
        expected = (
            isinstance(result, PermitExpired)
            if number % 2
            else getattr(result, "outcome", None) is Outcome.ANSWERED
        )
        assert expected, (number, result)


async def test_canceled_call_returns_its_connection() -> None:
    settings = BackendSettings(max_connections=1)
    async with (
        scripted(http(200, GOOD), held=True) as script,
        ModelsBackend(script.url, settings) as backend,
    ):
        running = asyncio.create_task(call(backend))
        await until(lambda: bool(script.heads))
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert acquired(backend) == 0
        script.release.set()
        assert (await call(backend)).outcome is Outcome.ANSWERED


@pytest.mark.parametrize(
    ("document", "names"),
    [
        ({"models": [{"name": "a"}, {"name": "b"}]}, ["a", "b"]), (["a", "b"], ["a", "b"]),
        ({"data": [{"id": "a"}]}, ["a"]), ({"models": {"a": {}}}, ["a"]), ([], []),
    ],
)  # fmt: skip
async def test_usual_shapes_of_a_model_list_are_read(document: object, names: list[str]) -> None:
    assert await listing(http(200, document)) == names


@pytest.mark.parametrize(
    "reply", [http(500, {}), http(200, b"<html>"), http(200, {"models": [{"x": 1}]}), http(200, 3)]
)
async def test_unreadable_model_list_raises(reply: bytes) -> None:
    with pytest.raises(BackendUnavailable):
        await listing(reply)


async def listing(reply: bytes) -> list[str]:
    async with scripted(reply) as script, ModelsBackend(script.url, BackendSettings()) as backend:
        return await backend.models()
