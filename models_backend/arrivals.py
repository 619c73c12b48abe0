"""The arrival log: when each call arrived and how it ended, counted and written as JSON Lines."""

from __future__ import annotations

import asyncio
import json
from collections import Counter, deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

FLUSH_SECONDS = 0.2
RECENT = 100_000


class Arrival(NamedTuple):
    """One call that ended. Times are seconds of the machine's monotonic clock.

    `request` holds messages and parameters as they came; None for a bare prompt. `ended_at` is taken before
    the last byte is sent: once the client has the answer it may send again.
    """

    at: float
    ended_at: float
    model: str | None
    request_id: str | None
    tokens_reserved: int | None
    tokens_used: int
    status: int
    request: Mapping[str, Any] | None = None


class Arrivals:
    """Counts and stores arrivals; `writing()` appends them to the log file in a thread."""

    def __init__(self, log: Path | None = None) -> None:
        self._log = log
        self._file: IO[str] | None = None
        self._unwritten: list[Arrival] = []
        self._recent: deque[Arrival] = deque(maxlen=RECENT)
        self._statuses: Counter[tuple[str, int]] = Counter()
        self.arrived = 0
        self.ended = 0

    def begin(self) -> None:
        """Counts a call that arrived."""
        self.arrived += 1

    def end(self, arrival: Arrival) -> None:
        """Stores a call that ended."""
        self.ended += 1
        self._statuses[arrival.model or "", arrival.status] += 1
        self._recent.append(arrival)
        if self._file is not None:
            self._unwritten.append(arrival)

    def counts(self) -> dict[str, dict[str, int]]:
        """Ended calls by model and status; the model is '' where the call named none."""
        found: dict[str, dict[str, int]] = {}
        for (model, status), number in sorted(self._statuses.items()):
            found.setdefault(model, {})[str(status)] = number
        return found

    def since(self, number: int, limit: int) -> tuple[int, list[Arrival]]:
        """Up to `limit` ended calls from the given number on, and the next number.

        Only the last 100,000 are stored.
        """
        oldest = self.ended - len(self._recent)
        start = max(number - oldest, 0)
        rows = list(islice(self._recent, start, start + limit))
        return oldest + start + len(rows), rows

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """Context in which the log is written: at least every 0.25 s, and the rest on exit."""
        if self._log is None:
            yield
            return
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._log.open("a", encoding="utf-8")
        writer = asyncio.create_task(self._write_on(), name="arrival-log")
        try:
            yield
        finally:
            writer.cancel()
            with suppress(asyncio.CancelledError):
                await writer
            self.close()

    def close(self) -> None:
        """Writes the rest and closes the file. Idempotent."""
        if self._file is not None:
            self._write(self._taken())
            self._file.close()
            self._file = None

    async def _write_on(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            rows = self._taken()
            if rows:
                # Shielded: a shutdown during a write must not truncate a line.
                writing = asyncio.ensure_future(asyncio.to_thread(self._write, rows))
                try:
                    await asyncio.shield(writing)
                except asyncio.CancelledError:
                    await writing
                    raise

    def _taken(self) -> list[Arrival]:
        rows, self._unwritten = self._unwritten, []
        return rows

    def _write(self, rows: list[Arrival]) -> None:
        if self._file is not None:
            self._file.write("".join(json.dumps(as_document(row)) + "\n" for row in rows))
            self._file.flush()


def as_document(arrival: Arrival) -> dict[str, Any]:
    """The arrival as one line of the log; `request` only where there is one."""
    document = arrival._asdict()
    if arrival.request is None:
        del document["request"]
    return document
