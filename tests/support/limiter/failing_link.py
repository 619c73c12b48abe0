"""TCP relay to Redis that can answer every command of its present connections with an error."""

from __future__ import annotations

import asyncio

from tests.support.slow_link import SlowLink


class FailingLink(SlowLink):
    """After `fail`, connections that are open reply with an error for ever; new ones reach the server."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self._errors: dict[asyncio.StreamWriter, bytes] = {}
        self._clients: set[asyncio.StreamWriter] = set()

    def fail(self, error: str) -> None:
        """Makes each open connection reply `-<error>` to whatever it is sent."""
        self._errors = dict.fromkeys(self._clients, f"-{error}\r\n".encode())

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._clients.add(writer)
        self._writers |= {writer, far_writer}
        self._begin(self._answer(reader, writer, far_writer))
        self._begin(self._pump(far_reader, writer))

    async def _answer(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, far_writer: asyncio.StreamWriter
    ) -> None:
        while data := await reader.read(65536):
            error = self._errors.get(writer)
            (writer if error else far_writer).write(error or data)
        self._clients.discard(writer)
        far_writer.close()
