"""Worker of one model in one run of `solve_tasks`."""

from __future__ import annotations

import asyncio
import logging

from router.background import cancel_and_wait
from router.errors import DatabaseError
from router.workers.engine import ROSTER_CHANGED, Engine
from router.workers.pull_loop import PullLoop

log = logging.getLogger("router.workers.worker")

CHECK_SECONDS = 5.0


class Worker:
    """One model's worker in one run; `models` are those of the whole run."""

    def __init__(self, engine: Engine, model: str, run: str, models: frozenset[str] = frozenset()) -> None:
        self._engine = engine
        self.model = model
        self._run = run
        self._models = models

    async def run(self) -> str:
        """Solves tasks until the run ends and returns the reason. Calls in flight stay with the engine.

        When canceled, it stops pulling at once and requeues what it claimed but did not send.
        """
        engine = self._engine
        first = engine.enter_run(self._run, self._models)
        engine.handover.take_over(self.model)
        if first:
            engine.handover.pull_for(self._models - {self.model})
        pulling = self.start_pulling()
        try:
            while (reason := engine.run_ended(self._run)) is None:
                waking = asyncio.create_task(engine.wait_for_wakeup(CHECK_SECONDS), name="router wake-up")
                await asyncio.wait({pulling, waking}, return_when=asyncio.FIRST_COMPLETED)
                waking.cancel()
                if pulling.done():
                    pulling.result()
            if reason == ROSTER_CHANGED:
                engine.handover.keep(self.model, pulling)
                engine.handover.pull_for(engine.roster.models.keys() - self._models)
            return reason
        finally:
            if not engine.handover.owns(pulling):
                await cancel_and_wait(pulling)
            engine.leave_run(self._run)

    def start_pulling(self) -> asyncio.Task[None]:
        """Starts the pull loop, which ends only when its task is canceled."""
        return PullLoop(self._engine, self.model).start()


async def wait_for_work(engine: Engine) -> None:
    """Returns as soon as there is an unsolved task; the engine then pulls until the workers are present."""
    unexpected = ""
    with engine.in_use():
        while True:
            wakeup = engine.wakeup  # taken before the query, so that a wake-up during it is not missed
            try:
                if sum((await engine.queue.state([])).unsolved.values()) > 0:
                    break
            except DatabaseError:
                pass  # logged by the engine's periodic jobs
            except Exception as error:
                if f"{error!r}" != unexpected:
                    log.exception("unexpected error while waiting for work, retrying")
                unexpected = f"{error!r}"
            await engine.wait_for_wakeup(engine.poll_seconds, wakeup)
        engine.handover.pull_for(engine.roster.models.keys())
