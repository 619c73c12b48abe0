"""Standing in line inside one process: waiters in order, one of them asking for all. Knows nothing of Redis.

A line's runner asks for as many permits as the line can use, in order.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable

from router.background import Broadcast, resolve_future
from router.errors import LimiterError, LimiterUnavailable, PermitExpired
from router.limiter.permit import Permit, Wait, WaitReason
from router.limiter.settings import LimiterSettings

Ask = Callable[[list[int]], Awaitable[tuple[list[Permit], Wait]]]
GiveBack = Callable[[Permit], "asyncio.Task[None]"]

_TIMED = frozenset({WaitReason.WINDOW, WaitReason.COOLING_DOWN})
SAME_MOMENT_SECONDS = 0.005  # replies of two questions differ by so much in what they call the same moment
ONE_AFTER_ANOTHER_SECONDS = 1e-6
FEWEST_IN_ONE_ASK = 8
MOST_DEATHS = 100  # a process that misses so many moments in a row is not able to send at all


class _Waiter:
    __slots__ = ("future", "ticket", "tokens")

    def __init__(self, ticket: int, tokens: int) -> None:
        self.ticket = ticket
        self.tokens = tokens
        self.future: asyncio.Future[Permit] = asyncio.get_running_loop().create_future()


class WaitQueue:
    """The waiters of one model in this process, first come first served."""

    def __init__(self, model: str, ask: Ask, give_back: GiveBack, settings: LimiterSettings) -> None:
        self.bell = Broadcast()
        self.waiting_for = WaitReason.NOTHING
        self.replies = 0
        self._model = model
        self._ask = ask
        self._give_back = give_back
        self._settings = settings
        self._waiters: deque[_Waiter] = deque()
        self._asked: list[_Waiter] = []
        self._runner: asyncio.Task[None] | None = None
        self.pokes = 0
        self._ask_at = 0.0
        self._tickets = 0
        self._most_at_once = settings.most_in_one_ask
        self._died = False
        self._left_at = 0.0
        self._asleep = 0
        self._clock_ahead: float | None = None

    @property
    def waiting(self) -> int:
        """How many stand in line."""
        return sum(not waiter.future.done() for waiter in (*self._asked, *self._waiters))

    async def stand(self, tokens: int) -> Permit:
        """Wait for a permit and its moment; a permit that died on the way goes back, and another is asked."""
        ticket = self._tickets = self._tickets + 1
        for deaths in range(MOST_DEATHS):
            waiter = _Waiter(ticket, tokens)
            if deaths == 0:
                self._waiters.append(waiter)
            else:
                self._insert(waiter)
            permit = await self._permit_of(waiter)
            if not permit.dead:
                return permit
            self._died = True
            # Asked for before it is back, the next would keep its distance from one that was never used.
            await asyncio.shield(self._give_back(permit))
        raise PermitExpired(
            f"{MOST_DEATHS} permits of {self._model} died unused: this process is too slow to send."
        )

    def _insert(self, waiter: _Waiter) -> None:
        before = 0
        while before < len(self._waiters) and self._waiters[before].ticket < waiter.ticket:
            before += 1
        self._waiters.insert(before, waiter)

    async def close(self) -> None:
        """End the runner; whoever still waits gets LimiterUnavailable."""
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)
        for waiter in (*self._asked, *self._waiters):
            if not waiter.future.done():
                waiter.future.set_exception(
                    LimiterUnavailable(f"The limiter closed while {self._model} waited.")
                )
        self._waiters.clear()

    async def _permit_of(self, waiter: _Waiter) -> Permit:
        self._run()
        try:
            permit = await waiter.future
            await self._until_moment(permit)
        except asyncio.CancelledError:
            if waiter.future.done() and not waiter.future.cancelled() and not waiter.future.exception():
                self._give_back(waiter.future.result())
            raise
        return permit

    async def _until_moment(self, permit: Permit) -> None:
        """Sleep until the moment; those of (almost) the same moment leave in the order of the line."""
        earlier, self._left_at = self._left_at, permit.send_at
        if 0 <= earlier - permit.send_at < SAME_MOMENT_SECONDS:
            self._left_at = earlier + ONE_AFTER_ANOTHER_SECONDS  # equal timers fire in any order
        if self._asleep or self._left_at > time.monotonic():  # whoever sleeps may be due, and stands before
            await self._sleep_until(self._left_at)

    async def _sleep_until(self, at: float) -> None:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        if self._clock_ahead is None:  # once: two readings a timer would put timers out of order
            self._clock_ahead = max(0.0, loop.time() - time.monotonic())
        timer = loop.call_at(at + self._clock_ahead, resolve_future, future)
        self._asleep += 1
        try:
            await future
        finally:
            self._asleep -= 1
            timer.cancel()

    def _run(self) -> None:
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._serve(), name=f"line of {self._model}")

    def poke(self) -> None:
        """Something changed: whatever was known about when to ask no longer holds."""
        self.pokes += 1
        self._ask_at = 0.0
        self.bell.notify_all()

    async def _serve(self) -> None:
        failures = 0
        while self._take():
            early = self._ask_at - time.monotonic()
            if early > 0:
                self._put_back(self._asked)
                await self.bell.wait(early)
                continue
            pokes = self.pokes
            try:
                permits, wait = await self._ask([waiter.tokens for waiter in self._asked])
            except LimiterUnavailable:
                failures += 1
                self._put_back(self._asked)
                await self.bell.wait(self._backoff(failures))
                continue
            except Exception as error:  # noqa: BLE001 - whatever it is, those in line must hear of it
                self._fail_all(error)
                return
            failures = 0
            denied = self._hand_out(permits, wait)
            if pokes == self.pokes:
                self._ask_at = time.monotonic() + self._pause(wait, denied=denied)

    def _take(self) -> bool:
        """Move those who will be asked for out of the line; False if nobody is left."""
        self._asked = []
        self._fit_to_pace()
        while self._waiters and len(self._asked) < self._most_at_once:
            waiter = self._waiters.popleft()
            if not waiter.future.done():
                self._asked.append(waiter)
        return bool(self._asked)

    def _fit_to_pace(self) -> None:
        """Ask for no more at a time than this process wakes before they die."""
        if self._died:
            self._most_at_once, self._died = max(FEWEST_IN_ONE_ASK, self._most_at_once // 2), False
        else:
            self._most_at_once = min(self._settings.most_in_one_ask, self._most_at_once + 1)

    def _hand_out(self, permits: list[Permit], wait: Wait) -> bool:
        """Give the permits out in order; True if somebody asked in vain."""
        asked, self._asked = self._asked, []
        for waiter, permit in zip(asked, permits, strict=False):
            if waiter.future.done():
                self._give_back(permit)
            else:
                waiter.future.set_result(permit)
        left = asked[len(permits) :]
        self.replies += 1
        if wait.reason is not self.waiting_for:
            self.waiting_for = wait.reason
            self.bell.notify_all()
        if left and self.waiting_for is WaitReason.TOO_MANY_TOKENS:
            self._refuse(left.pop(0))
        self._put_back(left)
        return bool(left)

    def _put_back(self, waiters: list[_Waiter]) -> None:
        self._waiters.extendleft(reversed(waiters))
        self._asked = []

    def _refuse(self, waiter: _Waiter) -> None:
        if not waiter.future.done():
            what = f"{waiter.tokens} tokens are more than a whole window of {self._model} allows"
            waiter.future.set_exception(
                LimiterError(f"{what}: send a smaller call, or raise its traffic target.")
            )

    def _pause(self, wait: Wait, *, denied: bool) -> float:
        """Seconds in which asking is pointless: until half the look-ahead before the next moment."""
        net = self._settings.ask_again_seconds
        if wait.reason in _TIMED:
            ahead = self._settings.look_ahead_seconds / 2  # not the whole: one ask is to bring several
            return min(net, max(0.0, (wait.again_seconds or 0.0) - ahead))
        if (
            not denied or wait.reason is WaitReason.TOO_MANY_TOKENS
        ):  # Redis rings only for those whom it refused
            return 0.0
        return net if wait.again_seconds is None else min(net, wait.again_seconds)

    def _backoff(self, failures: int) -> float:
        longest = min(
            self._settings.retry_cap_seconds, self._settings.retry_base_seconds * 2 ** min(failures, 10)
        )
        return float(longest * random.uniform(0.5, 1.0))

    def _fail_all(self, error: Exception) -> None:
        waiting = [*self._asked, *self._waiters]
        self._waiters.clear()
        for waiter in waiting:
            if not waiter.future.done():
                waiter.future.set_exception(error)
