"""Authentication, body limits and error responses of `router serve`."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable
from typing import Any

import pytest
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.server import middleware
from router.server.api_keys import ApiKeys
from router.server.middleware import Limits, protected, read_body
from router.server.responses import ApiError, ApiResponse
from router.server.slots import Uploads

KEY = "k" * 20


class Client:
    """One request, message by message, and its response."""

    def __init__(self, *bodies: bytes, headers: Iterable[tuple[str, str]] = (), ends: bool = True) -> None:
        self._messages = [
            {"type": "http.request", "body": body, "more_body": not ends or number < len(bodies)}
            for number, body in enumerate(bodies or (b"",), start=1)
        ]
        named = {"host": "127.0.0.1:8200", "authorization": f"Bearer {KEY}", **dict(headers)}
        self.scope: Scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "headers": [(name.encode(), value.encode()) for name, value in named.items()],
        }
        self.taken = 0
        self.got: list[Message] = []

    async def receive(self) -> Message:
        if self.taken < len(self._messages):
            self.taken += 1
            return self._messages[self.taken - 1]
        await asyncio.Event().wait()
        raise AssertionError

    async def send(self, message: Message) -> None:
        self.got.append(message)

    async def request(self, app: ASGIApp, keys: ApiKeys | None = None) -> None:
        await protected(app, keys)(self.scope, self.receive, self.send)

    @property
    def status(self) -> int:
        return int(self.got[0]["status"])

    @property
    def error(self) -> Any:
        return json.loads(self.got[1]["body"])["error"]


async def greet(scope: Scope, receive: Receive, send: Send) -> None:
    await ApiResponse({"client": Request(scope).user.username})(scope, receive, send)


async def measure(scope: Scope, receive: Receive, send: Send) -> None:
    content = await read_body(Request(scope, receive), Limits(max_body_bytes=10), Uploads(1))
    await ApiResponse({"size": len(content)})(scope, receive, send)


async def test_a_key_identifies_its_client() -> None:
    client = Client()
    await client.request(greet, ApiKeys(None, KEY))
    assert (client.status, json.loads(client.got[1]["body"])) == (200, {"client": "ROUTER_API_KEY"})
    names = [name for name, _ in client.got[0]["headers"]]
    assert b"x-request-id" in names


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost"}, 200),
        ({"host": "[::1]:8200"}, 200),
        ({"host": "evil.example:8200"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": ""}, 403),
        ({"host": "[::1"}, 403),
        ({"origin": "http://127.0.0.1:8200"}, 403),
    ],
)
async def test_without_keys_only_local_programs_are_served(headers: dict[str, str], status: int) -> None:
    client = Client(headers=headers.items())
    await client.request(greet)
    assert client.status == status


async def test_the_body_of_an_unauthorized_request_is_discarded() -> None:
    client = Client(b"a" * 8, b"b" * 8, headers={"authorization": "Bearer wrong"}.items())
    taken_inside = []

    async def inside(_scope: Scope, _receive: Receive, _send: Send) -> None:
        taken_inside.append(client.taken)

    await client.request(inside, ApiKeys(None, KEY))
    assert (client.status, taken_inside, client.taken) == (401, [], 2)


async def test_the_body_size_is_limited() -> None:
    whole = Client(b"12345", b"67890")
    await whole.request(measure)
    assert json.loads(whole.got[1]["body"]) == {"size": 10}
    for client in (Client(b"12345", b"678901"), Client(b"1", headers={"content-length": "11"}.items())):
        await client.request(measure)
        assert (client.status, client.error["code"]) == (413, "too_large")


async def test_an_incomplete_request_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.05)
    monkeypatch.setattr(middleware, "DISCARD_SECONDS", 0.05)
    client = Client(b"1", ends=False)
    await asyncio.wait_for(client.request(measure), 5)
    assert client.status == 408


async def test_a_client_that_does_not_read_is_dropped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(middleware, "SEND_SECONDS", 0.05)

    async def stuck(_message: Message) -> None:
        await asyncio.Event().wait()

    client = Client()
    await asyncio.wait_for(protected(greet, None)(client.scope, client.receive, stuck), 5)
    assert "canceled after" in caplog.text
    assert "the client did not read the response" in caplog.text


async def test_an_unexpected_error_is_a_500_without_details(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise ZeroDivisionError("the password is hunter2")

    client = Client()
    await client.request(broken)
    assert (client.status, client.error["type"]) == (500, "server_error")
    assert "hunter2" not in str(client.error)
    assert client.error["message"].split()[-1].strip(".") in caplog.text
    assert "ZeroDivisionError" in caplog.text


async def test_an_error_after_the_headers_sends_nothing_more(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def late(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ApiError(429, "too late", retry_after_seconds=1.2)

    client = Client()
    await client.request(late)
    assert [message["type"] for message in client.got] == ["http.response.start"]
    assert "rejected: 429 too late" in caplog.text


async def test_retry_after_is_sent_in_seconds_and_milliseconds() -> None:
    async def full(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise ApiError(429, "later", retry_after_seconds=1.2)

    client = Client()
    await client.request(full)
    headers = dict(client.got[0]["headers"])
    assert (headers[b"retry-after"], headers[b"retry-after-ms"]) == (b"2", b"1200")


async def test_websockets_are_rejected() -> None:
    client = Client()
    client.scope["type"] = "websocket"
    await client.request(greet)
    assert client.got == [{"type": "websocket.close", "code": 1008}]


async def test_discarding_a_body_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "MAX_DISCARDED_BYTES", 100)
    client = Client(*[b"x" * 10] * 50, headers={"authorization": "Bearer wrong"}.items())
    await client.request(greet, ApiKeys(None, KEY))
    assert (client.status, client.taken) == (401, 10)
