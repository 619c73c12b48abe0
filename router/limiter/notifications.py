"""Hearing of what others change: targets, rests, places that came free. Redis publishes it, nobody polls."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import redis.asyncio

from router.limiter.script import REDIS_ERRORS
from router.limiter.settings import LimiterSettings

CHANNEL = "router:traffic"
LISTEN_SECONDS = 30.0


class Notifications:
    """Calls `changed(key)` for each change by somebody else; `changed(None)` if some may have been missed."""

    def __init__(
        self, redis_client: redis.asyncio.Redis, name: str, changed: Callable[[str | None], None],
        settings: LimiterSettings,
    ) -> None:  # fmt: skip
        self._redis: Any = redis_client
        self._name = name
        self._changed = changed
        self._settings = settings
        self._listener: asyncio.Task[None] | None = None
        self._listening = asyncio.Event()

    async def hear(self) -> None:
        """Begin to listen; the first time, return when changes are heard (or after a bounded wait)."""
        if self._listener is not None and not self._listener.done():
            return
        self._listener = asyncio.create_task(self._listen(), name="limiter listens for changes")
        waiting = asyncio.ensure_future(self._listening.wait())
        await asyncio.wait({waiting}, timeout=self._settings.ask_again_seconds)
        waiting.cancel()

    async def close(self) -> None:
        """Listen no more."""
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.gather(self._listener, return_exceptions=True)
            self._listener = None

    async def _listen(self) -> None:
        while True:
            with contextlib.suppress(*REDIS_ERRORS):
                async with self._redis.pubsub(ignore_subscribe_messages=True) as channel:
                    await channel.subscribe(CHANNEL)
                    self._listening.set()
                    self._changed(None)  # what was said before the subscription was not heard
                    while True:
                        message = await channel.get_message(timeout=LISTEN_SECONDS)
                        if message is not None:
                            self._heard(message["data"])
            self._listening.clear()
            await asyncio.sleep(self._settings.retry_cap_seconds)

    def _heard(self, data: bytes | str) -> None:
        text = data.decode(errors="replace") if isinstance(data, bytes) else data
        key, _, speaker = text.partition(" ")
        if speaker != self._name:
            self._changed(key)
