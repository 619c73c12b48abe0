"""Limits of clients: which clients have one, and their states beside those of the models."""

from __future__ import annotations

from collections.abc import Callable

from router.errors import InputError
from router.limiter.state import ModelState
from router.limiter.tracker import ModelTracker
from router.traffic import TrafficTarget

LimitSource = Callable[[str], TrafficTarget | None]


class ClientLimits:
    """States of the clients with limits; a client without one costs a look-up.

    `source` returns a client's limit; it is asked until there is one. A limit that was set goes before it.
    """

    def __init__(self, tracker: ModelTracker, source: LimitSource | None, *, possible: bool = True) -> None:
        self._tracker = tracker
        self._source = source
        self._possible = possible
        self._states: dict[str, ModelState | None] = {}

    async def state(self, client: str) -> ModelState | None:
        """Returns the state of a client's limit, applied in Redis; None if the client has no limit.

        Raises LimiterUnavailable if Redis cannot be told of a new limit.
        """
        if client in self._states:
            return self._states[client]
        limit = None if self._source is None else self._source(client)
        if limit is None:  # not kept: the names of clients are without number
            return None
        await self.set(client, limit)
        return self._states[client]

    async def set(self, client: str, limit: TrafficTarget | None) -> None:
        """Applies a limit from the next decision on; None: this process asks for no limit of the client."""
        if limit is None:
            self._states[client] = None
            return
        if not self._possible:
            raise InputError(
                "Limits of clients on a Redis cluster need TrafficLimiter(one_slot=True) in all processes: "
                "the states of model and client must be in one slot."
            )
        state = self._tracker.client(client)
        await self._tracker.set_target(state, limit, None)
        self._states[client] = state
