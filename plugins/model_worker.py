"""Operators and triggers that run the router's workers in Airflow's triggerer.

The triggers of one triggerer process share an engine. It outlives each of them: a trigger that ends, is
canceled or moves to another triggerer does not take its calls in flight with it.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, TypeVar

from airflow.configuration import conf
from airflow.sdk import BaseOperator, BaseOperatorLink, Connection, Variable
from airflow.sdk.definitions.context import Context
from airflow.triggers.base import BaseTrigger, TaskSuccessEvent, TriggerEvent
from connections import NAMES, addresses_of

from router.models import VARIABLE_PREFIX
from router.settings import Addresses, config_folder, data_folder, load_config
from router.workers import Engine, Worker, wait_for_work

LINGER_SECONDS = 30.0  # the next run starts within seconds and reuses the engine

T = TypeVar("T")


def in_own_context(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Runs `work` in a task without the trigger's context.

    The triggerer writes what is logged in a trigger's context, and in that of its tasks, to the log of the
    trigger's Airflow task. The engine is shared by all triggers: its log belongs to the triggerer's.
    """
    return contextvars.Context().run(asyncio.get_running_loop().create_task, work)


async def read_traffic_variables(models: list[str]) -> Mapping[str, str | None]:
    """Reads model -> text of its Variable, None without one, sequentially."""
    lines: dict[str, str | None] = {}
    for model in models:
        lines[model] = await asyncio.to_thread(Variable.get, VARIABLE_PREFIX + model, default=None)
    return lines


class SharedEngine:
    """The engine of this process: started on first use, stopped after LINGER_SECONDS without work."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = asyncio.Lock()
        self._engine: Engine | None = None
        self._closer: asyncio.Task[None] | None = None

    async def get(self) -> Engine:
        """Returns the running engine of this event loop."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # `airflow dags test` runs each trigger in its own loop
            self._loop, self._lock, self._engine, self._closer = loop, asyncio.Lock(), None, None
        async with self._lock:
            if self._engine is None:
                addresses = addresses_of(*[await Connection.async_get(name) for name in NAMES])
                self._engine = await in_own_context(self._started(addresses))
            return self._engine

    async def _started(self, addresses: Addresses) -> Engine:
        engine = Engine(addresses, load_config(), read_traffic_variables)
        await engine.start()
        # Not in processes that only load plugins: it imports the search engine.
        from router.workers import DeadlineJob  # noqa: PLC0415

        DeadlineJob(engine, config_folder(), data_folder()).start()
        return engine

    def let_linger(self) -> None:
        """Stops the engine once it has been idle for LINGER_SECONDS."""
        if self._closer is None or self._closer.done():
            self._closer = in_own_context(self._close_when_idle())

    async def _close_when_idle(self) -> None:
        while True:
            await asyncio.sleep(LINGER_SECONDS)
            async with self._lock:
                if self._engine is not None and self._engine.idle:
                    engine, self._engine = self._engine, None
                    await engine.stop()
                if self._engine is None:
                    return


shared_engine = SharedEngine()


class WorkerTrigger(BaseTrigger):
    """Solves tasks with one model until its run ends; ends the Airflow task without another process."""

    def __init__(self, model: str, run: str, models: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # Airflow's
        self.model = model
        self.run_name = run
        self.models = models

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return (
            "model_worker.WorkerTrigger",
            {"model": self.model, "run": self.run_name, "models": self.models},
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        engine = await shared_engine.get()
        try:
            worker = Worker(engine, self.model, self.run_name, frozenset(self.models))
            reason = await in_own_context(worker.run())
        finally:
            shared_engine.let_linger()
        yield TaskSuccessEvent(xcoms={"return_value": {"model": self.model, "left": reason}})


class ModelLink(BaseOperatorLink):
    """Link from a worker's Airflow task to its model in the console."""

    name = "Model in the console"

    def get_link(self, operator: Any, *, ti_key: Any) -> str:  # noqa: ARG002 - Airflow's signature
        base = conf.get("api", "base_url", fallback="").rstrip("/")
        return f"{base}/router/page#models/{operator.assigned['model']}"


class ModelWorker(BaseOperator):
    """Defers immediately to the model's worker; `assigned` is {"model", "run", "models"}."""

    template_fields = ("assigned",)
    operator_extra_links = (ModelLink(),)

    def __init__(self, *, assigned: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.assigned = assigned

    def execute(self, context: Context) -> None:  # noqa: ARG002 - Airflow's signature
        self.defer(trigger=WorkerTrigger(**self.assigned), method_name="resumed", timeout=None)

    def resumed(self, context: Context, event: Any = None) -> Any:  # noqa: ARG002 - Airflow's signature
        """Runs only where no triggerer ends the Airflow task (`airflow dags test`)."""
        return event


class WorkTrigger(BaseTrigger):
    """Fires as soon as there is an unsolved task; the engine then pulls until the run's workers start."""

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return ("model_worker.WorkTrigger", {})

    async def run(self) -> AsyncIterator[TriggerEvent]:
        engine = await shared_engine.get()
        try:
            await in_own_context(wait_for_work(engine))
        finally:
            shared_engine.let_linger()
        yield TaskSuccessEvent()


class WaitForWork(BaseOperator):
    """Waits, deferred, until there is an unsolved task."""

    def execute(self, context: Context) -> None:  # noqa: ARG002 - Airflow's signature
        trigger = WorkTrigger()  # type: ignore[no-untyped-call]  # Airflow's
        self.defer(trigger=trigger, method_name="resumed", timeout=None)

    def resumed(self, context: Context, event: Any = None) -> None:
        """Runs only where no triggerer ends the Airflow task (`airflow dags test`)."""
