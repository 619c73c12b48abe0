"""Tasks that the limiter starts on the side and finishes before it closes."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class SideTasks:
    """Running tasks; referenced until they end, so that none is garbage collected."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._running)

    def start(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Starts a task."""
        task = asyncio.create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        task.add_done_callback(_retrieve)
        return task

    async def wait(self) -> None:
        """Waits until no task is left, however they end."""
        while self._running:
            await asyncio.gather(*self._running, return_exceptions=True)


def _retrieve(task: asyncio.Task[Any]) -> None:
    """Marks the exception as retrieved: callers that wait get it, and may have given up."""
    if not task.cancelled():
        task.exception()
