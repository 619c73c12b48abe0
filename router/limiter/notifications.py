"""Subscribes to changes by other processes (targets, cool-downs, released slots) over Redis pub/sub."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import redis.asyncio

from router.limiter.script import REDIS_ERRORS
from router.limiter.settings import LimiterSettings
from router.limiter.tracker import ModelTracker

CHANNEL = "router:traffic"
READ_SECONDS = 30.0


class Notifications:
    """Tells the tracker which model changed, and that any may have when notifications were missed.

    A message is `<key> <sender>`. Those of `sender` itself are ignored.
    """

    def __init__(
        self, client: redis.asyncio.Redis, sender: str, tracker: ModelTracker, settings: LimiterSettings
    ) -> None:
        self._redis: Any = client
        self._sender = sender
        self._tracker = tracker
        self._settings = settings
        self._listener: asyncio.Task[None] | None = None
        self._subscribed = asyncio.Event()

    async def listen(self) -> None:
        """Starts to listen; the first call returns once subscribed, or after a bounded wait."""
        if self._listener is not None and not self._listener.done():
            return
        self._listener = asyncio.create_task(self._run(), name="limiter notifications")
        waiting = asyncio.ensure_future(self._subscribed.wait())
        await asyncio.wait({waiting}, timeout=self._settings.fallback_poll_seconds)
        waiting.cancel()

    async def close(self) -> None:
        """Stops listening."""
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.gather(self._listener, return_exceptions=True)
            self._listener = None

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(*REDIS_ERRORS):
                async with self._redis.pubsub(ignore_subscribe_messages=True) as channel:
                    await channel.subscribe(CHANNEL)
                    self._subscribed.set()
                    self._tracker.all_changed()  # messages from before the subscription were missed
                    while True:
                        message = await channel.get_message(timeout=READ_SECONDS)
                        if message is not None:
                            self._receive(message["data"])
            self._subscribed.clear()
            await asyncio.sleep(self._settings.retry_cap_seconds)

    def _receive(self, data: bytes | str) -> None:
        text = data.decode(errors="replace") if isinstance(data, bytes) else data
        key, _, sender = text.partition(" ")
        if sender != self._sender:
            self._tracker.changed(key)
