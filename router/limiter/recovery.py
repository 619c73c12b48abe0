"""Restores what Redis lost: a model's target, and its windows rebuilt from the call log."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Awaitable, Callable, Sequence

from router.errors import LimiterUnavailable
from router.limiter.codec import MICRO, Loss, pack_end, pack_history, pack_loss, pack_rebuild, unpack_loss
from router.limiter.permit import CallEnd, PastCall, WaitReason
from router.limiter.releases import Releases
from router.limiter.state import ModelState
from router.limiter.tracker import ModelTracker

log = logging.getLogger("router.limiter")

History = Callable[[str, float], Awaitable[list[PastCall]]]
CallEnds = Callable[[Sequence[uuid.UUID]], Awaitable[list[CallEnd]]]
MIN_HISTORY_SECONDS = 61.0  # so that a target with a window of a minute, set afterwards, is exact too
MANY_CALLS = 5000  # packed in a thread
FIRST_LOOK_SECONDS, LAST_LOOK_SECONDS = 0.25, 4.0  # for ends of rebuilt calls


class Recovery:
    """Rebuilds a model's state once all permits of the lost state have expired."""

    def __init__(
        self, tracker: ModelTracker, releases: Releases, history: History | None, ends: CallEnds | None,
        client_history: History | None = None,
    ) -> None:  # fmt: skip
        self._tracker = tracker
        self._releases = releases
        self._script, self._settings, self._clock = tracker.script, tracker.settings, tracker.clock
        self._histories = {False: history, True: client_history}  # of models, of clients
        self._ends = ends
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._logged: set[str] = set()
        self._noticed: dict[str, tuple[tuple[int, float], float]] = {}

    async def recover(self, state: ModelState, reason: WaitReason) -> float | None:
        """Returns 0 once the state is restored, else the seconds to wait; None if only a change can help."""
        async with self._locks.setdefault(state.key, asyncio.Lock()):
            # Also if there is a target: a copy that Redis restored may hold an older one.
            if not await self._tracker.restore_target(state) and reason is WaitReason.NO_TARGET:
                return None
            return await self._rebuild(state)

    async def close(self) -> None:
        """Ends the watches for ends of rebuilt calls."""
        for watch in self._watches.values():
            watch.cancel()
        await asyncio.gather(*self._watches.values(), return_exceptions=True)

    async def _rebuild(self, state: ModelState) -> float:
        asked_at = self._clock()
        request = pack_loss(known=state.generation > 0, settings=self._settings)
        loss = unpack_loss(await self._script.call(state.key, "loss", request))
        if loss.live:
            return 0.0
        lost_for = self._lost_for(state, loss, asked_at)
        if loss.known and state.key not in self._logged:
            self._logged.add(state.key)
            log.warning("Redis lost the sends of %s: nothing is sent until they are rebuilt", state.model)
        expiry_seconds = self._settings.look_ahead_seconds + self._settings.minute_slacks.send
        calls: list[PastCall] = []
        longest = loss.longest
        history = self._histories[state.client is not None]
        if history is not None:
            longest = max(longest, MIN_HISTORY_SECONDS * MICRO)
            calls = await self._past_calls(history, state, longest / MICRO)
        elif loss.known:
            expiry_seconds += longest / MICRO
        left = expiry_seconds - lost_for if calls or loss.known else 0.0
        if left > 0:
            return left
        clock = loss.clock + (self._clock() - asked_at) * MICRO
        since = clock - longest if history is not None or loss.known else 0.0
        await self._build(state, calls, clock, since=since, blind=history is None and not loss.known)
        return 0.0

    def _lost_for(self, state: ModelState, loss: Loss, asked_at: float) -> float:
        """Returns the seconds since this process noticed the loss, as Redis's clock may be set meanwhile."""
        lost = (round(loss.clock - loss.lost_for), loss.generation)
        known, since = self._noticed.get(state.key, ((0, 0.0), 0.0))
        if known != lost:
            since = asked_at
            self._noticed[state.key] = (lost, since)
        return self._clock() - since

    async def _past_calls(self, history: History, state: ModelState, seconds: float) -> list[PastCall]:
        try:
            return await history(state.model if state.client is None else state.client, seconds)
        except Exception as error:
            what = f"Redis lost the sends of {state.model}, and the call log cannot be read"
            raise LimiterUnavailable(f"{what}: {error}", cause="database") from error

    async def _build(
        self, state: ModelState, calls: list[PastCall], clock: float, *, since: float, blind: bool
    ) -> None:
        request = pack_rebuild(
            blind=blind, since=since, generation=state.generation, trips=state.trips, settings=self._settings,
            cooldown_seconds=max(0.0, state.cooldown_until - self._clock()),
        )  # fmt: skip
        if len(calls) > MANY_CALLS:
            history = await asyncio.to_thread(pack_history, calls, clock)
        else:
            history = pack_history(calls, clock)
        sender, reason = self._script.sender, state.cooldown_reason
        await self._script.call(state.key, "rebuild", request, *history, sender, reason)
        self._watch_open_calls(state, calls)
        if state.key in self._logged:
            self._logged.discard(state.key)
            log.info("rebuilt the sends of %s from %d logged calls", state.model, len(calls))

    def _watch_open_calls(self, state: ModelState, calls: list[PastCall]) -> None:
        open_calls = {call.call_id for call in calls if call.open and call.call_id is not None}
        before = self._watches.pop(state.key, None)
        if before is not None:
            before.cancel()
        if open_calls and self._ends is not None:
            watch = self._release_ended(self._ends, state, open_calls)
            self._watches[state.key] = asyncio.create_task(watch, name=f"open calls of {state.model}")

    async def _release_ended(self, ends: CallEnds, state: ModelState, left: set[uuid.UUID]) -> None:
        """Frees the slots of rebuilt calls as they end in the call log, whichever process made them."""
        until, pause = self._clock() + self._settings.max_call_seconds, FIRST_LOOK_SECONDS
        while left and self._clock() < until:
            await asyncio.sleep(pause)
            pause = min(LAST_LOOK_SECONDS, 2 * pause)
            with contextlib.suppress(Exception):  # the database or Redis is away; the next round tries again
                ended = await ends(tuple(left))
                items = [pack_end(end.call_id, end.tokens, end.cost, unused=not end.sent) for end in ended]
                await self._releases.send(state, items)
                left -= {end.call_id for end in ended}
