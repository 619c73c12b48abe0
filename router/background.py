"""Background tasks of one event loop: periodic jobs, tracked tasks, bounded waits."""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from router.errors import RouterError

log = logging.getLogger("router.background")

CANCEL_AGAIN_SECONDS = 0.25
LOOP_END_SECONDS = 3.0  # for the clean-up of tasks that are canceled together with the whole loop

Step = Callable[[], Awaitable[Any]]
T = TypeVar("T")


class PeriodicJobs:
    """Repeats steps, each in its own task, until `stop`. Logs the first failure of a row and the recovery."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, step: Step, seconds: float, name: str, wake: asyncio.Event | None = None) -> None:
        """Runs `step` now and about every `seconds`; `wake`, cleared before each step, brings it forward."""
        job = _repeat(step, seconds, name, wake)
        self._tasks.append(asyncio.create_task(job, name=f"router {name}"))

    async def stop(self) -> None:
        """Cancels all jobs and waits until they have ended."""
        await cancel_and_wait(*self._tasks)


class TrackedTasks:
    """Tasks that belong to one object. After `close`, `over` is set once all of them have ended."""

    def __init__(self, on_end: Callable[[], None]) -> None:
        self.over = asyncio.Event()
        self.tasks: set[asyncio.Task[None]] = set()
        self._on_end = on_end
        self._closing: asyncio.Task[None] | None = None

    def begin(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Runs `work` in a task; an unexpected error in it is logged."""
        task = spawn(work, name, self.tasks)
        task.add_done_callback(self._done)
        return task

    def close(self, then: Callable[[], None]) -> None:
        """Calls `then` and sets `over` when no task is left."""
        if self._closing is None:
            closing = self._wait_for_all(then)
            self._closing = asyncio.create_task(closing, name="router end of tasks")

    async def stop(self) -> None:
        """Cancels the tasks that are left."""
        await cancel_and_wait(*self.tasks)

    async def _wait_for_all(self, then: Callable[[], None]) -> None:
        try:
            while self.tasks:
                await asyncio.wait(set(self.tasks))
        except asyncio.CancelledError:
            # The loop ends: the other tasks are canceled as well and clean up.
            last = time.monotonic() + LOOP_END_SECONDS
            while self.tasks and (left := last - time.monotonic()) > 0:
                await asyncio.wait(set(self.tasks), timeout=left)
            raise
        finally:
            then()
            self.over.set()

    def _done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            log.error("unexpected error in %s", task.get_name(), exc_info=task.exception())
        self._on_end()


def spawn(work: Coroutine[Any, Any, T], name: str, tasks: set[asyncio.Task[T]]) -> asyncio.Task[T]:
    """Runs `work` in a task that `tasks` contains until it ends: the loop alone does not keep it alive."""
    task = asyncio.create_task(work, name=f"router {name}")
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task


async def _repeat(step: Step, seconds: float, name: str, wake: asyncio.Event | None) -> None:
    failures, unexpected = 0, ""
    while True:
        if wake is not None:
            wake.clear()
        try:
            await step()
            if failures:
                log.warning("%s recovered after %d failures", name, failures)
            failures, unexpected = 0, ""
        except RouterError as error:
            if not failures:
                log.warning("%s failed, retrying: %s", name, error)
            failures += 1
        except Exception as error:
            if f"{error!r}" != unexpected:  # once until it changes or ends
                log.exception("unexpected error in %s, retrying", name)
            failures, unexpected = failures + 1, f"{error!r}"
        pause = seconds * random.uniform(0.9, 1.1)
        if wake is None:
            await asyncio.sleep(pause)
        else:
            await wait_for_event(wake, pause)


async def wait_for_event(event: asyncio.Event, seconds: float) -> bool:
    """Waits until the event is set, at most `seconds`; returns whether it is. Never swallows a cancellation.

    Before Python 3.12 `asyncio.wait_for` swallows one that arrives while the event is being set.
    """
    if seconds <= 0:
        return event.is_set()
    waiting = asyncio.create_task(event.wait(), name="router wait")
    try:
        await asyncio.wait({waiting}, timeout=seconds)
    finally:
        waiting.cancel()
    return event.is_set()


async def cancel_and_wait(*tasks: asyncio.Task[Any]) -> None:
    """Cancels the tasks and waits until all have ended; their results and errors are dropped.

    Cancels repeatedly, because libraries occasionally swallow a cancellation.
    """
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=CANCEL_AGAIN_SECONDS)
    await asyncio.gather(*tasks, return_exceptions=True)


async def run_to_end(work: Coroutine[Any, Any, T], name: str) -> T:
    """Awaits `work`; a cancellation of the caller takes effect only after it.

    For clean-up that must not be left half done although `cancel_and_wait` cancels repeatedly.
    """
    task = asyncio.create_task(work, name=f"router {name}")
    canceled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:  # noqa: PERF203 - a loop of few rounds
            canceled = error
    if canceled is not None:
        mark_retrieved(task)
        raise canceled
    return task.result()


@asynccontextmanager
async def child_process(
    *command: str, terminate_seconds: float = 0.0, **options: Any
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Runs a child process, which has ended when the block ends, however often the task is canceled.

    It is asked to end (SIGTERM) if `terminate_seconds` are set, and killed after them.
    """
    starting = asyncio.create_task(
        asyncio.create_subprocess_exec(*command, **options), name="router start of a child process"
    )
    try:
        yield await asyncio.shield(starting)
    finally:
        await run_to_end(_end_child(starting, terminate_seconds), "end of a child process")


async def _end_child(starting: asyncio.Task[asyncio.subprocess.Process], terminate_seconds: float) -> None:
    await asyncio.wait({starting})
    if starting.exception() is not None:
        return
    child = starting.result()
    if child.stdin is not None:
        child.stdin.close()
    if terminate_seconds and child.returncode is None:
        with suppress(ProcessLookupError):
            child.terminate()
        await asyncio.wait({asyncio.ensure_future(child.wait())}, timeout=terminate_seconds)
    if child.returncode is None:
        with suppress(ProcessLookupError):
            child.kill()
    await child.wait()


async def result_or_none(work: Awaitable[T], seconds: float, name: str) -> T | None:
    """Returns the result of `work`; after `seconds` cancels it and returns None. Errors pass through."""
    task = asyncio.ensure_future(work)
    if isinstance(task, asyncio.Task):
        task.set_name(name)
    try:
        await asyncio.wait({task}, timeout=seconds)
        return task.result() if task.done() else None
    finally:
        if not task.done():
            task.cancel()
        task.add_done_callback(mark_retrieved)  # also an error that arrives together with a cancellation


def mark_retrieved(task: asyncio.Future[Any]) -> None:
    """Keeps asyncio from logging the error of a task whose result nobody waits for any more."""
    if not task.cancelled():
        task.exception()


async def close_with_timeout(
    seconds: float, close: Callable[[], Awaitable[None]], otherwise: Callable[[], None] | None = None
) -> None:
    """Awaits `close` for at most `seconds`; if it takes longer, cancels it and calls `otherwise`."""

    async def closing() -> bool:
        await close()
        return True

    if await result_or_none(closing(), seconds, "router close") is None and otherwise is not None:
        otherwise()


@functools.cache
def freeze_garbage_collector() -> None:
    """Excludes all current objects from later garbage collections. Works once in a process."""
    gc.freeze()


class Broadcast:
    """Wakes all current waiters at once."""

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[None]] = set()

    def notify_all(self) -> None:
        """Wakes all tasks that wait now."""
        waiters, self._waiters = self._waiters, set()
        for future in waiters:
            resolve_future(future)

    async def wait(self, seconds: float) -> None:
        """Returns at the next `notify_all`, or after `seconds`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._waiters.add(future)
        timer = loop.call_later(seconds, resolve_future, future)
        try:
            await future
        finally:
            timer.cancel()
            self._waiters.discard(future)


def resolve_future(future: asyncio.Future[None]) -> None:
    """Ends the wait for `future`, unless it has ended already."""
    if not future.done():
        future.set_result(None)
