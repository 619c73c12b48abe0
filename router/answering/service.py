"""Connections and periodic jobs of a process that answers requests.

It opens while Postgres or Redis is unavailable as well: until both are back, only knowledge answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import asyncpg

from router.answering import store
from router.answering.context import RequestContext
from router.answering.plan import RoutingPlan
from router.background import PeriodicJobs, cancel_and_wait, freeze_garbage_collector, result_or_none
from router.classification import Classification, ClassifierProcess
from router.database import UNAVAILABLE_ERRORS
from router.errors import RouterError, SchemaError
from router.knowledge import Knowledge
from router.limiter import WaitReason
from router.migrations import SchemaMonitor
from router.models import Roster, open_services, read_roster, roster_version
from router.queue import TaskQueue
from router.request import Conversation, ModelRequest
from router.settings import Addresses, RouterConfig

log = logging.getLogger("router.answering")

FIRST_CONTACT_SECONDS = 5.0
ROSTER_SECONDS = 1.0
SCHEMA_SECONDS = 5.0
UNCONFIRMED_SECONDS = 1.0
ORPHANS_SECONDS = 30.0
CLASSIFIER_START_SECONDS = 15.0
CLASSIFY_SHARE = 0.2  # of the deadline
START_SHARE = 0.3  # of the deadline, while the classifier starts
MIN_START_SECONDS = 0.8  # that the classifier needs to start
RESTORE_SECONDS = 1.0  # for the limiter to restore a model that Redis does not know
RESTORED_AT_A_TIME = 8
WARM_CONNECTIONS = 4
REDIS_SECONDS = 2.0
CLOSE_SECONDS = 3.0
EMPTY_ROSTER = Roster(models={}, places={}, categories=(), version=-1)


class AnsweringService:
    """Lease, connections, roster, knowledge and classifier of one process. Belongs to one event loop.

    `open_calls` returns the calls of this process that are not settled yet.
    """

    def __init__(
        self, addresses: Addresses, config: RouterConfig, folder: Path, data: Path | None,
        open_calls: Callable[[], set[uuid.UUID]],
    ) -> None:  # fmt: skip
        self._addresses = addresses
        self._config = config
        self._folder = folder
        self._data = data
        self._open_calls = open_calls
        self._stack = contextlib.AsyncExitStack()
        self._jobs = PeriodicJobs()
        self._first_targets_done = False
        self._contacting: asyncio.Task[None] | None = None
        self._classifier: ClassifierProcess | None = None
        self.roster = EMPTY_ROSTER
        self.context: RequestContext

    async def open(self) -> None:
        """Opens what needs no network; Postgres and Redis are contacted in the background."""
        try:
            await self._connect()
        except BaseException:
            await self.close()
            raise
        freeze_garbage_collector()
        self._contacting = asyncio.get_running_loop().create_task(
            self._first_contact(), name="router first contact"
        )

    async def until_contact(self, seconds: float) -> None:
        """Waits at most `seconds` until the roster was read, or until that has failed once."""
        if self._contacting is not None:
            await asyncio.wait({self._contacting}, timeout=max(0.0, seconds))

    @property
    def has_roster(self) -> bool:
        """False until the roster has been read from Postgres."""
        return self.roster.version >= 0

    async def start_classifier(self) -> None:
        """Starts the classifier on the first call, without waiting for it."""
        if self._classifier is None and self._config.classification is not None:
            self._classifier = await self._stack.enter_async_context(
                ClassifierProcess(self._config.classification)
            )
            self._classifier.warm_up()

    async def until_classifier(self) -> None:
        """Waits until the classifier is ready, at most CLASSIFIER_START_SECONDS."""
        if self._classifier is not None:
            await self._classifier.until_ready(CLASSIFIER_START_SECONDS)

    async def classify(self, chat: Conversation, seconds: float) -> Classification:
        """Returns the category of the question, or the default category if that takes too long.

        Takes a share of `seconds`, a larger one while the classifier starts. The context decides only where
        the question alone is below the threshold.
        """
        settings = self._config.classification
        why = "the classifier is not running"
        if self._classifier is not None and settings is not None:
            seconds *= CLASSIFY_SHARE if self._classifier.ready else START_SHARE
            if not self._classifier.ready and seconds < MIN_START_SECONDS:
                seconds = 0.0  # it would be in vain, and cost the models their time
            ends_at = time.monotonic() + seconds
            await self._classifier.until_ready(seconds)
            prompts = [chat.question]
            if chat.context:
                prompts.append(f"{chat.context}\n\n{chat.question}")
            classifying = self._classifier.classify(prompts)
            found = await result_or_none(classifying, ends_at - time.monotonic(), "router category")
            if found is not None:
                sure = found[0].confidence >= settings.threshold
                return found[0] if sure else max(found, key=lambda one: one.confidence)
            why = f"no category within {seconds:.2g} s" if seconds else "the classifier is starting"
        return Classification(self._config.default_category, 0.0, f"default: {why}")

    async def _connect(self) -> None:
        opening = open_services(
            self._addresses, self._config, redis_seconds=REDIS_SECONDS, needs_postgres=False
        )
        services = await self._stack.enter_async_context(opening)
        self._schema = SchemaMonitor()
        self._pool, self._targets = services.pool, services.targets
        self._queue = TaskQueue(self._pool, host=f"{socket.gethostname()}:asks", lease=services.lease)
        opening_knowledge = Knowledge.open(
            self._folder / "knowledge",
            database_url=self._addresses.database_url,
            data_folder=self._data,
            tasks=self._config.knowledge.tasks,
        )
        self.context = RequestContext(
            pool=self._pool, limiter=services.limiter, backend=services.backend, queue=self._queue,
            config=self._config, roster=lambda: self.roster,
            knowledge=await self._stack.enter_async_context(opening_knowledge),
        )  # fmt: skip

    async def _first_contact(self) -> None:
        try:
            done = await result_or_none(self._contact(), FIRST_CONTACT_SECONDS, "router first contact")
        except (RouterError, asyncpg.PostgresError, *UNAVAILABLE_ERRORS) as error:
            log.warning("no model can be called yet, retrying: %s", error)
        else:
            if done is None:
                log.warning("Postgres or Redis does not respond; only knowledge answers until it does")
        self._start_jobs()

    async def _restore_limiter(self) -> None:
        """Lets the limiter restore the models called first, if a new or restarted Redis does not know them.

        It counts logged calls that may have been sent, so this is quicker before the first call is logged.
        """
        limiter, slots = self.context.limiter, asyncio.Semaphore(RESTORED_AT_A_TIME)

        async def restore(model: str) -> None:
            async with slots:
                traffic = await limiter.shared_snapshot(model)
                if traffic.waiting_for in (WaitReason.REBUILDING, WaitReason.NO_TARGET):
                    waiting = limiter.wait_until_available(model)
                    await result_or_none(waiting, RESTORE_SECONDS, f"router restore of {model}")

        roster, config = self.roster, self._config
        plans = [
            RoutingPlan.of(roster, config, category, None, request=ModelRequest.of_prompt(""))
            for category in roster.places
        ]
        first = {model for plan in plans for model in (plan.preferred, plan.fallback) if model is not None}
        await asyncio.gather(*map(restore, first))

    async def _contact(self) -> bool:
        await self._queue.renew_lease()
        # Connections made now do not delay the first requests.
        await asyncio.gather(*(self._pool.fetchval("SELECT 1") for _ in range(WARM_CONNECTIONS)))
        await self._roster_step()
        await self._restore_limiter()
        return True

    def _start_jobs(self) -> None:
        self._jobs.start(
            self._queue.renew_lease, self._config.worker.heartbeat_seconds, "answering heartbeat"
        )
        self._jobs.start(self._schema_step, SCHEMA_SECONDS, "answering schema")
        self._jobs.start(self._roster_step, ROSTER_SECONDS, "answering roster")
        self._jobs.start(self._unconfirmed_step, UNCONFIRMED_SECONDS, "answering unconfirmed calls")
        self._jobs.start(self._orphans_step, ORPHANS_SECONDS, "answering orphaned claims")

    async def close(self) -> None:
        """Ends the jobs, releases the lease and closes all connections, each within CLOSE_SECONDS."""
        if self._contacting is not None:
            await cancel_and_wait(self._contacting)
        await self._jobs.stop()
        if hasattr(self, "context"):
            with contextlib.suppress(RouterError):
                await result_or_none(self._unconfirmed_step(), CLOSE_SECONDS, "router unconfirmed calls")
                await result_or_none(self._queue.release(), CLOSE_SECONDS, "router release")
        await self._stack.aclose()

    async def _schema_step(self) -> None:
        """Raises SchemaError, which the job logs, while the schema is not as this process expects it."""
        problem = await self._schema.problem(self._pool)
        if problem is not None:
            raise SchemaError(str(problem))

    async def _roster_step(self) -> None:
        if self.roster.version != await roster_version(self._pool):
            self.roster = await read_roster(self._pool)
            self._first_targets_done = False
        if not self._first_targets_done:
            await self._targets.restore(self.roster)
            self._first_targets_done = True

    async def _unconfirmed_step(self) -> None:
        unconfirmed = self.context.unconfirmed
        for call_id in list(unconfirmed):
            await store.discard(self._pool, call_id, "the reply of Postgres was lost when it was logged")
            unconfirmed.discard(call_id)

    async def _orphans_step(self) -> None:
        await self._queue.release_orphaned_claims(self._open_calls())
