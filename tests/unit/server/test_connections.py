"""Connections of `router serve` over real sockets: their number, their time-outs, and broken requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from router.server.connections import (
    SCOPE_KEY,
    BoundedProtocol,
    Connections,
    max_connections,
)
from router.server.responses import ApiResponse

REQUEST = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
Connect = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """`/hold` protects its connection and never answers; `/body` reads the body first."""
    if scope["path"] == "/hold":
        scope[SCOPE_KEY].protect("holder")
        while (await receive())["type"] != "http.disconnect":
            pass
    elif scope["path"] == "/body":
        while (message := await receive()).get("more_body"):
            pass
        if message["type"] == "http.disconnect":
            return
    if scope["path"] == "/owned":
        scope[SCOPE_KEY].protect(dict(scope["headers"])[b"client"].decode())
    await ApiResponse({"path": scope["path"]})(scope, receive, send)


@asynccontextmanager
async def serving(limit: int, header_seconds: float, max_owned: int = 1024) -> AsyncIterator[Connect]:
    config = uvicorn.Config(app, lifespan="off", ws="none", log_config=None)
    config.load()
    make = partial(
        BoundedProtocol, bounds=Connections(limit, header_seconds, max_owned), config=config,
        server_state=ServerState(), app_state={},
    )  # fmt: skip
    server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    opened: list[asyncio.StreamWriter] = []

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        opened.append(writer)
        return reader, writer

    try:
        yield connect
    finally:
        for writer in opened:
            writer.close()
        server.close()


async def response(reader: asyncio.StreamReader) -> tuple[int, Any]:
    """Status and JSON document of the next response; (0, None) if the connection ends first."""
    try:
        head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).decode().lower()
        length = int(head.split("content-length: ")[1].split("\r\n")[0])
        return int(head.split()[1]), json.loads(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionResetError):
        return 0, None


async def ended(reader: asyncio.StreamReader) -> bool:
    try:
        return await asyncio.wait_for(reader.read(), 5) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("pieces", [[], [b"GET / HT"], [b"GET / HTTP/1.1\r\n", *[b"X: y\r\n"] * 100]])
async def test_headers_must_arrive_in_time(pieces: list[bytes]) -> None:
    async with serving(10, 0.2) as connect:
        reader, writer = await connect()

        async def drip() -> None:
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        status, document = await response(reader)
        assert status == 408 or (status == 0 and dripping), "a client that still sends may see a reset"
        assert document is None or set(document["error"]) == {"message", "type", "param", "code"}
        assert await ended(reader)
        dripping.cancel()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 1_000_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"y" * 1_000_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 431),
    ],
)
async def test_broken_http_is_an_error_in_the_usual_format(
    sent: bytes, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(10, 5) as connect:
        reader, writer = await connect()
        writer.write(sent)
        found, document = await response(reader)
        assert found in (status, 0), "a client that is still sending may see a reset"
        if document is not None:
            assert set(document["error"]) == {"message", "type", "param", "code"}
        assert await ended(reader)
        reader, writer = await connect()
        writer.write(REQUEST)
        assert (await response(reader))[0] == 200
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("path", ["/", "/body"])
async def test_a_broken_chunk_in_the_body_ends_the_connection(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(10, 5) as connect:
        reader, writer = await connect()
        writer.write(f"POST {path} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        await asyncio.sleep(0.05)
        writer.write(b"zz\r\n")
        await asyncio.wait_for(reader.read(), 5)
    assert "Traceback" not in caplog.text


async def test_connections_stay_open_between_requests() -> None:
    async with serving(10, 0.2) as connect:
        reader, writer = await connect()
        writer.write(REQUEST * 2)  # pipelined
        assert [(await response(reader))[0] for _ in range(2)] == [200, 200]
        await asyncio.sleep(0.3)  # idle for longer than headers may take
        writer.write(REQUEST)
        assert (await response(reader))[0] == 200
        writer.write(REQUEST[:10])
        assert (await response(reader))[0] == 408


async def test_beyond_the_maximum_the_oldest_unprotected_connection_is_closed() -> None:
    async with serving(3, 5) as connect:
        held, holder = await connect()
        holder.write(b"GET /hold HTTP/1.1\r\nHost: a\r\n\r\n")
        await asyncio.sleep(0.05)
        idle = [(await connect())[0] for _ in range(20)]
        reader, writer = await connect()
        writer.write(REQUEST)
        assert (await response(reader))[0] == 200
        assert all([await ended(one) for one in idle[:-1]])
        assert not held.at_eof(), "a request in progress is not cut off"
        more = [await connect() for _ in range(2)]
        for _, other in more:
            other.write(b"GET /hold HTTP/1.1\r\nHost: a\r\n\r\n")
        await asyncio.sleep(0.05)
        refused, _ = await connect()
        assert await ended(refused), "all are protected: the new one is closed"
        assert not held.at_eof()


def of(client: str) -> bytes:
    return f"GET /owned HTTP/1.1\r\nHost: a\r\nClient: {client}\r\n\r\n".encode()


async def idle_connections(connect: Connect, client: str, count: int) -> list[asyncio.StreamReader]:
    """Opens connections, each idle after a request of the client."""
    opened = []
    for _ in range(count):
        reader, writer = await connect()
        writer.write(of(client))
        assert (await response(reader))[0] == 200
        opened.append(reader)
    return opened


async def open_ones(readers: list[asyncio.StreamReader]) -> int:
    """Counts the connections that are still open after what was sent to them has arrived."""
    await asyncio.sleep(0.1)
    return sum(not reader.at_eof() and reader.exception() is None for reader in readers)


async def test_beyond_the_maximum_the_client_with_the_most_idle_connections_loses_one() -> None:
    async with serving(10, 5) as connect:
        quiet = await idle_connections(connect, "bob", 2)  # the oldest of all
        flood = await idle_connections(connect, "alice", 30)
        assert await open_ones(quiet) == 2
        assert await open_ones(flood) == 8


async def test_idle_connections_of_one_client_and_of_one_address_are_bounded() -> None:
    async with serving(100, 5, max_owned=5) as connect:
        flood = await idle_connections(connect, "alice", 20)
        others = await idle_connections(connect, "bob", 3)
        silent = [(await connect())[0] for _ in range(20)]
        assert (await open_ones(flood), await open_ones(others)) == (5, 3)
        assert await open_ones(silent) == 5


@pytest.mark.parametrize(
    ("files", "concurrency", "limit"), [(1024, 64, 512), (65536, 64, 65024), (64, 64, 16)]
)
def test_connections_fit_into_the_limit_of_open_files(files: int, concurrency: int, limit: int) -> None:
    assert max_connections(files, concurrency) == limit
