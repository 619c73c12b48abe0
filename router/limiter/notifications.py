"""Subscribes to changes by other processes (targets, cool-downs, released slots) over Redis pub/sub."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import redis.asyncio

from router.background import cancel_and_wait
from router.errors import first_line
from router.limiter.script import REDIS_ERRORS
from router.limiter.tracker import ModelTracker

log = logging.getLogger("router.limiter")

CHANNEL = "router:traffic"
READ_SECONDS = 2.0  # until a listener notices that it has to subscribe again


class Notifications:
    """Tells the tracker which model changed, and that any may have when notifications were missed.

    A message is `<key> <sender>`. Those of this process are ignored.
    """

    def __init__(self, client: redis.asyncio.Redis, tracker: ModelTracker) -> None:
        self._redis: Any = client
        self._tracker = tracker
        self._settings = tracker.settings
        self._listener: asyncio.Task[None] | None = None
        self._tried = asyncio.Event()
        self._refused = False
        self._restarts = 0

    async def listen(self) -> None:
        """Starts to listen; the first call returns once it was tried, or after a bounded wait."""
        if self._listener is not None and not self._listener.done():
            return
        self._listener = asyncio.create_task(self._run(), name="limiter notifications")
        waiting = asyncio.ensure_future(self._tried.wait())
        await asyncio.wait({waiting}, timeout=self._settings.fallback_poll_seconds)
        waiting.cancel()

    def restart(self) -> None:
        """Subscribes again, over a new connection: the old one may lead to a server that was replaced."""
        self._restarts += 1

    async def close(self) -> None:
        """Stops listening."""
        if self._listener is not None:
            await cancel_and_wait(self._listener)
            self._listener = None

    async def _run(self) -> None:
        while True:
            try:
                await self._subscribe_and_read()
            except REDIS_ERRORS as error:  # noqa: PERF203 - once per outage
                self._log_refusal(error)
                self._tried.set()
                await asyncio.sleep(self._settings.retry_cap_seconds)

    async def _subscribe_and_read(self) -> None:
        restarts = self._restarts
        async with self._redis.pubsub(ignore_subscribe_messages=True) as channel:
            await channel.subscribe(CHANNEL)
            await channel.get_message(timeout=self._settings.fallback_poll_seconds)  # the confirmation
            self._tried.set()
            self._refused = False
            self._tracker.all_changed()  # messages from before the subscription were missed
            while restarts == self._restarts:
                message = await channel.get_message(timeout=READ_SECONDS)
                if message is not None:
                    self._receive(message["data"])

    def _log_refusal(self, error: BaseException) -> None:
        """Logs once that Redis refuses the channel; other errors are those of an outage."""
        if isinstance(error, redis.ResponseError) and not self._refused:
            self._refused = True
            late = self._settings.fallback_poll_seconds
            what = (
                "Redis refuses the channel %s: changes by other processes are noticed up to %.0f s late: %s"
            )
            log.warning(what, CHANNEL, late, first_line(error))

    def _receive(self, data: bytes | str) -> None:
        text = data.decode(errors="replace") if isinstance(data, bytes) else data
        key, _, sender = text.partition(" ")
        if sender != self._tracker.script.sender:
            self._tracker.changed(key)
