"""Shared state of all requests of a process."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import asyncpg

from router.knowledge import Knowledge
from router.limiter import TrafficLimiter
from router.models import ModelsBackend, Roster
from router.queue import TaskQueue
from router.settings import RouterConfig
from router.task import new_call_id


def _always() -> None:
    """Allows every send."""


@dataclass(slots=True)
class RequestContext:
    """Connections, configuration and models that the requests of a process share.

    `roster` returns the models in use now. `check_may_send` runs immediately before each send and raises
    SendingPaused to prevent it. `unconfirmed` holds calls whose log row may or may not exist, because the
    reply of Postgres was lost; the service discards them.
    """

    pool: asyncpg.Pool
    limiter: TrafficLimiter
    backend: ModelsBackend
    queue: TaskQueue
    config: RouterConfig
    roster: Callable[[], Roster]
    knowledge: Knowledge | None = None
    check_may_send: Callable[[], None] = _always
    unconfirmed: set[uuid.UUID] = field(default_factory=set)

    @property
    def worker(self) -> str:
        """Name of the lease that holds the tasks of this process."""
        return self.queue.worker

    def new_call_id(self) -> uuid.UUID:
        """Returns an id that sorts by the database's clock."""
        return new_call_id(self.queue.database_time())
