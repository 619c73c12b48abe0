"""One board for all who look: read once a second while anybody does, and not at all while nobody does."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from router.background import cancel_and_wait
from router.cli import as_json
from router.errors import RouterError

log = logging.getLogger("router.console")

EVERY_SECONDS = 0.8  # and what it takes to read: a change is to be seen within a second
KEPT_SECONDS = 3.0  # it is read on for so long after the last one looked
STREAM_SECONDS = 10.0  # then the page asks anew, and with it who it is; a server that stops waits for it
FIRST_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A board as a line of JSON, and which one it is."""

    number: int
    line: bytes


class Live:
    """Serves the newest board. All its state belongs to one event loop."""

    def __init__(self, read: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        self._read = read
        self._newest: Snapshot | None = None
        self._changed = asyncio.Condition()
        self._looked_at = 0.0
        self._reading: asyncio.Task[None] | None = None
        self.reads = 0  # for tests: how often the board was read

    async def stream(self) -> AsyncIterator[bytes]:
        """Each new board as one line, for STREAM_SECONDS; the first at once."""
        until = time.monotonic() + STREAM_SECONDS
        seen = 0
        while (now := time.monotonic()) < until:
            snapshot = await self.after(seen, FIRST_SECONDS if not seen else until - now)
            if snapshot is None:
                return
            seen = snapshot.number
            yield snapshot.line

    async def newest(self) -> bytes:
        """The board as it is now, at most about a second old."""
        snapshot = await self.after(0, FIRST_SECONDS)
        return b'{"error":"Nothing could be read in time."}\n' if snapshot is None else snapshot.line

    async def after(self, seen: int, seconds: float) -> Snapshot | None:
        """The newest board as soon as it is a later one than `seen`; None if it does not come in time."""
        self._looked_at = time.monotonic()
        if self._reading is None or self._reading.done():
            self._newest = None
            self._reading = asyncio.create_task(self._read_on(), name="router console board")
        waiting = asyncio.create_task(self._later_than(seen), name="router console look")
        try:
            await asyncio.wait({waiting}, timeout=seconds)
            return waiting.result() if waiting.done() else None
        finally:
            waiting.cancel()
            self._looked_at = time.monotonic()

    async def _later_than(self, seen: int) -> Snapshot:
        async with self._changed:
            while self._newest is None or self._newest.number <= seen:
                await self._changed.wait()
            return self._newest

    async def close(self) -> None:
        """Read no more."""
        if self._reading is not None:
            await cancel_and_wait(self._reading)

    async def _read_on(self) -> None:
        while time.monotonic() - self._looked_at < KEPT_SECONDS:
            began = time.monotonic()
            board = await self._board()
            self.reads += 1
            async with self._changed:
                self._newest = Snapshot(self.reads, as_line(board))
                self._changed.notify_all()
            await asyncio.sleep(max(0.1, EVERY_SECONDS - (time.monotonic() - began)))

    async def _board(self) -> dict[str, Any]:
        try:
            return await self._read()
        except RouterError as error:
            return {"error": str(error)}
        except Exception:
            log.exception("the console's board cannot be read")
            return {"error": "The board cannot be read. The api-server's log says why."}


class Kept:
    """One answer for all who ask within `seconds`; only one reading at a time. Belongs to one event loop."""

    def __init__(self, read: Callable[[], Awaitable[bytes]], seconds: float) -> None:
        self._read = read
        self._seconds = seconds
        self._lock = asyncio.Lock()
        self._line = b""
        self._read_at = -seconds

    async def line(self) -> bytes:
        """The answer, as a line of JSON."""
        async with self._lock:
            if time.monotonic() - self._read_at > self._seconds:
                self._line = await self._read()
                self._read_at = time.monotonic()
            return self._line


def as_line(value: Any) -> bytes:
    """A value as one line of JSON; what JSON has no word for becomes null."""
    try:
        text = as_json(value, indent=None)
    except ValueError:
        text = json.dumps({"error": "This cannot be said in JSON."})
    return text.encode() + b"\n"
