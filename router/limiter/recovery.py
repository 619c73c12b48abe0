"""Restores what Redis lost: a model's target, and its windows rebuilt from the call log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from router.errors import LimiterUnavailable
from router.limiter.codec import MICRO, Loss, pack_history, pack_loss, pack_rebuild, unpack_loss
from router.limiter.permit import Clock, PastCall, WaitReason
from router.limiter.script import RedisScript
from router.limiter.settings import LimiterSettings
from router.limiter.state import ModelState
from router.limiter.tracker import ModelTracker

log = logging.getLogger("router.limiter")

History = Callable[[str, float], Awaitable[list[PastCall]]]
MIN_HISTORY_SECONDS = 61.0  # so that a target with a window of a minute, set afterwards, is exact too


class Recovery:
    """Rebuilds a model's state once all permits of the lost state have expired."""

    def __init__(
        self,
        script: RedisScript,
        tracker: ModelTracker,
        history: History | None,
        settings: LimiterSettings,
        clock: Clock,
    ) -> None:
        self._script = script
        self._tracker = tracker
        self._history = history
        self._settings = settings
        self._clock = clock
        self._locks: dict[str, asyncio.Lock] = {}
        self._logged: set[str] = set()
        self._noticed: dict[str, tuple[tuple[int, float], float]] = {}

    async def recover(self, state: ModelState, reason: WaitReason) -> float | None:
        """Returns 0 once the state is restored, else the seconds to wait; None if only a change can help."""
        async with self._locks.setdefault(state.model, asyncio.Lock()):
            if reason is WaitReason.NO_TARGET and not await self._tracker.restore_target(state):
                return None
            return await self._rebuild(state)

    async def _rebuild(self, state: ModelState) -> float:
        asked_at = self._clock()
        request = pack_loss(known=state.generation > 0, settings=self._settings)
        loss = unpack_loss(await self._script.call(state.key, "loss", request))
        if loss.live:
            return 0.0
        lost_for = self._lost_for(state, loss, asked_at)
        if loss.known and state.model not in self._logged:
            self._logged.add(state.model)
            log.warning("Redis lost the sends of %s: nothing is sent until they are rebuilt", state.model)
        expiry_seconds = self._settings.look_ahead_seconds + self._settings.minute_slacks.send
        calls: list[PastCall] = []
        longest = loss.longest
        if self._history is not None:
            longest = max(longest, MIN_HISTORY_SECONDS * MICRO)
            calls = await self._past_calls(self._history, state.model, longest / MICRO)
        elif loss.known:
            expiry_seconds += longest / MICRO
        left = expiry_seconds - lost_for if calls or loss.known else 0.0
        if left > 0:
            return left
        clock = loss.clock + (self._clock() - asked_at) * MICRO
        since = clock - longest if calls or loss.known else 0.0
        await self._build(state, calls, clock, since=since, blind=self._history is None and not loss.known)
        return 0.0

    def _lost_for(self, state: ModelState, loss: Loss, asked_at: float) -> float:
        """Returns the seconds since this process noticed the loss, as Redis's clock may be set meanwhile."""
        lost = (round(loss.clock - loss.lost_for), loss.generation)
        known, since = self._noticed.get(state.model, ((0, 0.0), 0.0))
        if known != lost:
            since = asked_at
            self._noticed[state.model] = (lost, since)
        return self._clock() - since

    async def _past_calls(self, history: History, model: str, seconds: float) -> list[PastCall]:
        try:
            return await history(model, seconds)
        except Exception as error:
            what = f"Redis lost the sends of {model}, and the call log cannot be read"
            raise LimiterUnavailable(f"{what}: {error}") from error

    async def _build(
        self, state: ModelState, calls: list[PastCall], clock: float, *, since: float, blind: bool
    ) -> None:
        request = pack_rebuild(
            blind=blind, since=since, generation=state.generation, trips=state.trips, settings=self._settings,
            cooldown_seconds=max(0.0, state.cooldown_until - self._clock()),
        )  # fmt: skip
        history = pack_history(calls, clock)
        sender, reason = self._script.sender, state.cooldown_reason
        await self._script.call(state.key, "rebuild", request, *history, sender, reason)
        if state.model in self._logged:
            self._logged.discard(state.model)
            log.info("rebuilt the sends of %s from %d logged calls", state.model, len(calls))
