"""A process that asks: its connections, lease, limiter, roster, knowledge, categoriser, and its duties.

It opens also while Postgres or Redis is away: then only knowledge answers, until they are back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import uuid
from collections.abc import Callable
from pathlib import Path

import asyncpg

from router.answering import store as asking
from router.answering.fallback import Knowledge as Searched
from router.answering.plan import Desk
from router.answering.task_record import RequestContext
from router.background import PeriodicJobs, freeze_garbage_collector, result_or_none
from router.classification import Classification, ClassifierProcess
from router.database import UNAVAILABLE_ERRORS
from router.errors import RouterError
from router.knowledge import Knowledge
from router.models import Roster, open_services, read_roster, roster_version
from router.queue import TaskQueue
from router.settings import Addresses, RouterConfig
from router.task import new_call_id

log = logging.getLogger("router.answering")

FIRST_CONTACT_SECONDS = 5.0
ROSTER_SECONDS = 1.0
UNCONFIRMED_SECONDS = 1.0
OVERLOOKED_SECONDS = 30.0
START_SECONDS = 15.0
WARM_CONNECTIONS = 4
REDIS_SECONDS = 2.0
CLOSE_SECONDS = 3.0
NO_ROSTER = Roster(models={}, places={}, categories=(), version=-1)


class AnsweringService:
    """Open it, ask with its `means`, close it. All its state belongs to one event loop."""

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
        self._duties = PeriodicJobs()
        self._first_targets_done = False
        self.roster = NO_ROSTER
        self._knowledge: Searched | None = None
        self._classifier: ClassifierProcess | None = None

    async def open(self) -> None:
        """Connect as far as that is possible now; what is away is tried again for as long as this is open."""
        try:
            await self._connect()
            await self._open_knowledge()
            await self._first_contact()
        except BaseException:
            await self.close()
            raise
        freeze_garbage_collector()
        self._take_up_duties()

    @property
    def knows_the_roster(self) -> bool:
        """False until Postgres has told it."""
        return self.roster.version >= 0

    async def start_classifier(self) -> None:
        """Have the categoriser ready; bounded, and only the first time it takes long."""
        if self._classifier is None and self._config.classification is not None:
            self._classifier = await self._stack.enter_async_context(
                ClassifierProcess(self._config.classification)
            )
            await self._classifier.until_ready(START_SECONDS)

    async def classify(self, prompt: str, seconds: float) -> Classification:
        """The prompt's category, within `seconds`; else the default one, and the reason says why."""
        why = "nobody asked for the categoriser"
        if self._classifier is not None:
            classifying = self._classifier.classify([prompt])
            found = await result_or_none(classifying, seconds, "router category")
            if found is not None:
                return found[0]
            why = f"no category within {seconds:.2g} s"
        return Classification(self._config.default_category, 0.0, f"default: {why}")

    @property
    def desk(self) -> Desk:
        """What a prompt that comes now is answered with."""
        return Desk(self._means, self._config, self.roster, self._knowledge)

    async def _connect(self) -> None:
        opening = open_services(
            self._addresses, self._config, redis_seconds=REDIS_SECONDS, needs_postgres=False
        )
        services = await self._stack.enter_async_context(opening)
        self._pool, self.limiter, self._watch = services.pool, services.limiter, services.targets
        self.queue = TaskQueue(self._pool, host=f"{socket.gethostname()}:asks")
        self._means = RequestContext(
            pool=self._pool, limiter=self.limiter, backend=services.backend, worker=lambda: self.queue.worker,
            rename=self.queue.rename, new_call_id=lambda: new_call_id(self.queue.database_time()),
        )  # fmt: skip

    async def _open_knowledge(self) -> None:
        opening = Knowledge.open(
            self._folder / "knowledge", database_url=self._addresses.database_url, data_folder=self._data
        )
        self._knowledge = await self._stack.enter_async_context(opening)

    async def _first_contact(self) -> None:
        try:
            done = await result_or_none(self._contact(), FIRST_CONTACT_SECONDS, "router first contact")
        except (RouterError, asyncpg.PostgresError, *UNAVAILABLE_ERRORS) as error:
            log.warning("nothing can be asked yet: %s (tried again until it works)", error)
        else:
            if done is None:
                log.warning("Postgres or Redis does not answer; until it does only knowledge can")

    async def _contact(self) -> bool:
        await self.queue.renew_lease()
        # The first prompts shall not wait for connections to be made.
        await asyncio.gather(*(self._pool.fetchval("SELECT 1") for _ in range(WARM_CONNECTIONS)))
        await self._roster_step()
        return True

    def _take_up_duties(self) -> None:
        self._duties.start(self.queue.renew_lease, self._config.worker.heartbeat_seconds, "asker heartbeat")
        self._duties.start(self._roster_step, ROSTER_SECONDS, "asker roster")
        self._duties.start(self._unconfirmed_step, UNCONFIRMED_SECONDS, "asker unconfirmed calls")
        self._duties.start(self._overlooked_step, OVERLOOKED_SECONDS, "asker overlooked claims")

    async def close(self) -> None:
        """End the duties, give the lease back and close everything, within seconds whatever hangs."""
        await self._duties.stop()
        if hasattr(self, "queue"):
            with contextlib.suppress(RouterError):
                await result_or_none(self._unconfirmed_step(), CLOSE_SECONDS, "router unconfirmed calls")
                await result_or_none(self.queue.release(), CLOSE_SECONDS, "router release")
        await self._stack.aclose()

    # PeriodicJobs.

    async def _roster_step(self) -> None:
        if self.roster.version != await roster_version(self._pool):
            self.roster = await read_roster(self._pool)
            self._first_targets_done = False
        if not self._first_targets_done:
            await self._watch.restore(self.roster)
            self._first_targets_done = True

    async def _unconfirmed_step(self) -> None:
        for call_id in list(self._means.unconfirmed):
            await asking.forget(self._pool, call_id, "it was not confirmed when it was written")
            self._means.unconfirmed.discard(call_id)

    async def _overlooked_step(self) -> None:
        await self.queue.release_orphaned_claims(self._open_calls())
