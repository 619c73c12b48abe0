"""Bridges the time in which a model has no worker: its pull loop runs on in the engine.

Airflow starts and ends the workers of a run one by one; within seconds all of a run are present.
"""

from __future__ import annotations

import asyncio
from collections.abc import Set as AbstractSet

from router.background import cancel_and_wait, spawn
from router.workers.pull_loop import PullHost, PullLoop

HANDOVER_SECONDS = 30.0


class Handover:
    """Pull loops of models without a worker, each for at most HANDOVER_SECONDS."""

    def __init__(self, host: PullHost) -> None:
        self._host = host
        self._loops: dict[str, asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()

    @property
    def active(self) -> bool:
        """Whether any model is pulled for here."""
        return bool(self._loops)

    def covers(self, model: str) -> bool:
        """Whether the model is pulled for here."""
        return model in self._loops

    def owns(self, loop: asyncio.Task[None]) -> bool:
        """Whether this pull loop was handed over."""
        return loop in self._loops.values()

    def pull_for(self, models: AbstractSet[str]) -> None:
        """Starts a pull loop for each of the models that has none here; their workers are about to start."""
        for model in models:
            if not self.covers(model):
                self.keep(model, PullLoop(self._host, model).start())

    def keep(self, model: str, loop: asyncio.Task[None]) -> None:
        """Keeps a running pull loop until `take_over`."""
        self._loops[model] = loop
        timer = asyncio.get_running_loop().call_later(HANDOVER_SECONDS, self._cancel, loop)
        loop.add_done_callback(lambda _task: timer.cancel())
        loop.add_done_callback(lambda task: self._ended(model, task))

    def take_over(self, model: str) -> None:
        """Ends the model's pull loop, since its worker is present."""
        loop = self._loops.get(model)
        if loop is not None:
            self._cancel(loop)

    async def stop(self) -> None:
        """Ends all pull loops."""
        await cancel_and_wait(*self._loops.values())

    def _ended(self, model: str, loop: asyncio.Task[None]) -> None:
        if self._loops.get(model) is loop:
            del self._loops[model]

    def _cancel(self, loop: asyncio.Task[None]) -> None:
        spawn(cancel_and_wait(loop), "end of pulling", self._ending)
