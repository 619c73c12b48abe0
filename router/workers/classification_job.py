"""Periodic job of the engine: classifies the tasks that came without a category."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack

from router.classification import Classification, ClassifierProcess
from router.errors import first_line
from router.queue import TaskQueue, UnclassifiedTask
from router.settings import ClassificationSettings

log = logging.getLogger("router.workers.classification_job")

BATCH_SIZE = 256
START_SECONDS = 6.0  # for which the backlog waits for the classifier when an engine starts


class ClassificationJob:
    """Claims unclassified tasks in batches and assigns their categories, if the configuration enables it."""

    def __init__(self, queue: TaskQueue, settings: ClassificationSettings | None) -> None:
        self._queue = queue
        self._settings = settings
        self._process: ClassifierProcess | None = None

    async def start(self, stack: AsyncExitStack) -> None:
        """Starts the classifier process, if tasks are to be classified; `stack` ends it."""
        if self._settings is None or not await self._queue.classification_enabled():
            return
        await self._queue.announce_classifier(START_SECONDS)
        self._process = await stack.enter_async_context(ClassifierProcess(self._settings))
        self._process.warm_up()

    async def step(self) -> None:
        """Classifies the tasks that wait now, batch by batch; none while the process is not ready."""
        process = self._process
        if process is None:
            return
        while process.ready and (tasks := await self._queue.claim_uncategorized(BATCH_SIZE)):
            found = await self._classify(process, tasks)
            assigned = await self._queue.assign_categories(
                tasks,
                [one.category for one in found],
                [one.confidence for one in found],
                [one.reason for one in found],
            )
            _log_batch(assigned, found)

    async def _classify(
        self, process: ClassifierProcess, tasks: Sequence[UnclassifiedTask]
    ) -> list[Classification]:
        """Classifies the batch; after an unexpected error task by task, so that no task delays others."""
        try:
            return await process.classify([task.prompt for task in tasks])
        except Exception as error:
            if len(tasks) > 1:
                return [one for task in tasks for one in await self._classify(process, [task])]
            log.exception("unexpected error in the classification of task %d", tasks[0].task_id)
            reason = f"default: the classification failed: {first_line(error)}"
            return [Classification(process.settings.default_category, 0.0, reason)]


def _log_batch(assigned: int, found: Sequence[Classification]) -> None:
    counts = Counter(one.category for one in found).most_common()
    shares = ", ".join(f"{name} {number}" for name, number in counts)
    defaults = [one.reason for one in found if one.reason.startswith("default:")]
    because = f"; {len(defaults)} got the default, e.g. {defaults[0]}" if defaults else ""
    log.info("classified %d tasks: %s%s", assigned, shares, because)
