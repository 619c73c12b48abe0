"""The engine's duty for tasks that must have an answer by a moment: without one they get the fallback's.

It is provisional: the task stays unsolved, and the chosen model's answer replaces it whenever it comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import replace
from pathlib import Path

from router.answering import (
    PASSAGES_SOURCE,
    Attempt,
    AttemptState,
    DueTask,
    Found,
    Knowledge,
    RequestContext,
    RequestTask,
    RoutingPlan,
    TaskRecord,
    call_request,
    claim_due_deadlines,
    complete_deadline,
    extend_deadline_claim,
    permit_patience,
    prompt_with,
    search,
)
from router.background import cancel_and_wait
from router.classification import Classification
from router.errors import DatabaseError, RouterError
from router.knowledge import Knowledge as KeptKnowledge
from router.models import CallRequest
from router.task import CallResult, Outcome, Role, new_call_id
from router.workers.engine import Engine

log = logging.getLogger("router.workers.deadlines")

STEP_SECONDS = 1.0
MOST_AT_ONCE = 50
HOLD_SECONDS = 60.0  # if this process dies, another one serves the task after so long
LEAST_SECONDS = 10.0  # a task whose deadline has passed is still worth asking for


class DeadlineJob:
    """Looks for tasks whose deadline is near, and serves them; ends with its engine."""

    def __init__(
        self, engine: Engine, folder: Path, data: Path | None, knowledge: Knowledge | None = None
    ) -> None:
        """`folder` is that of the config; knowledge is opened when it is first needed."""
        self._engine = engine
        self._folder = folder
        self._data = data
        self._knowledge = knowledge
        self._opening = asyncio.Lock()
        self._serving: set[asyncio.Task[None]] = set()
        self._means = RequestContext(
            pool=engine.pool, limiter=engine.limiter, backend=engine.backend,
            worker=lambda: engine.queue.worker, rename=engine.queue.rename,
            new_call_id=lambda: new_call_id(engine.queue.database_time()),
            check_may_send=engine.check_may_send,
        )  # fmt: skip

    def start(self) -> None:
        """Become one of the engine's duties."""
        self._engine.start_job(self.step, STEP_SECONDS, "deadlines", self._stop)

    async def step(self) -> None:
        """Take up what is due now, as far as there is room."""
        room = MOST_AT_ONCE - len(self._serving)
        if room <= 0 or not self._engine.may_send():
            return
        due = await claim_due_deadlines(
            self._engine.pool, ahead_seconds=self._ahead_seconds, hold_seconds=HOLD_SECONDS, limit=room
        )  # fmt: skip
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
            log.warning("%s: %s (another try follows)", serving.get_name(), error)
        elif error is not None:
            log.error("%s: a fault of the program", serving.get_name(), exc_info=error)

    async def _serve(self, due: DueTask) -> None:
        found = await self._search(due.prompt)
        ledger = TaskRecord(
            self._means, due.prompt, due.seconds_left, RequestTask(due.task_id, due.prompt_version)
        )
        about = Classification(due.category, due.confidence or 0.0, "the task's")
        roster, config = self._engine.roster, self._engine.config
        line_up = RoutingPlan.of(roster, config, about, None)
        asking_models = asyncio.get_running_loop().create_task(
            self._ask(due, ledger, line_up, prompt_with(due.prompt, found, config.fallback)),
            name=f"router fallback of task {due.task_id}",
        )
        holding = asyncio.get_running_loop().create_task(
            self._hold(due), name=f"router hold of task {due.task_id}"
        )
        try:
            await asyncio.wait({asking_models}, timeout=max(0.0, due.seconds_left))
            if not asking_models.done() or not asking_models.result():
                await self._keep_passages(due, ledger, line_up, found)
            answered = await asking_models
        finally:
            await cancel_and_wait(asking_models, holding)
        if (
            answered or not self._engine.sending_paused()
        ):  # else it was cut short, and is taken up again later
            await complete_deadline(self._engine.pool, due, ahead_seconds=self._ahead_seconds)

    async def _hold(self, due: DueTask) -> None:
        while True:
            await asyncio.sleep(HOLD_SECONDS / 3)
            with contextlib.suppress(DatabaseError):
                await extend_deadline_claim(
                    self._engine.pool, due, ahead_seconds=self._ahead_seconds, hold_seconds=HOLD_SECONDS
                )

    async def _search(self, prompt: str) -> Found:
        async with self._opening:
            if self._knowledge is None:
                opening = KeptKnowledge.open(
                    self._folder / "knowledge", database_url=self._engine.addresses.database_url,
                    data_folder=self._data,
                )  # fmt: skip
                self._knowledge = await self._engine.enter(opening)
        return await search(self._knowledge, prompt, self._engine.config.fallback.passages)

    async def _ask(self, due: DueTask, ledger: TaskRecord, who: RoutingPlan, prompt: str) -> bool:
        """Ask one cheap model after the other; whether one answered."""
        config = self._engine.config
        until = time.monotonic() + max(LEAST_SECONDS, due.seconds_left)
        patience = permit_patience(max(LEAST_SECONDS, due.seconds_left), config.answering.permit_seconds)
        for model in who.cheap:
            if self._engine.sending_paused():
                return False
            order = call_request(
                self._engine.roster, self._means.new_call_id(), model, prompt,
                config.fallback.max_tokens, due.max_tokens,
            )  # fmt: skip
            row = who.row(order, Role.FALLBACK, worker=self._means.worker(), attempt=0)
            runner = Attempt(
                ledger, replace(row, confidence=due.confidence), order, lambda _runner, _what: None
            )
            last = model == who.cheap[-1]
            await runner.run(patience, until if last else min(until, time.monotonic() + patience))
            await runner.close()
            if runner.cancelled:  # which it took for itself, to settle its call
                raise asyncio.CancelledError
            if runner.leg is AttemptState.ANSWERED:
                return True
        return False

    async def _keep_passages(self, due: DueTask, ledger: TaskRecord, who: RoutingPlan, found: Found) -> None:
        order = CallRequest(self._means.new_call_id(), PASSAGES_SOURCE, "", "", 0, 0, 0.0)
        row = who.row(order, Role.PASSAGES, worker=self._means.worker(), attempt=0)
        row = await ledger.write(replace(row, confidence=due.confidence))
        await ledger.settle(row, CallResult(Outcome.ANSWERED, answer=found.as_answer()), late=False)
