"""Returns permits to Redis: in batches, and again after an outage."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque

from router.errors import LimiterUnavailable
from router.limiter.codec import pack_release, unpack_release
from router.limiter.permit import Permit, WaitReason
from router.limiter.script import RedisScript
from router.limiter.state import FREED_BY_OTHERS, ModelState
from router.limiter.tracker import ModelTracker

MAX_BATCH = 500
MAX_UNSENT = 10_000  # releases kept during an outage; permits beyond that expire
RETRY_SECONDS = 0.5
_FREED = FREED_BY_OTHERS | {WaitReason.TOKENS, WaitReason.BUDGET}


class Releases:
    """Releases and cancels permits, each at most once."""

    def __init__(self, tracker: ModelTracker) -> None:
        self._tracker = tracker
        self._batches: dict[str, _Batch] = {}
        self._retry: asyncio.Task[None] | None = None

    async def release(self, permit: Permit, tokens: int | None, cost: int | None) -> None:
        """Releases the permit of a call that used `tokens` and cost so much (None: unknown).

        Raises LimiterUnavailable if Redis is unavailable; the release is sent later.
        """
        await self._send(permit, tokens, cost, unused=False)

    async def cancel(self, permit: Permit) -> None:
        """Cancels a permit by which nothing was sent. Raises LimiterUnavailable as `release` does."""
        await self._send(permit, 0, 0, unused=True)

    async def send(self, state: ModelState, items: list[bytes]) -> None:
        """Sends packed ends of rebuilt calls. Raises LimiterUnavailable."""
        for first in range(0, len(items), MAX_BATCH):
            await self._batch(state).send(items[first : first + MAX_BATCH])

    def cancel_later(self, permit: Permit) -> asyncio.Task[None]:
        """Cancels a permit in a task; if Redis is unavailable it stays counted, which is safe."""
        return self._tracker.tasks.start(self._cancel_quietly(permit), f"cancel a permit of {permit.model}")

    async def close(self) -> None:
        """Waits for releases in flight; unsent ones end by themselves."""
        for batch in self._batches.values():
            await batch.close()
        if self._retry is not None:
            self._retry.cancel()
            await asyncio.gather(self._retry, return_exceptions=True)

    async def _cancel_quietly(self, permit: Permit) -> None:
        with contextlib.suppress(LimiterUnavailable):
            await self.cancel(permit)

    async def _send(self, permit: Permit, used: int | None, spent: int | None, *, unused: bool) -> None:
        if permit.returned:
            return
        batch = self._batch(self._tracker.state(permit.model))
        permit.returned = True
        send = permit.generation, permit.number
        puts = [self._put(batch, pack_release(permit, send, used, spent, unused=unused))]
        if permit.client_send is not None:
            key, *send_of_client = permit.client_send
            item = pack_release(permit, (send_of_client[0], send_of_client[1]), used, spent, unused=unused)
            puts.append(self._put(self._batch(self._tracker.by_key(key)), item))
        if len(puts) == 1:
            await puts[0]
            return
        for error in await asyncio.gather(*puts, return_exceptions=True):
            if error is not None:
                raise error

    async def _put(self, batch: _Batch, item: bytes) -> None:
        try:
            await batch.put(item)
        except LimiterUnavailable:
            self._keep(batch, item)
            raise

    def _batch(self, state: ModelState) -> _Batch:
        batch = self._batches.get(state.key)
        if batch is None:
            batch = self._batches[state.key] = _Batch(self._tracker.script, state)
        return batch

    def _keep(self, batch: _Batch, item: bytes) -> None:
        if sum(len(one.unsent) for one in self._batches.values()) < MAX_UNSENT:
            batch.unsent.append(item)
        if self._retry is None or self._retry.done():
            self._retry = asyncio.create_task(self._retry_unsent(), name="limiter retries releases")

    async def _retry_unsent(self) -> None:
        while waiting := [batch for batch in self._batches.values() if batch.unsent]:
            await asyncio.sleep(RETRY_SECONDS)
            for batch in waiting:
                items = batch.unsent[:MAX_BATCH]
                try:
                    await batch.send(items)
                except LimiterUnavailable:
                    break
                del batch.unsent[: len(items)]  # others may have been added meanwhile


class _Batch:
    """Releases of one model, one round trip at a time: those that come meanwhile share the next one."""

    def __init__(self, script: RedisScript, state: ModelState) -> None:
        self.unsent: list[bytes] = []
        self._script = script
        self._state = state
        self._items: deque[tuple[bytes, asyncio.Future[None]]] = deque()
        self._sender: asyncio.Task[None] | None = None

    async def put(self, item: bytes) -> None:
        """Returns once the item has arrived; raises what its round trip raised."""
        arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._items.append((item, arrived))
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send_all(), name=f"releases of {self._state.model}")
        await arrived

    async def send(self, items: list[bytes]) -> None:
        """Sends items in one round trip, and wakes this process's waiters if that may help them."""
        state = self._state
        reply = await self._script.call(state.key, "release", b"".join(items), self._script.sender)
        # The script notifies only other processes.
        waits = _FREED.intersection(state.waiting_for.values())
        if unpack_release(reply) or waits or state.available_at is None:
            state.changed()

    async def close(self) -> None:
        """Waits until every item has arrived or failed."""
        if self._sender is not None:
            await asyncio.gather(self._sender, return_exceptions=True)

    async def _send_all(self) -> None:
        while self._items:
            batch = [self._items.popleft() for _ in range(min(MAX_BATCH, len(self._items)))]
            error: Exception | None = None
            try:
                await self.send([item for item, _ in batch])
            except Exception as raised:  # noqa: BLE001 - it is raised by `put`
                error = raised
            for _, arrived in batch:
                if arrived.done():
                    continue
                if error is None:
                    arrived.set_result(None)
                else:
                    arrived.set_exception(error)
