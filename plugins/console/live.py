"""Live status: read once a second for all clients together, and only while there are clients."""

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
from router.errors import DatabaseError, RouterError
from router.status import unreadable

log = logging.getLogger("router.console")

REFRESH_SECONDS = 0.8  # plus the time to read: a change shows within a second
IDLE_SECONDS = 3.0  # reading stops this long after the last client
STREAM_SECONDS = 10.0  # bounds how long permissions are not checked again, and how long shutdown waits
FIRST_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One reading as a line of JSON, numbered from 1."""

    number: int
    line: bytes


class Live:
    """Serves the newest status. All of its state belongs to one event loop."""

    def __init__(self, read: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        self._read = read
        self._newest: Snapshot | None = None
        self._changed = asyncio.Condition()
        self._requested_at = 0.0
        self._reading: asyncio.Task[None] | None = None
        self.reads = 0  # number of readings, for tests

    async def stream(self) -> AsyncIterator[bytes]:
        """Yields each new status for STREAM_SECONDS, the current one first."""
        until = time.monotonic() + STREAM_SECONDS
        seen = 0
        while (now := time.monotonic()) < until:
            snapshot = await self.after(seen, FIRST_SECONDS if not seen else until - now)
            if snapshot is None:
                return
            seen = snapshot.number
            yield snapshot.line

    async def newest(self) -> bytes:
        """Returns the current status, at most about a second old."""
        snapshot = await self.after(0, FIRST_SECONDS)
        return b'{"error":"The status could not be read in time."}\n' if snapshot is None else snapshot.line

    async def after(self, seen: int, seconds: float) -> Snapshot | None:
        """Waits for a snapshot newer than number `seen`. Returns None after `seconds`."""
        self._requested_at = time.monotonic()
        if self._reading is None or self._reading.done():
            self._newest = None
            self._reading = asyncio.create_task(self._read_while_used(), name="router console status")
        waiting = asyncio.create_task(self._newer_than(seen), name="router console waiter")
        try:
            await asyncio.wait({waiting}, timeout=seconds)
            return waiting.result() if waiting.done() else None
        finally:
            waiting.cancel()
            self._requested_at = time.monotonic()

    async def _newer_than(self, seen: int) -> Snapshot:
        async with self._changed:
            while self._newest is None or self._newest.number <= seen:
                await self._changed.wait()
            return self._newest

    async def close(self) -> None:
        """Stops reading."""
        if self._reading is not None:
            await cancel_and_wait(self._reading)

    async def _read_while_used(self) -> None:
        while time.monotonic() - self._requested_at < IDLE_SECONDS:
            started = time.monotonic()
            status = await self._status()
            self.reads += 1
            async with self._changed:
                self._newest = Snapshot(self.reads, as_line(status))
                self._changed.notify_all()
            await asyncio.sleep(max(0.1, REFRESH_SECONDS - (time.monotonic() - started)))

    async def _status(self) -> dict[str, Any]:
        try:
            return await self._read()
        except DatabaseError as error:
            return {"error": str(error), "why_not": unreadable(error).whole}
        except RouterError as error:
            return {"error": str(error)}
        except Exception:
            log.exception("console: status cannot be read")
            return {"error": "The status cannot be read. See the api-server's log."}


class CachedReading:
    """Reading that is cached for `seconds`, with one read at a time. Belongs to one event loop."""

    def __init__(self, read: Callable[[], Awaitable[bytes]], seconds: float) -> None:
        self._read = read
        self._seconds = seconds
        self._lock = asyncio.Lock()
        self._line = b""
        self._read_at = -seconds

    async def line(self) -> bytes:
        """Returns the cached line of JSON, or reads it again."""
        async with self._lock:
            if time.monotonic() - self._read_at > self._seconds:
                self._line = await self._read()
                self._read_at = time.monotonic()
            return self._line

    def forget(self) -> None:
        """Makes the next call read again."""
        self._read_at = -self._seconds


def as_line(value: Any) -> bytes:
    """Returns a value as one line of JSON, or an error object if it has no JSON form."""
    try:
        text = as_json(value, indent=None)
    except ValueError:
        text = json.dumps({"error": "This value has no JSON form."})
    return text.encode() + b"\n"
