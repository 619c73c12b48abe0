"""The client of the Models Backend against real sockets: what each thing that can happen becomes."""

from __future__ import annotations

import asyncio
import email.utils
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

GOOD = {"model": "m", "answer": "42", "usage": {"prompt_tokens": 3, "completion_tokens": 4}, "cost_usd": 0.5}


@dataclass
class Scripted:
    """A server that says exactly the bytes it is told to, and keeps all that it was sent."""

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
    return await backend.call(
        model_endpoint="m",
        prompt=prompt,
        max_tokens=16,
        request_id="r1",
        tokens_reserved=20,
        timeout_seconds=timeout_seconds,
        before_send=before_send,
    )


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


async def test_an_answer_comes_back_with_its_usage_and_latency() -> None:
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


async def test_field_names_and_paths_are_the_existing_backends() -> None:
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
        "request_id": "r1",
        "tokens_reserved": 20,
    }
    assert script.bodies == [expected]


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (429, Outcome.RATE_LIMITED), (503, Outcome.OVERLOADED), (500, Outcome.ERROR), (502, Outcome.ERROR),
        (504, Outcome.ERROR), (599, Outcome.ERROR), (404, Outcome.UNKNOWN_MODEL), (400, Outcome.REJECTED),
        (413, Outcome.REJECTED), (422, Outcome.REJECTED), (302, Outcome.ERROR),
        # Said to us, not to the prompt, which must not lose an attempt by it:
        (401, Outcome.OVERLOADED), (402, Outcome.OVERLOADED), (405, Outcome.OVERLOADED),
        (407, Outcome.OVERLOADED), (403, Outcome.ERROR), (408, Outcome.ERROR), (425, Outcome.ERROR),
    ],
)  # fmt: skip
async def test_each_refusal_has_its_outcome(status: int, outcome: Outcome) -> None:
    result = await result_of(http(status, {"error": {"message": "why not"}}, {"Location": "/single"}))
    assert result.outcome is outcome
    assert result.error == f"{status} why not"
    assert result.answer is None


async def test_a_redirect_is_not_followed_since_it_would_be_a_second_send() -> None:
    async with scripted(http(307, {}, {"Location": "/single"})) as script:
        async with ModelsBackend(script.url, BackendSettings()) as backend:
            await call(backend)
        assert len(script.heads) == 1


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0),
        ("1.5", 1.5),
        ("-3", 0.0),
        ("1e12", 86_400.0),
        ("inf", None),
        ("nan", None),
        ("soon", None),
        ("", None),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
async def test_retry_after_in_seconds(header: str, seconds: float | None, status: int) -> None:
    assert (await result_of(http(status, {}, {"Retry-After": header}))).retry_after_seconds == seconds


async def test_retry_after_as_a_date_is_read_by_the_backends_own_clock() -> None:
    its_now = time.time() - 3600  # an hour slow
    headers = {
        "Date": email.utils.formatdate(its_now, usegmt=True),
        "Retry-After": email.utils.formatdate(its_now + 30, usegmt=True),
    }
    assert (await result_of(http(429, {}, headers))).retry_after_seconds == 30


async def test_other_refusals_carry_no_retry_after() -> None:
    assert (await result_of(http(500, {}, {"Retry-After": "7"}))).retry_after_seconds is None


@pytest.mark.parametrize(
    "document",
    [b"<html>", b"", b'{"answer": "cut o', b"\xff\xfe", b"[" * 100_000, {"usage": {}}, {"answer": None},
     {"answer": 42}, {"answer": ["x"]}, {"answer": ""}, {"answer": " \n"}, [], "42"],
)  # fmt: skip
async def test_200_without_an_answer_is_garbage(document: object) -> None:
    result = await result_of(http(200, document))
    assert result.outcome is Outcome.GARBAGE
    assert result.error
    assert "\n" not in result.error


async def test_an_empty_answer_keeps_what_it_cost() -> None:
    result = await result_of(http(200, {**GOOD, "answer": ""}))
    assert (result.outcome, result.used_tokens, result.cost_usd) == (Outcome.GARBAGE, 7, 0.5)


@pytest.mark.parametrize("count", [-1, 2**31, True, 1.5, "3", None])
async def test_counts_that_the_log_cannot_hold_are_unknown(count: object) -> None:
    result = await result_of(http(200, {"answer": "x", "usage": {"prompt_tokens": count}, "cost_usd": count}))
    assert result.outcome is Outcome.ANSWERED
    assert result.prompt_tokens is None


async def test_what_postgres_cannot_store_is_replaced_in_the_answer() -> None:
    result = await result_of(http(200, b'{"answer": "a\\u0000b\\ud800c"}'))
    assert result.answer == "a\ufffdb\ufffdc"


async def test_too_large_an_answer_is_not_read_to_its_end() -> None:
    endless = b"HTTP/1.1 200 OK\r\nContent-Length: 900000000\r\n\r\n" + b" " * 200_000
    async with scripted(endless) as script:
        settings = BackendSettings(max_answer_bytes=50_000)
        async with ModelsBackend(script.url, settings) as backend:
            result = await call(backend)
            assert acquired(backend) == 0
    assert result.outcome is Outcome.GARBAGE
    assert "larger than 50000 bytes" in (result.error or "")


async def test_a_large_answer_within_the_bound_arrives_whole() -> None:
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
    ids=["no word", "half a body", "half a head", "not HTTP"],
)
async def test_a_broken_connection_is_an_error(reply: bytes) -> None:
    result = await result_of(reply, then_close=True)
    assert result.outcome is Outcome.ERROR
    assert result.latency_seconds is not None


async def test_no_answer_in_time_is_a_timeout_and_its_connection_is_dropped() -> None:
    async with (
        scripted(http(200, GOOD), held=True) as script,
        ModelsBackend(script.url, BackendSettings()) as backend,
    ):
        result = await call(backend, timeout_seconds=0.1)
        assert acquired(backend) == 0
    assert result.outcome is Outcome.TIMEOUT
    assert result.latency_seconds == pytest.approx(0.1, abs=0.1)


async def test_where_nobody_listens_nothing_was_sent() -> None:
    asked: list[None] = []
    async with ModelsBackend(f"http://127.0.0.1:{free_port()}", BackendSettings()) as backend:
        result = await call(backend, before_send=lambda: asked.append(None))
        assert not await backend.healthy()
        with pytest.raises(BackendUnavailable, match="does not answer"):
            await backend.models()
    assert result.outcome is Outcome.UNSENT
    assert not asked


async def test_errors_are_one_line_without_secrets() -> None:
    words = (
        "bad\r\nkey sk-abc123DEF, Authorization: Bearer eyJhbGciOi.x, api_key=hunter2 at http://u:pw@host/ "
        + "x" * 999
    )
    result = await result_of(http(500, {"detail": words}))
    assert result.error is not None
    assert len(result.error) <= 210
    assert "***@host/" in result.error
    assert result.error.isprintable()
    for secret in ("abc123", "eyJ", "hunter2", "pw"):
        assert secret not in result.error


async def test_neither_a_proxy_from_the_environment_nor_cookies_are_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    async with scripted(http(200, GOOD, {"Set-Cookie": "seen=1"})) as script:
        async with ModelsBackend(script.url, BackendSettings()) as backend:
            assert [(await call(backend)).outcome for _ in range(2)] == [Outcome.ANSWERED] * 2
        assert "cookie" not in script.heads[1].lower()
        assert script.connections == 1


async def test_a_session_that_was_handed_in_stays_open() -> None:
    async with scripted(http(200, GOOD)) as script, aiohttp.ClientSession() as session:
        async with ModelsBackend(script.url, BackendSettings(), session) as backend:
            assert (await call(backend)).outcome is Outcome.ANSWERED
        assert not session.closed


def test_an_address_that_is_no_url_is_refused_without_repeating_it() -> None:
    with pytest.raises(ConfigError, match="MODELS_BACKEND_URL") as caught:
        ModelsBackend("user:secret@host", BackendSettings())
    assert "secret" not in str(caught.value)


# The permit's check ----------------------------------------------------------------------------------------


def dead() -> None:
    raise PermitExpired("its moment has passed")


@pytest.mark.parametrize("reused", [False, True], ids=["new connection", "kept connection"])
async def test_a_dead_permit_leaves_nothing_on_the_wire(reused: bool) -> None:
    async with scripted(http(200, GOOD)) as script, ModelsBackend(script.url, BackendSettings()) as backend:
        if reused:
            await call(backend)
        seen = script.bytes_seen
        with pytest.raises(PermitExpired, match="its moment has passed"):
            await call(backend, before_send=dead)
        assert acquired(backend) == 0
        assert (await call(backend)).outcome is Outcome.ANSWERED  # behind whatever the dead one had written
        assert len(script.heads) == (3 if reused else 2) - 1
        assert script.bytes_seen > seen
        assert script.connections == 2


async def test_the_check_waits_until_there_is_a_connection() -> None:
    order: list[str] = []
    settings = BackendSettings(max_connections=1)
    async with scripted(http(200, GOOD), held=True) as script, ModelsBackend(script.url, settings) as backend:
        first = asyncio.create_task(call(backend, before_send=lambda: order.append("first checked")))
        await until(lambda: bool(script.heads))
        second = asyncio.create_task(call(backend, before_send=lambda: order.append("second checked")))
        await until(lambda: bool(backend._open().connector._waiters))  # type: ignore[union-attr]
        order.append("first may end")
        script.release.set()
        await asyncio.gather(first, second)
    assert order == ["first checked", "first may end", "second checked"]


@pytest.mark.parametrize("prompt", ["p", "p" * 3_000_000], ids=["small", "larger than the socket's buffer"])
async def test_the_first_byte_is_on_the_socket_before_anything_else_can_run(prompt: str) -> None:
    """After the check the loop is held up; a server in another thread must have the request all the same."""
    arrived = threading.Event()
    seen_while_loop_stood: list[bool] = []
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
            asyncio.get_running_loop().call_soon(lambda: seen_while_loop_stood.append(arrived.wait(2)))

        async with ModelsBackend(
            f"http://127.0.0.1:{listener.getsockname()[1]}", BackendSettings()
        ) as backend:
            result = await call(backend, check, timeout_seconds=0.5, prompt=prompt)
        server.join(5)
    assert result.outcome is Outcome.TIMEOUT
    assert seen_while_loop_stood == [True]


async def test_thousands_of_dead_permits_leak_neither_connections_nor_places() -> None:
    settings = BackendSettings(max_connections=8)
    async with scripted(http(200, GOOD)) as script, ModelsBackend(script.url, settings) as backend:
        calls = [call(backend, before_send=dead if number % 2 else None) for number in range(2000)]
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


async def test_a_cancelled_call_gives_its_connection_back() -> None:
    settings = BackendSettings(max_connections=1)
    async with scripted(http(200, GOOD), held=True) as script, ModelsBackend(script.url, settings) as backend:
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
async def test_the_usual_shapes_of_a_list_of_models_are_read(document: object, names: list[str]) -> None:
    assert await listing(http(200, document)) == names


@pytest.mark.parametrize(
    "reply", [http(500, {}), http(200, b"<html>"), http(200, {"models": [{"x": 1}]}), http(200, 3)]
)
async def test_a_list_of_models_that_cannot_be_read_says_so(reply: bytes) -> None:
    with pytest.raises(BackendUnavailable):
        await listing(reply)


async def listing(reply: bytes) -> list[str]:
    async with scripted(reply) as script, ModelsBackend(script.url, BackendSettings()) as backend:
        return await backend.models()


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (204, True), (500, False), (404, False)])
async def test_healthy_is_2xx(status: int, healthy: bool) -> None:
    async with scripted(http(status, b"")) as script, ModelsBackend(script.url, BackendSettings()) as backend:
        assert await backend.healthy() is healthy
