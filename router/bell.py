"""Waking all who wait for a change, without a task for each of them."""

from __future__ import annotations

import asyncio


class Bell:
    """Wakes all who wait, once a ring."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    def ring(self) -> None:
        """Wake everyone who waits now."""
        waiting, self._waiting = self._waiting, set()
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def wait(self, seconds: float) -> None:
        """Return at the next ring, or after `seconds`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._waiting.add(future)
        timer = loop.call_later(seconds, finish, future)
        try:
            await future
        finally:
            timer.cancel()
            self._waiting.discard(future)


def finish(future: asyncio.Future[None]) -> None:
    """What a timer calls that ends a wait."""
    if not future.done():
        future.set_result(None)
