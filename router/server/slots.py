"""Shares the server between its clients: bodies that are being received, and requests in progress."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator

from router.background import cancel_and_wait
from router.server.responses import ApiError

RESERVED_SHARE = 8  # one slot in so many is for clients below their equal share
RETRY_SECONDS = 1.0


class Slots:
    """Requests in progress, at most `limit`.

    If `several_clients()`, the last eighth of the slots, at least one, is for clients that hold less
    than an equal share of all slots, so that one client cannot keep the others out.
    """

    def __init__(self, limit: int, several_clients: Callable[[], bool]) -> None:
        self._limit = limit
        self._reserved = max(1, limit // RESERVED_SHARE) if limit > 1 else 0
        self._several_clients = several_clients
        self._taken: Counter[str] = Counter()

    @contextlib.contextmanager
    def take(self, client: str) -> Iterator[None]:
        """Holds a slot. Raises ApiError if there is none for this client."""
        free, own = self._limit - self._taken.total(), self._taken[client]
        if free <= 0:
            raise overloaded(f"{self._limit} requests are in progress, the maximum. Retry later.")
        if self._several_clients() and free <= self._reserved and own >= self._share(client):
            raise overloaded(f"{own} requests of this client are in progress, the maximum. Retry later.")
        self._taken[client] += 1
        try:
            yield
        finally:
            self._taken[client] -= 1
            self._taken += Counter()  # drops clients without a slot

    def _share(self, client: str) -> float:
        """Returns the equal share of a client if one more came."""
        return self._limit / (len({*self._taken, client}) + 1)


class Uploads:
    """Bodies being received, at most `limit`; a further one ends the oldest of the client with the most."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._reading: dict[str, dict[asyncio.Task[bytes], None]] = {}

    async def receive(self, client: str, reading: Coroutine[None, None, bytes], seconds: float) -> bytes:
        """Returns the body. Raises ApiError if it takes longer than `seconds`, or gave way to another one."""
        if sum(map(len, self._reading.values())) >= self._limit:
            most = max(self._reading.values(), key=len)
            oldest = next(iter(most))
            del most[oldest]
            oldest.cancel()
        own = self._reading.setdefault(client, {})
        task = asyncio.create_task(reading, name="router body")
        own[task] = None
        try:
            await asyncio.wait({task}, timeout=seconds)
            if task.cancelled():
                raise overloaded(
                    "Too many requests are arriving, and this one took the longest. Retry later."
                )
            if not task.done():
                raise ApiError(408, f"The request did not arrive within {seconds:g} s.")
            return task.result()
        finally:
            own.pop(task, None)
            if not own and self._reading.get(client) is own:
                del self._reading[client]
            await cancel_and_wait(task)


def overloaded(message: str) -> ApiError:
    """Returns the error for a server without capacity."""
    return ApiError(503, message, code="overloaded", retry_after_seconds=RETRY_SECONDS)
