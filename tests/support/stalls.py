"""TCP proxy that can stop forwarding, like a server that hangs with open connections."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Stall:
    """Forwards `port` to the server; `stall()` pauses forwarding, `go_on()` resumes it with the held data."""

    def __init__(self, connect: Callable[[], Awaitable[Streams]]) -> None:
        self._connect = connect
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    def stall(self) -> None:
        self._flowing.clear()

    def go_on(self) -> None:
        self._flowing.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            far_reader, far_writer = await self._connect()
            await asyncio.gather(self._forward(reader, far_writer), self._forward(far_reader, writer))
        self._tasks.discard(task)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                await self._flowing.wait()
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


@asynccontextmanager
async def stalling(connect: Callable[[], Awaitable[Streams]]) -> AsyncIterator[Stall]:
    """Runs a proxy to the server that `connect` opens."""
    stall = Stall(connect)
    server = await asyncio.start_server(stall.serve, "127.0.0.1", 0)
    stall.port = server.sockets[0].getsockname()[1]
    try:
        yield stall
    finally:
        server.close()
        await stall.close()
