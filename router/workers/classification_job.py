"""The engine's duty that gives categories to tasks that came without one."""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import AsyncExitStack

from router.classification import ClassifierProcess
from router.queue import TaskQueue
from router.settings import ClassificationSettings

log = logging.getLogger("router.workers.classification_job")

BATCH = 256
START_SECONDS = 6.0  # so long a backlog waits for the categoriser when an engine starts


class ClassificationJob:
    """Takes uncategorised tasks in bounded batches and brings their categories back, if that is wanted."""

    def __init__(self, queue: TaskQueue, settings: ClassificationSettings | None) -> None:
        self._queue = queue
        self._settings = settings
        self._process: ClassifierProcess | None = None

    async def start(self, stack: AsyncExitStack) -> None:
        """Have the child process start, if tasks are to be categorised; `stack` ends it."""
        if self._settings is None or not await self._queue.classification_enabled():
            return
        await self._queue.announce_classifier(START_SECONDS)
        self._process = await stack.enter_async_context(ClassifierProcess(self._settings))
        self._process.warm_up()

    async def step(self) -> None:
        """Categorise what waits for it now, batch by batch; none while the process is not there."""
        process = self._process
        if process is None:
            return
        while process.ready and (tasks := await self._queue.claim_uncategorized(BATCH)):
            found = await process.classify([task.prompt for task in tasks])
            kept = await self._queue.assign_categories(
                tasks,
                [one.category for one in found],
                [one.confidence for one in found],
                [one.reason for one in found],
            )
            _say(kept, [one.category for one in found], [one.reason for one in found])


def _say(kept: int, categories: list[str], reasons: list[str]) -> None:
    shares = ", ".join(f"{name} {number}" for name, number in Counter(categories).most_common())
    defaults = [reason for reason in reasons if reason.startswith("default:")]
    because = f"; {len(defaults)} took the default, e.g. {defaults[0]}" if defaults else ""
    log.info("categorised %d tasks: %s%s", kept, shares, because)
