"""What one client of `router serve` can do to others, and every kind of broken request at every endpoint."""

from __future__ import annotations

import gzip
import http.client
import json
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests

from models_backend.process import BackendServer
from router.server.key_file import add_key
from tests.support.serving import Serving, serving
from tests.support.waiting import until

OPEN_FILES = 600  # leaves 136 connections to clients
IDLE = 300


@pytest.fixture(scope="module")
def small_server(
    services: dict[str, str], backend: BackendServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Serving]:
    """A server with few open files, which cannot be raised."""
    folder, limits = tmp_path_factory.mktemp("small"), (OPEN_FILES, OPEN_FILES)
    with serving(folder, services, backend, "--at-once", "40", open_files=limits) as server:
        yield server


def address(server: Serving) -> tuple[str, int]:
    host, _, port = server.url.removeprefix("http://").partition(":")
    return host, int(port)


def half_sent(server: Serving, key: str, size: int = 1000) -> bytes:
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {server.url[7:]}\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {size}\r\n\r\n"
    )
    return head.encode() + b'{"model": '


@pytest.mark.parametrize("sent", ["nothing", "half a line", "half a body without a key", "half a body"])
def test_many_connections_keep_nobody_out(small_server: Serving, sent: str) -> None:
    key = small_server.key if sent == "half a body" else "wrong"
    first = {"nothing": b"", "half a line": b"POST /v1"}.get(sent, half_sent(small_server, key))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    other = add_key(small_server.keys_file, sent.replace(" ", "."))
    until(lambda: small_server.post("/v1/models", key=other).status_code == 405, 5)
    with ExitStack() as stack:
        for number in range(IDLE):
            connection = stack.enter_context(socket.create_connection(address(small_server), 10))
            connection.sendall(first)
            if number % 100 == 99:
                body = {"model": "phi-4", "messages": [{"role": "user", "content": "Why?"}]}
                reply = small_server.post(key=other, json=body)
                assert reply.status_code == 200, reply.text
    assert "Too many open files" not in small_server.log
    assert "out of system resource" not in small_server.log


def test_the_server_raises_its_limit_of_open_files(
    services: dict[str, str], backend: BackendServer, tmp_path: Path
) -> None:
    with serving(tmp_path, services, backend, open_files=(300, 1000)) as server:
        assert resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE) == (1000, 1000)


CHAT = {"model": "auto", "messages": [{"role": "user", "content": "Why?"}]}
PATHS = ("/v1/chat/completions", "/v1/models", "/v1/models/phi-4", "/", "/v1/%ff%00%0a", "//v1/models", "*")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW")
JSON = {"Content-Type": "application/json"}


def chat(**changes: Any) -> bytes:
    return json.dumps({**CHAT, **changes}).encode()


def message(**fields: Any) -> bytes:
    return chat(messages=[{"role": "user", "content": "Why?", **fields}])


RAW = json.dumps(CHAT)[:-1]  # open for one more field
BODIES: dict[str, tuple[bytes, dict[str, str], int | None]] = {
    # name: (body, headers, status of POST /v1/chat/completions; None for any below 500)
    "empty": (b"", JSON, 400),
    "no content type": (chat(), {}, 415),
    "form": (b"model=auto", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
    "text": (chat(), {"Content-Type": "text/plain"}, 415),
    "two content types": (chat(), {"Content-Type": "text/plain, application/json"}, 415),
    "gzip": (gzip.compress(chat()), {**JSON, "Content-Encoding": "gzip"}, 415),
    "several encodings": (chat(), {**JSON, "Content-Encoding": "br, gzip"}, 415),
    "odd encoding": (chat(), {**JSON, "Content-Encoding": "\xff" * 100}, 415),
    "encoding identity": (chat(n=2), {**JSON, "Content-Encoding": "Identity"}, 400),
    "not UTF-8": (b'{"model": "\xff"}', JSON, 400),
    "UTF-16": (json.dumps({**CHAT, "n": 2}).encode("utf-16"), JSON, 400),
    "byte order mark": (b"\xef\xbb\xbf" + chat(n=2), JSON, 400),
    "cut off": (chat()[:-5], JSON, 400),
    "two documents": (chat() + chat(), JSON, 400),
    "deep list": (b"[" * 200_000, JSON, 400),
    "deep object": (b'{"a":' * 100_000, JSON, 400),
    "deep but whole": (RAW.encode() + b', "metadata": ' + b"[" * 500 + b"]" * 500 + b', "n": 2}', JSON, 400),
    "deep messages": (RAW.encode() + b', "messages": ' + b"[" * 500 + b"]" * 500 + b"}", JSON, 400),
    "list": (b"[]", JSON, 400),
    "number": (b"1e999", JSON, 400),
    "null": (b"null", JSON, 400),
    "long integer": (RAW.encode() + b', "max_tokens": ' + b"9" * 5000 + b"}", JSON, 400),
    "large integer": (chat(max_tokens=10**400), JSON, 400),
    "negative": (chat(max_tokens=-1), JSON, 400),
    "infinite": (RAW.encode() + b', "max_tokens": 1e999}', JSON, 400),
    "not a number": (RAW.encode() + b', "max_tokens": NaN}', JSON, 400),
    "integer as float": (chat(max_tokens=1.0), JSON, 400),
    "large deadline": (chat(router={"deadline_seconds": 10**400}), JSON, 400),
    "infinite deadline": (RAW.encode() + b', "router": {"deadline_seconds": 1e999}}', JSON, 400),
    "deadline 0": (chat(router={"deadline_seconds": 0}), JSON, 400),
    "short deadline": (chat(router={"deadline_seconds": 0.049}), JSON, 400),
    "NUL in the prompt": (message(content="a\x00b"), JSON, 422),
    "NUL in a name": (chat(model="\x00"), JSON, 404),
    "half a surrogate in the prompt": (message(content="\ud800"), JSON, 422),
    "half a surrogate in the model": (chat(model="\ud800"), JSON, 400),
    "half a surrogate in a key": (chat(**{"\ud800": 1}), JSON, 400),
    "half a surrogate in the role": (message(role="\ud800"), JSON, 400),
    "half a surrogate in the category": (chat(router={"category": "\ud800"}), JSON, 400),
    "duplicate keys": (RAW.encode() + b', "model": "gpt-5", "model": 7}', JSON, 400),
    "long key": (chat(**{"x" * 500_000: 1}), JSON, 400),
    "long model": (chat(model="x" * 500_000), JSON, 404),
    "long role": (message(role="x" * 500_000), JSON, 400),
    "line feeds in a key": (chat(**{"a\r\nINFO forged": 1}), JSON, 400),
    "many stops": (chat(stop=["x"] * 100_000), JSON, 400),
    "messages as an object": (chat(messages={"0": {}}), JSON, 400),
    "content as a number": (message(content=10**400), JSON, 400),
    "parts without a type": (message(content=[[]]), JSON, 400),
    "tool calls": (message(role="assistant", tool_calls=[{"id": "1"}]), JSON, 400),
    "too large": (b"x" * 2_000_000, JSON, 413),
    "wrong length": (chat(), {**JSON, "Content-Length": "99999999999999999999"}, None),
    "long header": (chat(n=2), {**JSON, "X-Long": "x" * 15_000}, 400),
    "header outside ASCII": (chat(n=2), {**JSON, "X-Odd": "\xe9\xff"}, 400),
}


def ask(server: Serving, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*address(server), timeout=20)
    try:
        connection.putrequest(method, path)
        sent = {"Authorization": f"Bearer {server.key}", "Content-Length": str(len(body)), **headers}
        for name, value in sent.items():
            connection.putheader(name, value.encode("latin-1"))
        connection.endheaders(body)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def check(method: str, status: int, content: bytes) -> None:
    assert 200 <= status < 500, (status, content)
    if status >= 400 and method != "HEAD":
        document = json.loads(content)
        assert set(document["error"]) == {"message", "type", "param", "code"}
        assert len(content) < 5000


@pytest.mark.parametrize("name", BODIES)
def test_a_broken_body_is_one_error_in_openai_format(server: Serving, name: str) -> None:
    body, headers, expected = BODIES[name]
    status, content = ask(server, "POST", "/v1/chat/completions", body, headers)
    check("POST", status, content)
    assert expected in (status, None), content
    for method, path in (("POST", "/v1/models"), ("PUT", "/v1/chat/completions"), ("POST", "/nowhere")):
        check(method, *ask(server, method, path, body, headers))
    assert "forged" not in {line.split()[0] for line in server.log.splitlines() if line}


@pytest.mark.parametrize("path", PATHS)
def test_every_method_at_every_path_is_answered_in_openai_format(server: Serving, path: str) -> None:
    for method in METHODS:
        for headers in (
            JSON,
            {"Authorization": "Bearer \xff"},
            {"Authorization": ""},
            {"Expect": "100-continue"},
        ):
            check(method, *ask(server, method, path, b"{}", headers))


def test_a_deadline_of_zero_has_one_message(server: Serving) -> None:
    for deadline in (0, 0.049, 3601, -1):
        _, content = ask(
            server, "POST", "/v1/chat/completions", chat(router={"deadline_seconds": deadline}), JSON
        )
        error = json.loads(content)["error"]
        assert error["param"] == "router.deadline_seconds"
        assert "0.05" in error["message"] or "3600" in error["message"]


def test_pages_of_allowed_origins_may_use_the_api(
    services: dict[str, str], backend: BackendServer, tmp_path: Path
) -> None:
    page, ask_first = "https://chat.example.org", {"Access-Control-Request-Method": "POST"}
    with serving(tmp_path, services, backend, "--cors-origin", page) as server:
        url = f"{server.url}/v1/chat/completions"
        preflight = {
            "Origin": page,
            **ask_first,
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        allowed = requests.options(url, headers=preflight, timeout=10)
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, page)
        assert "authorization" in allowed.headers["access-control-allow-headers"]
        reply = server.post(headers={"Origin": page}, json={**CHAT, "model": "phi-4"})
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, page)
        wrong = server.post(headers={"Origin": page}, json={**CHAT, "n": 2})
        assert (wrong.status_code, wrong.headers["access-control-allow-origin"]) == (400, page)
        other = requests.options(url, headers={**preflight, "Origin": "https://evil.example"}, timeout=10)
        assert (other.status_code, other.json()["error"]["type"]) == (403, "permission_error")
        assert "access-control-allow-origin" not in other.headers
