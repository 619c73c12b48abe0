"""Wait queue of one model in one process: FIFO, with one request for all that wait.

Interactive and batch calls have a queue each; the script decides between the two as between two processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from collections import deque
from typing import NamedTuple

from router.background import resolve_future
from router.errors import ClientLimited, LimiterError, LimiterUnavailable, PermitExpired
from router.limiter.codec import pack_end
from router.limiter.notifications import Notifications
from router.limiter.permit import NEVER_FITS, UNAVAILABLE_REASONS, Permit, Wait, WaitReason
from router.limiter.releases import Releases
from router.limiter.reservations import Reservations
from router.limiter.state import ModelState
from router.limiter.tracker import ModelTracker
from router.traffic import usd_text

SAME_TIME_SECONDS = 0.005  # two replies differ by up to this in what they call the same send time
ONE_AFTER_ANOTHER_SECONDS = 1e-6
MIN_BATCH = 8
MAX_EXPIRED = 100  # a process that misses this many send times in a row cannot send at all
_TURNS = frozenset({WaitReason.TOKENS, WaitReason.BUDGET})
_TIMED = frozenset({WaitReason.WINDOW, WaitReason.COOLING_DOWN})


class WaitingCall(NamedTuple):
    """A call that waits: its needs, `call_id` in the call log, the state of a client with limits.

    From `until` on (the limiter's clock) its client's limits need not be waited for.
    """

    tokens: int
    cost: int = 0
    call_id: uuid.UUID | None = None
    client: ModelState | None = None
    until: float = float("inf")


class _Parked(NamedTuple):
    """Waiters of a client whose limits are used up, until `check_at` or a change of its state."""

    waiters: list[_Waiter]
    wait: Wait
    again_at: float
    check_at: float
    changes: int


class _Waiter:
    __slots__ = ("call", "future", "ticket", "unsent_in")

    def __init__(self, ticket: int, call: WaitingCall) -> None:
        self.ticket = ticket
        self.call = call
        self.unsent_in: dict[str, float] = {}  # by key: generation in which the call was reported as unsent
        self.future: asyncio.Future[Permit] = asyncio.get_running_loop().create_future()


class WaitQueue:
    """Waiters of one model, first in first out. One task requests permits for as many as it can."""

    def __init__(
        self,
        state: ModelState,
        tracker: ModelTracker,
        reservations: Reservations,
        releases: Releases,
        notifications: Notifications,
        *,
        interactive: bool,
    ) -> None:
        self._interactive = interactive
        self._state = state
        self._tracker = tracker
        self._settings, self._clock = tracker.settings, tracker.clock
        self._reservations = reservations
        self._releases = releases
        self._notifications = notifications
        self._waiters: deque[_Waiter] = deque()
        self._requested: list[_Waiter] = []  # those that the request in flight is for
        self._parked: dict[ModelState, _Parked] = {}  # by client
        self._all_parked = False
        self._runner: asyncio.Task[None] | None = None
        self._replies = 0
        self._paused_until = 0.0  # void once the model changed
        self._paused_at_change = -1
        self._tickets = 0
        self._max_batch = self._settings.max_permits_per_request
        self._some_expired = False
        self._has_turn = False  # the script keeps tokens, or the next send, for the first waiter
        self._left_at = float("-inf")
        self._sleeping = 0
        self._loop_offset: float | None = None

    def __len__(self) -> int:
        return sum(not waiter.future.done() for waiter in self._all())

    def _all(self) -> list[_Waiter]:
        parked = [waiter for one in self._parked.values() for waiter in one.waiters]
        return [*self._requested, *self._waiters, *parked]

    async def wait(self, call: WaitingCall) -> Permit:
        """Waits for a permit and its send time. A permit that expires meanwhile is replaced by another."""
        ticket = self._tickets = self._tickets + 1
        for expired in range(MAX_EXPIRED):
            waiter = _Waiter(ticket, call)
            if expired == 0:
                self._waiters.append(waiter)
            else:
                self._insert(waiter)
            permit = await self._permit_of(waiter)
            if not permit.expired:
                return permit
            self._some_expired = True
            # Returned before the next request: else the next send would keep its distance from this one.
            await asyncio.shield(self._releases.cancel_later(permit))
        raise PermitExpired(
            f"{MAX_EXPIRED} permits of {self._state.model} expired unused: this process is too slow to send."
        )

    async def wait_until_unavailable(self) -> None:
        """Returns once a new reply to the waiters reports a cool-down or a half-open breaker."""
        replies = self._replies
        while self._replies == replies or self._reason() not in UNAVAILABLE_REASONS:
            await self._state.broadcast.wait(self._settings.hint_seconds)

    async def close(self) -> None:
        """Ends the queue: waiters get LimiterUnavailable."""
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)
        self._fail_all(LimiterUnavailable(f"The limiter closed while {self._state.model} waited."))

    # -- one waiter ---------------------------------------------------------------------------------------

    def _insert(self, waiter: _Waiter) -> None:
        before = 0
        while before < len(self._waiters) and self._waiters[before].ticket < waiter.ticket:
            before += 1
        self._waiters.insert(before, waiter)

    async def _permit_of(self, waiter: _Waiter) -> Permit:
        if self._all_parked:
            self._state.broadcast.notify_all()
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run(), name=f"wait queue of {self._state.model}")
        try:
            permit = await waiter.future
            permit.call_id = waiter.call.call_id
            await self._sleep_until_send(permit)
        except asyncio.CancelledError:
            if waiter.future.done() and not waiter.future.cancelled() and not waiter.future.exception():
                self._releases.cancel_later(waiter.future.result())
            elif self._has_turn:  # the tokens kept for it may be free for others now
                self._paused_until = 0.0
                self._state.broadcast.notify_all()
            raise
        return permit

    async def _sleep_until_send(self, permit: Permit) -> None:
        """Sleeps until the send time; permits of (almost) the same send time leave in FIFO order."""
        earlier, self._left_at = self._left_at, permit.send_at
        if 0 <= earlier - permit.send_at < SAME_TIME_SECONDS:
            self._left_at = earlier + ONE_AFTER_ANOTHER_SECONDS  # equal timers fire in any order
        if self._sleeping or self._left_at > self._clock():  # a sleeper may be due, and goes first
            await self._sleep_until(self._left_at)

    async def _sleep_until(self, at: float) -> None:
        loop = asyncio.get_running_loop()
        if self._loop_offset is None:  # once: an offset per timer would put timers out of order
            now = self._clock()
            self._loop_offset = loop.time() - now
        self._sleeping += 1
        try:
            while True:
                future: asyncio.Future[None] = loop.create_future()
                timer = loop.call_at(at + self._loop_offset, resolve_future, future)
                try:
                    await future
                finally:
                    timer.cancel()
                if self._clock() >= at:  # timers of some event loops fire early
                    return
        finally:
            self._sleeping -= 1

    # -- requests for all ---------------------------------------------------------------------------------

    async def _run(self) -> None:
        state, failures = self._state, 0
        while self._take() or self._parked:
            if not self._requested:
                check_at = min(parked.check_at for parked in self._parked.values())
                self._all_parked = True
                await state.broadcast.wait(max(0.0, check_at - self._clock()))
                self._all_parked = False
                continue
            pause = self._paused_until - self._clock()
            if pause > 0 and self._paused_at_change == state.changes:
                self._put_back(self._requested)
                await state.broadcast.wait(pause)
                continue
            changes, client = state.changes, self._requested[0].call.client
            client_changes = 0 if client is None else client.changes
            try:
                await self._notifications.listen()
                await self._report_unsent()
                needs = tuple(need for waiter in self._requested for need in waiter.call[:2])
                permits, wait = await self._reservations.reserve_many(
                    state, needs, waits=True, interactive=self._interactive,
                    client=client,
                )  # fmt: skip
            except LimiterUnavailable:
                failures += 1
                self._wait_for(WaitReason.UNAVAILABLE)
                self._put_back(self._requested)
                await state.broadcast.wait(self._backoff(failures))
                continue
            except Exception as error:  # noqa: BLE001 - it is raised by `wait`
                self._fail_all(error)
                return
            failures = 0
            denied = self._hand_out(permits, wait, client_changes)
            if wait.client is not None:  # others may go on
                continue
            self._has_turn = denied and (self._interactive or wait.reason in _TURNS)
            pause = 0.0 if self._unreported(state) else self._pause(wait, denied=denied)
            self._paused_until = self._clock() + pause
            self._paused_at_change = changes
        if self._has_turn:
            self._has_turn = False
            self._tracker.tasks.start(self._leave_turn(), f"end of the turn for {state.model}")

    async def _leave_turn(self) -> None:
        with contextlib.suppress(LimiterUnavailable):
            await self._reservations.reserve_many(self._state, (), waits=True, interactive=self._interactive)

    def _unreported(self, state: ModelState) -> list[_Waiter]:
        """Returns the waiters that the rebuilt log of this model or client may count as sent."""
        if not state.unresolved:
            return []
        return [
            one
            for one in self._all()
            if one.call.call_id
            and one.unsent_in.get(state.key) != state.generation
            and (state.client is None or one.call.client is state)
        ]

    async def _report_unsent(self) -> None:
        clients = {one.call.client for one in self._requested}
        for state in (self._state, *(client for client in clients if client is not None)):
            waiters, generation = self._unreported(state), state.generation
            items = [pack_end(one.call.call_id, 0, 0, unused=True) for one in waiters if one.call.call_id]
            if items:
                await self._releases.send(state, items)
            for one in waiters:
                one.unsent_in[state.key] = generation

    def _take(self) -> bool:
        """Takes the waiters of the next request, all of one client, out of the queue; False without any."""
        self._requested = []
        self._adapt_batch()
        self._unpark()
        while self._waiters and len(self._requested) < self._max_batch:
            waiter = self._waiters.popleft()
            client = waiter.call.client
            if waiter.future.done():
                continue
            if client is not None and client in self._parked:
                self._park_one(waiter, self._parked[client])
            elif self._requested and client is not self._requested[0].call.client:
                self._waiters.appendleft(waiter)
                break
            else:
                self._requested.append(waiter)
        return bool(self._requested)

    def _park(self, client: ModelState, waiters: list[_Waiter], wait: Wait, changes: int) -> None:
        """Sets waiters aside until the client's limits may have room: calls of others go on."""
        now, poll = self._clock(), self._settings.fallback_poll_seconds
        again = float("inf") if wait.again_seconds is None else wait.again_seconds
        if client.unresolved:  # calls that were never sent may still count, until that is known
            again = min(again, poll)
        parked = _Parked([], wait, now + again, now + min(poll, again), changes)
        self._parked[client] = parked
        client.followers.add(self._state)
        for waiter in waiters:
            self._park_one(waiter, parked)

    def _park_one(self, waiter: _Waiter, parked: _Parked) -> None:
        if waiter.call.until >= parked.again_at:
            parked.waiters.append(waiter)
        elif not waiter.future.done():
            wait, name = parked.wait, parked.wait.client or ""
            what = f"No permit for {wait.model} in time: {wait.reason.text}"
            again = parked.again_at - self._clock()
            error = ClientLimited(f"{what}. Retry later.", name, again if again < float("inf") else None)
            waiter.future.set_exception(error)

    def _unpark(self) -> None:
        """Puts waiters back in order whose client's limits may have room."""
        for client, parked in [*self._parked.items()]:
            if parked.check_at <= self._clock() or parked.changes != client.changes:
                del self._parked[client]
                together = [*parked.waiters, *self._waiters]
                self._waiters = deque(sorted(together, key=lambda waiter: waiter.ticket))

    def _adapt_batch(self) -> None:
        """Fits the batch to what this process can wake before permits expire."""
        if self._some_expired:
            self._max_batch, self._some_expired = max(MIN_BATCH, self._max_batch // 2), False
        else:
            self._max_batch = min(self._settings.max_permits_per_request, self._max_batch + 1)

    def _hand_out(self, permits: list[Permit], wait: Wait, client_changes: int) -> bool:
        """Gives the permits to the waiters in order; True if some waiter was denied."""
        requested, self._requested = self._requested, []
        for waiter, permit in zip(requested, permits, strict=False):
            if waiter.future.done():
                self._releases.cancel_later(permit)
            else:
                waiter.future.set_result(permit)
        denied = requested[len(permits) :]
        self._replies += 1
        client = requested[0].call.client
        limited = wait.client is not None
        if not limited:
            self._wait_for(wait.reason)
        if denied and wait.reason in NEVER_FITS:
            self._reject(denied.pop(0), wait)
            self._put_back(denied)
        elif denied and limited and client is not None:
            self._park(client, denied, wait, client_changes)
        else:
            self._put_back(denied)
        return bool(denied)

    def _reason(self) -> WaitReason:
        return self._state.waiting_for.get(self._interactive, WaitReason.NOTHING)

    def _wait_for(self, reason: WaitReason) -> None:
        if reason is not self._reason():
            self._state.waiting_for[self._interactive] = reason
            self._state.broadcast.notify_all()

    def _put_back(self, waiters: list[_Waiter]) -> None:
        self._waiters.extendleft(reversed(waiters))
        self._requested = []

    def _reject(self, waiter: _Waiter, wait: Wait) -> None:
        if not waiter.future.done():
            what = f"{waiter.call.tokens} tokens are more than a whole window of {wait.model} allows"
            if wait.reason is WaitReason.TOO_EXPENSIVE:
                what = f"A call that may cost {usd_text(waiter.call.cost)} exceeds a budget of {wait.model}"
            waiter.future.set_exception(LimiterError(f"{what}: send a smaller call, or raise its limit."))

    def _pause(self, wait: Wait, *, denied: bool) -> float:
        """Returns the seconds in which a request is pointless: until shortly before a send."""
        poll = self._settings.fallback_poll_seconds
        if wait.reason in _TIMED:
            # Not the whole look-ahead: one request is to bring several. Interactive ones come earlier.
            ahead = wait.ahead_seconds * (0.8 if self._interactive else 0.5)
            return min(poll, max(0.0, (wait.again_seconds or 0.0) - ahead))
        if not denied or wait.reason in NEVER_FITS:  # Redis notifies only about denied requests
            return 0.0
        return poll if wait.again_seconds is None else min(poll, wait.again_seconds)

    def _backoff(self, failures: int) -> float:
        settings = self._settings
        longest = min(settings.retry_cap_seconds, settings.retry_base_seconds * 2 ** min(failures, 10))
        return float(longest * random.uniform(0.5, 1.0))

    def _fail_all(self, error: Exception) -> None:
        waiting = self._all()
        self._requested = []
        self._waiters.clear()
        self._parked.clear()
        for waiter in waiting:
            if not waiter.future.done():
                waiter.future.set_exception(error)
