"""Requests permits from the script, and restores lost state on the way."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from router.errors import LimiterUnavailable
from router.limiter.codec import (
    LOST,
    MICRO,
    MORE,
    Needs,
    pack_reserve,
    unpack_client_grants,
    unpack_decision,
    unpack_grants,
)
from router.limiter.permit import ClientSend, Permit, Wait, WaitReason
from router.limiter.recovery import Recovery
from router.limiter.script import Requests
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
        self, state: ModelState, needs: Needs, call_seconds: float | None, *, interactive: bool = False,
        client: ModelState | None = None,
    ) -> Permit | Wait:  # fmt: skip
        """Returns a permit, or why there is none."""
        permits, wait = await self._request(
            state, "reserve", needs, call_seconds, interactive=interactive, client=client
        )
        if not permits and wait.reason in _LOST_REASONS:
            permits, wait = await self.reserve_many(
                state, needs, call_seconds, interactive=interactive, client=client
            )
        return permits[0] if permits else wait

    async def reserve_many(
        self, state: ModelState, needs: Needs, call_seconds: float | None = None, *,
        waits: bool = False, interactive: bool = False, client: ModelState | None = None,
    ) -> tuple[list[Permit], Wait]:  # fmt: skip
        """Returns as many permits as there are for these needs, in order, and the wait of the next one.

        If the caller `waits` for those that it did not get, the script keeps tokens and money free for the
        first of them: later requests of other processes do not overtake it, and batch calls do not overtake
        `interactive` ones. An empty request ends that. `client` is the state of a client with limits; all
        calls of a request are of one client.
        """
        for _ in range(MAX_TRIES):
            permits, wait = await self._request(
                state, "reserve", needs, call_seconds, waits=waits, interactive=interactive, client=client
            )
            if permits or wait.reason not in _LOST_REASONS:
                return permits, wait
            lost = state if wait.client is None or client is None else client
            again = await self._recovery.recover(lost, wait.reason)
            if again is None:
                return [], replace(wait, reason=WaitReason.NO_TARGET)
            if again > 0:
                return [], replace(wait, reason=WaitReason.REBUILDING, again_seconds=again)
        return [], Wait(state.model, WaitReason.REBUILDING, self._settings.retry_base_seconds)

    async def peek(self, state: ModelState) -> None:
        """Updates when a send of a batch call looks possible; reserves nothing."""
        again: float | None = self._settings.retry_cap_seconds
        with contextlib.suppress(LimiterUnavailable):
            _, wait = await self._request(state, "peek", (0, 0), None)
            if wait.reason not in _LOST_REASONS:
                return
            again = await self._recovery.recover(state, wait.reason)
        now = self._clock()
        state.available_at = None if again is None else now + again
        # After a recovery this is a guess, so the next call peeks again.
        state.available_known_at = NEVER if again == 0 else now

    async def _request(
        self, state: ModelState, verb: str, needs: Needs, call_seconds: float | None, *,
        waits: bool = False, interactive: bool = False, client: ModelState | None = None,
    ) -> tuple[list[Permit], Wait]:  # fmt: skip
        settings = self._settings
        longest = settings.max_call_seconds if call_seconds is None else call_seconds
        sender = self._tracker.number if waits else 0.0
        sent_at = 0.0

        def packed() -> Requests:
            nonlocal sent_at
            sent_at = self._clock()
            bound = state.clock_bound(sent_at)
            request = pack_reserve(
                state.generation, bound, state.head, state.version, -sender if interactive else sender,
                settings.look_ahead_seconds, longest, interactive, needs,
            )  # fmt: skip
            if client is None:
                return (request,)
            return request, pack_reserve(
                client.generation, client.clock_bound(sent_at), client.head, client.version, 0.0,
                settings.look_ahead_seconds, longest, 0.0, (),
            )  # fmt: skip

        second_key = None if client is None else client.key
        for _ in range(MAX_STEPS):
            reply = await self._script.call_timed(state.key, verb, packed, second_key)
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
        if not interactive and reason != WaitReason.CLIENT:
            state.observe_wait(again, reason, received_at, ahead / MICRO)
        expires_at, generation_now = sent_at + send_slack / MICRO, int(generation)
        if client is not None:
            return self._of_client(state, client, reply, needs, (sent_at, received_at))
        permits = [
            Permit(
                state.model, tokens, cost, int(number), generation_now,
                received_at + offset / MICRO, expires_at + offset / MICRO, self._clock,
            )
            for (number, offset), tokens, cost in zip(
                unpack_grants(reply), needs[::2], needs[1::2], strict=False
            )
        ]  # fmt: skip
        return permits, Wait(state.model, _REASONS[int(reason)], again, ahead / MICRO)

    def _of_client(
        self, state: ModelState, client: ModelState, reply: bytes, needs: Needs, times: tuple[float, float]
    ) -> tuple[list[Permit], Wait]:
        """Returns the permits of a request with a client, each of which expires with the shorter slack."""
        _, generation, _, _, wait, reason, slack, *_, ahead = unpack_decision(reply)
        grants, own = unpack_client_grants(reply)
        denied = Wait(state.model, _REASONS[int(reason)], None if wait < 0 else wait / MICRO, ahead / MICRO)
        if own:
            denied_by_client, client_slack, client_generation = self._observe_client(client, own, times)
            slack = min(slack, client_slack)
            if reason == WaitReason.CLIENT:
                denied = denied_by_client
        sent_at, received_at = times
        permits = [
            Permit(
                state.model, tokens, cost, int(number), int(generation), received_at + offset / MICRO,
                sent_at + (slack + offset) / MICRO, self._clock,
                client_send=ClientSend(client.key, client_generation, int(number_of_client)),
            )
            for (number, offset, number_of_client), tokens, cost in zip(
                grants, needs[::2], needs[1::2], strict=False
            )
        ]  # fmt: skip
        return permits, denied

    def _observe_client(
        self, client: ModelState, reply: bytes, times: tuple[float, float]
    ) -> tuple[Wait, float, int]:
        """Records the client's part of a reply; returns its wait, send slack and generation."""
        (status, generation, head, version, wait, reason, slack, redis_clock, _, _,
         unresolved, _) = unpack_decision(reply)  # fmt: skip
        name = client.client
        if status and status != MORE:
            lost = WaitReason.REBUILDING if status == LOST else WaitReason.NO_TARGET
            return Wait(client.model, lost, None, client=name), slack, 0
        if generation != client.generation or version > client.version:
            self._tracker.observe(client, generation, version)
        client.head = max(client.head, head) if generation == client.generation else client.head
        client.observe_clock(redis_clock, *times)
        client.unresolved = unresolved
        again = None if wait < 0 else wait / MICRO
        return Wait(client.model, _REASONS[int(reason)], again, client=name), slack, int(generation)
