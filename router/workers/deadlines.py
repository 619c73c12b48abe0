"""Periodic job for tasks with a deadline: a task without an answer gets a provisional one in time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path

from router.answering import (
    DueTask,
    RequestContext,
    answer_due_task,
    claim_due_deadlines,
    complete_deadline,
    extend_deadline_claim,
)
from router.background import cancel_and_wait
from router.errors import DatabaseError, RouterError
from router.knowledge import Knowledge
from router.workers.engine import Engine

log = logging.getLogger("router.workers.deadlines")

STEP_SECONDS = 1.0
MAX_CONCURRENCY = 50
HOLD_SECONDS = 60.0  # after a crash another process serves the task this much later


class DeadlineJob:
    """Claims tasks whose deadline is near and answers them; ends with its engine."""

    def __init__(self, engine: Engine, folder: Path, data: Path | None) -> None:
        """`folder` is the configuration folder; its knowledge is opened for the first task."""
        self._engine = engine
        self._folder = folder
        self._data = data
        self._opening = asyncio.Lock()
        self._serving: set[asyncio.Task[None]] = set()
        self._context = RequestContext(
            pool=engine.pool, limiter=engine.limiter, backend=engine.backend, queue=engine.queue,
            config=engine.config, roster=lambda: engine.roster, check_may_send=engine.check_may_send,
        )  # fmt: skip

    def start(self) -> None:
        """Starts the job in the engine."""
        self._engine.start_job(self.step, STEP_SECONDS, "deadlines", self._stop)

    async def step(self) -> None:
        """Claims due tasks, up to MAX_CONCURRENCY in progress."""
        limit = MAX_CONCURRENCY - len(self._serving)
        if limit <= 0 or not self._engine.may_send():
            return
        due = await claim_due_deadlines(
            self._engine.pool, ahead_seconds=self._ahead_seconds, hold_seconds=HOLD_SECONDS, limit=limit
        )
        for task in due:
            serving = asyncio.get_running_loop().create_task(
                self._serve(task), name=f"router deadline of task {task.task_id}"
            )
            self._serving.add(serving)
            serving.add_done_callback(self._served)

    @property
    def _ahead_seconds(self) -> float:
        return self._engine.config.fallback.before_deadline_seconds

    async def _stop(self) -> None:
        await cancel_and_wait(*self._serving)

    def _served(self, serving: asyncio.Task[None]) -> None:
        self._serving.discard(serving)
        error = None if serving.cancelled() else serving.exception()
        if isinstance(error, RouterError):
            log.warning("%s failed, retrying: %s", serving.get_name(), error)
        elif error is not None:
            log.error("unexpected error in %s", serving.get_name(), exc_info=error)

    async def _serve(self, due: DueTask) -> None:
        await self._open_knowledge()
        extending = asyncio.get_running_loop().create_task(
            self._extend_claim(due), name=f"router claim of task {due.task_id}"
        )
        try:
            answered = await answer_due_task(self._context, due, self._engine.sending_paused)
        except RouterError:
            raise
        except Exception:  # it would fail again; the task itself stays in the queue
            await complete_deadline(self._engine.pool, due, ahead_seconds=self._ahead_seconds)
            raise
        finally:
            await cancel_and_wait(extending)
        if answered or not self._engine.sending_paused():  # a task cut short by a pause stays due
            await complete_deadline(self._engine.pool, due, ahead_seconds=self._ahead_seconds)

    async def _extend_claim(self, due: DueTask) -> None:
        while True:
            await asyncio.sleep(HOLD_SECONDS / 3)
            with contextlib.suppress(DatabaseError):
                await extend_deadline_claim(
                    self._engine.pool, due, ahead_seconds=self._ahead_seconds, hold_seconds=HOLD_SECONDS
                )

    async def _open_knowledge(self) -> None:
        async with self._opening:
            if self._context.knowledge is None:
                opening = Knowledge.open(
                    self._folder / "knowledge", database_url=self._engine.addresses.database_url,
                    data_folder=self._data, tasks=self._context.config.knowledge.tasks,
                )  # fmt: skip
                self._context.knowledge = await self._engine.enter(opening)
