"""A client that keeps half-sent bodies and idle connections open at `router serve`, as a program.

    python -m tests.support.connection_flood HOST PORT KEY

Prints `ready` once all are open, and opens each again that the server closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import sys

HALF_SENT, IDLE, KEPT_ALIVE = 64, 1000, 1000
AT_ONCE = 50  # connections that are being opened


class Flood:
    def __init__(self, host: str, port: int, key: str) -> None:
        self._address = (host, port)
        head = f"HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\n"
        kind = "Content-Type: application/json\r\nContent-Length: 1000\r\n"
        self._half = f'POST /v1/chat/completions {head}{kind}\r\n{{"model": '.encode()
        self._listing = f"GET /v1/models/phi-4 {head}\r\n".encode()
        self._opening = asyncio.Semaphore(AT_ONCE)
        self._open = 0

    async def run(self) -> None:
        kinds = ((self._half, HALF_SENT), (b"", IDLE), (self._listing, KEPT_ALIVE))
        await asyncio.gather(*(self._keep(sent) for sent, count in kinds for _ in range(count)))

    async def _keep(self, sent: bytes) -> None:
        first = True
        while True:
            with contextlib.suppress(OSError):
                async with self._opening:
                    reader, writer = await asyncio.open_connection(*self._address)
                    writer.write(sent)
                if sent == self._listing:
                    await reader.readuntil(b"\r\n\r\n")
                self._open += first
                if first and self._open == HALF_SENT + IDLE + KEPT_ALIVE:
                    print("ready", flush=True)  # noqa: T201 - the test waits for it
                first = False
                while await reader.read(4096):
                    pass
                writer.close()
            await asyncio.sleep(1)


if __name__ == "__main__":
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(Flood(sys.argv[1], int(sys.argv[2]), sys.argv[3]).run())
