"""Giving permits back to Redis: many in one round trip, and once more when Redis was away."""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from router.errors import LimiterUnavailable
from router.limiter.permit import Permit

MOST_IN_ONE_TRIP = 500
MOST_KEPT = 10_000  # returns that wait for Redis to come back; what is more ends by itself
AGAIN_SECONDS = 0.5

Item = TypeVar("Item")
SendBack = Callable[[str, bytes], Awaitable[None]]


class Releases:
    """Releases of permits, model by model. What Redis could not take is kept, and sent when it can."""

    def __init__(self, send: SendBack) -> None:
        self._send = send
        self._batches: dict[str, Batch[bytes]] = {}
        self._kept: dict[str, list[bytes]] = {}
        self._again: asyncio.Task[None] | None = None

    async def put(self, permit: Permit, used: float, *, unused: bool) -> None:
        """Give a permit back, once; LimiterUnavailable if Redis cannot take it now (it is told later)."""
        if permit.returned:
            return
        item = struct.pack("<4d", permit.generation, permit.number, used, float(unused))
        batch = self._batches.get(permit.model)
        if batch is None:
            batch = Batch(
                lambda items: self._send_all(permit.model, items),
                most=MOST_IN_ONE_TRIP,
                name=f"returns of {permit.model}",
            )
            self._batches[permit.model] = batch
        permit.returned = True
        try:
            await batch.put(item)
        except LimiterUnavailable:
            self._keep(permit.model, item)
            raise

    async def close(self) -> None:
        """Wait for what is under way; what Redis could not take until now ends by itself."""
        for batch in self._batches.values():
            await batch.close()
        if self._again is not None:
            self._again.cancel()
            await asyncio.gather(self._again, return_exceptions=True)

    async def _send_all(self, model: str, items: list[bytes]) -> None:
        await self._send(model, b"".join(items))

    def _keep(self, model: str, item: bytes) -> None:
        if sum(map(len, self._kept.values())) < MOST_KEPT:
            self._kept.setdefault(model, []).append(item)
        if self._again is None or self._again.done():
            self._again = asyncio.create_task(self._send_again(), name="limiter returns, once more")

    async def _send_again(self) -> None:
        while self._kept:
            await asyncio.sleep(AGAIN_SECONDS)
            for model, items in list(self._kept.items()):
                some = items[:MOST_IN_ONE_TRIP]
                try:
                    await self._send_all(model, some)
                except LimiterUnavailable:
                    break
                del items[: len(some)]  # others may have joined meanwhile
                if not items:
                    del self._kept[model]


class Batch(Generic[Item]):
    """Sends items, one round trip at a time; those that come meanwhile go together in the next."""

    def __init__(self, send: Callable[[list[Item]], Awaitable[None]], *, most: int, name: str) -> None:
        self._send = send
        self._most = most
        self._name = name
        self._items: deque[tuple[Item, asyncio.Future[None]]] = deque()
        self._runner: asyncio.Task[None] | None = None

    async def put(self, item: Item) -> None:
        """Return once the item has arrived; raises what its round trip raised."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._items.append((item, future))
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._serve(), name=self._name)
        await future

    async def close(self) -> None:
        """Wait until everything has arrived or failed."""
        if self._runner is not None:
            await asyncio.gather(self._runner, return_exceptions=True)

    async def _serve(self) -> None:
        while self._items:
            under_way = [self._items.popleft() for _ in range(min(self._most, len(self._items)))]
            error: Exception | None = None
            try:
                await self._send([item for item, _ in under_way])
            except Exception as raised:  # noqa: BLE001 - it is handed to those who wait
                error = raised
            for _, future in under_way:
                if not future.done():
                    if error is None:
                        future.set_result(None)
                    else:
                        future.set_exception(error)
