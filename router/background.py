"""Named tasks: duties that repeat a step and outlive its troubles, and errands that belong to one thing."""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from router.errors import RouterError

log = logging.getLogger("router.background")

CANCEL_AGAIN_SECONDS = 0.25
LAST_SECONDS = 3.0  # for what is cancelled with the whole loop

Step = Callable[[], Awaitable[Any]]
T = TypeVar("T")


class PeriodicJobs:
    """Repeats steps, each in its own task, until `end`. A trouble is said once, and once that it is over."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, step: Step, seconds: float, name: str, wake: asyncio.Event | None = None) -> None:
        """Do `step` now and about every `seconds`; `wake` (cleared before each step) makes it come sooner."""
        duty = _repeat(step, seconds, name, wake)
        self._tasks.append(asyncio.get_running_loop().create_task(duty, name=f"router {name}"))

    async def end(self) -> None:
        """Cancel all duties and wait until they are gone."""
        await cancel_and_wait(*self._tasks)


class TrackedTasks:
    """Named tasks that belong to one thing; `over` is set when all that were begun by `close` have ended."""

    def __init__(self, on_end: Callable[[], None]) -> None:
        self.over = asyncio.Event()
        self.tasks: set[asyncio.Task[None]] = set()
        self._on_end = on_end
        self._closing: asyncio.Task[None] | None = None

    def begin(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Do `work` in a task of its own; a fault of the program in it is logged."""
        task = asyncio.get_running_loop().create_task(work, name=f"router {name}")
        self.tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def close(self, then: Callable[[], None]) -> None:
        """Call `then`, and set `over`, when nothing is under way any more."""
        if self._closing is None:
            closing = self._end(then)
            self._closing = asyncio.get_running_loop().create_task(closing, name="router end of errands")

    async def stop(self) -> None:
        """Cancel what is left."""
        await cancel_and_wait(*self.tasks)

    async def _end(self, then: Callable[[], None]) -> None:
        try:
            while self.tasks:
                await asyncio.wait(set(self.tasks))
        except asyncio.CancelledError:
            # The loop ends: the others were cancelled as well, and put things right.
            last = time.monotonic() + LAST_SECONDS
            while self.tasks and (left := last - time.monotonic()) > 0:
                await asyncio.wait(set(self.tasks), timeout=left)
            raise
        finally:
            then()
            self.over.set()

    def _done(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("%s: a fault of the program", task.get_name(), exc_info=task.exception())
        self._on_end()


async def _repeat(step: Step, seconds: float, name: str, wake: asyncio.Event | None) -> None:
    in_trouble = False
    while True:
        if wake is not None:
            wake.clear()
        try:
            await step()
            if in_trouble:
                log.warning("%s: well again", name)
            in_trouble = False
        except RouterError as error:
            if not in_trouble:
                log.warning("%s: %s (said once; tried again until it works)", name, error)
            in_trouble = True
        except Exception:
            log.exception("%s: a fault of the program; going on", name)
        pause = seconds * random.uniform(0.9, 1.1)
        if wake is None:
            await asyncio.sleep(pause)
        else:
            await wait_for_event(wake, pause)


async def wait_for_event(event: asyncio.Event, seconds: float) -> bool:
    """Wait until the event is set, at most `seconds`; whether it is. A cancellation always comes through.

    Before Python 3.12 `asyncio.wait_for` swallows one that comes in the moment in which the event is set.
    """
    if seconds <= 0:
        return event.is_set()
    waiting = asyncio.get_running_loop().create_task(event.wait(), name="router wait")
    try:
        await asyncio.wait({waiting}, timeout=seconds)
    finally:
        waiting.cancel()
    return event.is_set()


async def cancel_and_wait(*tasks: asyncio.Task[Any]) -> None:
    """Cancel the tasks and wait until all are gone, however they end.

    Asked again and again: now and then a library in between swallows a cancellation.
    """
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=CANCEL_AGAIN_SECONDS)
    await asyncio.gather(*tasks, return_exceptions=True)


async def result_or_none(work: Awaitable[T], seconds: float, name: str) -> T | None:
    """What `work` comes to, or None if it takes longer: then it is cancelled. Its errors come through."""
    task = asyncio.ensure_future(work)
    if isinstance(task, asyncio.Task):
        task.set_name(name)
    try:
        await asyncio.wait({task}, timeout=seconds)
        return task.result() if task.done() else None
    finally:
        if not task.done():
            task.cancel()
        elif not task.cancelled():
            task.exception()  # looked at, if the caller was cancelled in the same moment


async def close_with_timeout(
    seconds: float, close: Callable[[], Awaitable[None]], otherwise: Callable[[], None] | None = None
) -> None:
    """Close, or give it up after `seconds`, and then do `otherwise`."""

    async def closing() -> bool:
        await close()
        return True

    if await result_or_none(closing(), seconds, "router close") is None and otherwise is not None:
        otherwise()


@functools.cache
def freeze_garbage_collector() -> None:
    """Leave all that is there now out of later collections, garbage in cycles included; once a process."""
    gc.freeze()


class Broadcast:
    """Wakes all that wait, once per notification."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    def notify_all(self) -> None:
        """Wakes all that wait now."""
        waiting, self._waiting = self._waiting, set()
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def wait(self, seconds: float) -> None:
        """Returns at the next notification, or after `seconds`."""
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
