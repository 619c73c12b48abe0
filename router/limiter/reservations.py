"""Requests permits from the script, and restores lost state on the way."""

from __future__ import annotations

import contextlib

from router.errors import LimiterUnavailable
from router.limiter.codec import LOST, MICRO, MORE, pack_reserve, unpack_decision, unpack_grants
from router.limiter.permit import Permit, Wait, WaitReason
from router.limiter.recovery import Recovery
from router.limiter.state import NEVER, ModelState
from router.limiter.tracker import ModelTracker

MAX_TRIES = 3
MAX_STEPS = 1000  # calls in which the script reads the sends of a new window
_REASONS = tuple(WaitReason)  # by number; calling the enum takes ten times as long
_LOST_REASONS = frozenset({WaitReason.REBUILDING, WaitReason.NO_TARGET})


class Reservations:
    """Permits of all models, as many per round trip as requested."""

    def __init__(self, tracker: ModelTracker, recovery: Recovery) -> None:
        self._tracker = tracker
        self._script, self._settings, self._clock = tracker.script, tracker.settings, tracker.clock
        self._recovery = recovery

    async def reserve(
        self, state: ModelState, tokens: int, call_seconds: float | None, *, interactive: bool = False
    ) -> Permit | Wait:
        """Returns a permit, or why there is none."""
        permits, wait = await self._request(
            state, "reserve", (tokens,), call_seconds, interactive=interactive
        )
        if not permits and wait.reason in _LOST_REASONS:
            permits, wait = await self.reserve_many(state, (tokens,), call_seconds, interactive=interactive)
        return permits[0] if permits else wait

    async def reserve_many(
        self, state: ModelState, tokens: tuple[int, ...], call_seconds: float | None = None, *,
        waits: bool = False, interactive: bool = False,
    ) -> tuple[list[Permit], Wait]:  # fmt: skip
        """Returns as many permits as there are for these tokens, in order, and the wait of the next one.

        If the caller `waits` for those that it did not get, the script keeps tokens free for the first of
        them: later requests of other processes do not overtake it, and batch calls do not overtake
        `interactive` ones. An empty request ends that.
        """
        for _ in range(MAX_TRIES):
            permits, wait = await self._request(
                state, "reserve", tokens, call_seconds, waits=waits, interactive=interactive
            )
            if wait.reason not in _LOST_REASONS:
                return permits, wait
            again = await self._recovery.recover(state, wait.reason)
            if again is None:
                return [], Wait(state.model, WaitReason.NO_TARGET, None)
            if again > 0:
                return [], Wait(state.model, WaitReason.REBUILDING, again)
        return [], Wait(state.model, WaitReason.REBUILDING, self._settings.retry_base_seconds)

    async def peek(self, state: ModelState) -> None:
        """Updates when a send of a batch call looks possible; reserves nothing."""
        again: float | None = self._settings.retry_cap_seconds
        with contextlib.suppress(LimiterUnavailable):
            _, wait = await self._request(state, "peek", (0,), None)
            if wait.reason not in _LOST_REASONS:
                return
            again = await self._recovery.recover(state, wait.reason)
        now = self._clock()
        state.available_at = None if again is None else now + again
        # After a recovery this is a guess, so the next call peeks again.
        state.available_known_at = NEVER if again == 0 else now

    async def _request(
        self, state: ModelState, verb: str, tokens: tuple[int, ...], call_seconds: float | None, *,
        waits: bool = False, interactive: bool = False,
    ) -> tuple[list[Permit], Wait]:  # fmt: skip
        settings = self._settings
        longest = settings.max_call_seconds if call_seconds is None else call_seconds
        sender = self._tracker.number if waits else 0.0
        sent_at = 0.0

        def packed() -> bytes:
            nonlocal sent_at
            sent_at = self._clock()
            bound = state.clock_bound(sent_at)
            return pack_reserve(
                state.generation, bound, state.head, state.version, -sender if interactive else sender,
                settings.look_ahead_seconds, longest, interactive, tokens,
            )  # fmt: skip

        for _ in range(MAX_STEPS):
            reply = await self._script.call_timed(state.key, verb, packed)
            received_at = self._clock()
            (status, generation, head, version, wait, reason, send_slack, redis_clock, failures, trips,
             unresolved, ahead) = unpack_decision(reply)  # fmt: skip
            if status != MORE:
                break
        if status and status != MORE:
            state.available_at = None
            lost = WaitReason.REBUILDING if status == LOST else WaitReason.NO_TARGET
            return [], Wait(state.model, lost, None)
        if generation != state.generation or version > state.version:
            self._tracker.observe(state, generation, version)
        if generation == state.generation and head > state.head:
            state.head = head
        state.observe_clock(redis_clock, sent_at, received_at)
        state.failures, state.trips, state.unresolved = failures, trips, unresolved
        again = None if wait < 0 else wait / MICRO
        state.observe_cooldown(again, reason, received_at)
        if not interactive:
            state.observe_wait(again, reason, received_at, ahead / MICRO)
        expires_at, generation_now = sent_at + send_slack / MICRO, int(generation)
        permits = [
            Permit(
                state.model, need, int(number), generation_now,
                received_at + offset / MICRO, expires_at + offset / MICRO, self._clock,
            )
            for (number, offset), need in zip(unpack_grants(reply), tokens, strict=False)
        ]  # fmt: skip
        return permits, Wait(state.model, _REASONS[int(reason)], again, ahead / MICRO)
