"""The pull loop of one model: wait until it may send, claim one task, send it at its moment, settle it.

Nothing waits for a batch: the loop claims the next task while calls are in flight, and how many are in flight
follows from the target and the latency.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Set as AbstractSet

from router.background import cancel_and_wait
from router.errors import DatabaseError, LimiterError, RouterError, SendingPaused
from router.limiter import Permit
from router.models import CallRequest, record_model_error, send_permitted
from router.task import CallResult, Claim, Outcome
from router.workers.assignment import PullOrder
from router.workers.engine import ROSTER_CHANGED, Engine

LONGEST_HOLD_SECONDS = 1.0  # a claimed task whose moment is farther off is given back
MOST_AHEAD = 64
TROUBLE_SECONDS = 0.5
LOOK_SECONDS = 5.0


class Worker:
    """One model's worker in one run. `await run()` returns why the run was over."""

    def __init__(self, engine: Engine, model: str, run: str, models: frozenset[str] = frozenset()) -> None:
        self._engine = engine
        self.model = model
        self._run = run
        self._models = models
        self._order = PullOrder(places={})
        self._ahead = asyncio.Semaphore(1)
        self._ahead_size = 1
        self._ahead_wanted = 1
        self._sent_at: deque[float] = deque(maxlen=MOST_AHEAD)
        self._failures = 0
        self._not_before = 0.0
        self._trouble: str | None = ""

    async def run(self) -> str:
        """Pull and solve until the run is over; calls in flight stay with the engine.

        Cancelled, it stops pulling at once; what it claimed but did not send is given back.
        """
        engine = self._engine
        first = engine.join(self._run, self._models)
        engine.take_over(self.model)
        if first:
            _pull_for(engine, self._models - {self.model})
        pulling = self.start_pulling()
        try:
            while (reason := engine.left(self._run)) is None:
                news = asyncio.get_running_loop().create_task(engine.woken(LOOK_SECONDS), name="router news")
                await asyncio.wait({pulling, news}, return_when=asyncio.FIRST_COMPLETED)
                news.cancel()
                if pulling.done():
                    pulling.result()
            if reason == ROSTER_CHANGED:
                self._hand_over(pulling)
            return reason
        finally:
            if not engine.handed_over(pulling):
                await cancel_and_wait(pulling)
            engine.part(self._run)

    def start_pulling(self) -> asyncio.Task[None]:
        """Begin the pull loop, which ends only by being cancelled."""
        name = f"router pull {self.model}"
        return asyncio.get_running_loop().create_task(self._pull_forever(), name=name)

    def _hand_over(self, pulling: asyncio.Task[None]) -> None:
        """Let the engine pull on, for this model and for new ones, until the next run's workers are there."""
        self._engine.hand_over(self.model, pulling)
        _pull_for(self._engine, self._engine.roster.models.keys() - self._models)

    async def _pull_forever(self) -> None:
        while True:
            try:
                await self._pull_one()
            except (DatabaseError, LimiterError):  # noqa: PERF203 - one round trip dwarfs it
                # Said by the engine's duties, which also renew a lost lease; here only tried again.
                await asyncio.sleep(TROUBLE_SECONDS)

    async def _pull_one(self) -> None:
        engine = self._engine
        roster_model = engine.roster.models.get(self.model)
        if roster_model is None or not engine.may_send() or time.monotonic() < self._not_before:
            await engine.woken(TROUBLE_SECONDS)
            return
        await self._ahead.acquire()
        claim: Claim | None = None
        try:
            await engine.limiter.wait_until_available(self.model)
            news = engine.news  # taken before the look, so that what comes during it is not missed
            if engine.may_send() and self.model in engine.roster.models:
                self._aim()
                categories = self._order.categories(engine.roster.categories)
                if categories:
                    claim = await engine.queue.claim(
                        self.model, categories, max_tokens=roster_model.max_tokens
                    )
        finally:
            if claim is None:
                self._one_less_ahead()
        if claim is None:
            await engine.woken(engine.config.worker.poll_seconds, news)
            return
        self._order.took(claim.category)
        call = self._solve(claim, roster_model.endpoint, roster_model.timeout_seconds)
        engine.spawn(call, claim.call_id)

    def _aim(self) -> None:
        engine = self._engine
        places = {c: p[self.model] for c, p in engine.roster.places.items() if self.model in p}
        self._order.aim(engine.shares.get(self.model, {}), places)
        self._order.bound(engine.bounds.get(self.model, {}), engine.solved_tasks)
        self._ahead_wanted = min(1 + self._sends_within_look_ahead(), MOST_AHEAD)
        while self._ahead_size < self._ahead_wanted:
            self._ahead.release()
            self._ahead_size += 1

    def _sends_within_look_ahead(self) -> int:
        """How many calls surely go out within the look-ahead: by the target, else as many as lately did.

        More would be held by a model that cannot send them, while another could; and held longer than a
        claim may be, where sends are seconds apart.
        """
        seconds = self._engine.config.worker.look_ahead_seconds
        target = self._engine.targets.get(self.model)
        if target is not None and target.gap_seconds and target.at_once is None and not target.tokens:
            return math.floor((target.requests_per_second() or 0.0) * seconds)
        since = time.monotonic() - seconds
        return sum(sent_at > since for sent_at in self._sent_at)

    def _one_less_ahead(self) -> None:
        if self._ahead_size > self._ahead_wanted:
            self._ahead_size -= 1
        else:
            self._ahead.release()

    async def _solve(self, claim: Claim, endpoint: str, timeout_seconds: float) -> None:
        engine = self._engine
        sent = False

        def going_out(permit: Permit) -> None:
            nonlocal sent
            engine.check_may_send()
            permit.check()
            sent = True
            self._sent_at.append(time.monotonic())
            self._one_less_ahead()

        room = self._room_for_tokens()
        if room is not None and claim.reserved_tokens > room:
            self._one_less_ahead()
            why = f"the call reserves {claim.reserved_tokens} tokens, and the model's target allows {room}"
            await engine.queue.reject(claim, why)
            self._not_before = time.monotonic() + TROUBLE_SECONDS  # no send paces this
            return
        try:
            order = CallRequest(
                claim.call_id, self.model, endpoint, claim.prompt, claim.max_tokens, claim.reserved_tokens,
                timeout_seconds,
            )  # fmt: skip
            done = await send_permitted(
                engine.limiter, engine.backend, order,
                permit_seconds=LONGEST_HOLD_SECONDS, going_out=going_out,
            )  # fmt: skip
        except (SendingPaused, LimiterError, asyncio.TimeoutError):
            done = None
        except RouterError as error:  # will not heal: without a counted attempt it would come for ever
            done = CallResult(Outcome.REJECTED, error=str(error))
        except asyncio.CancelledError:
            if not sent:
                await asyncio.shield(engine.queue.unclaim(claim.call_id))
            raise
        finally:
            if not sent:
                self._one_less_ahead()
        if done is None:
            await engine.queue.unclaim(claim.call_id)
            return
        await self._settle(claim, done)

    def _room_for_tokens(self) -> int | None:
        target = self._engine.targets.get(self.model)
        return min((limit.count for limit in target.tokens), default=None) if target else None

    async def _settle(self, claim: Claim, result: CallResult) -> None:
        queue = self._engine.queue
        if result.outcome is Outcome.UNSENT:
            self._hold_off()
            await queue.unclaim(claim.call_id)
            return
        self._failures = 0
        await self._tell_trouble(result)
        try:
            await queue.settle(claim, result)
        except DatabaseError as error:
            await queue.settle(
                claim, CallResult(Outcome.ERROR, error=f"the answer could not be stored: {error}")
            )
        if result.outcome is Outcome.ANSWERED:
            self._engine.solved += 1
        else:
            self._engine.failed_calls += 1

    def _hold_off(self) -> None:
        # Nothing got out: the backend is away, which is no task's fault and no reason to ask faster.
        self._failures += 1
        self._not_before = time.monotonic() + min(5.0, 0.25 * 2 ** min(self._failures, 10))

    async def _tell_trouble(self, result: CallResult) -> None:
        trouble = (
            None if result.outcome is Outcome.ANSWERED else f"{result.outcome.value}: {result.error or ''}"
        )
        if trouble == self._trouble:
            return
        self._trouble = trouble
        with contextlib.suppress(DatabaseError):
            await record_model_error(self._engine.pool, self.model, trouble)


async def wait_for_work(engine: Engine) -> None:
    """Return as soon as there is an unsolved task; the engine then pulls until workers are there."""
    with engine.attended():
        while True:
            news = engine.news  # taken before the look, so that what comes during it is not missed
            with contextlib.suppress(DatabaseError):  # said by the engine's duties
                if sum((await engine.queue.state([])).unsolved.values()) > 0:
                    break
            await engine.woken(engine.config.worker.poll_seconds, news)
        _pull_for(engine, engine.roster.models.keys())


def _pull_for(engine: Engine, models: AbstractSet[str]) -> None:
    """Let the engine pull for models whose workers are on their way: Airflow starts them one by one."""
    for model in models:
        if not engine.hands_over(model):
            engine.hand_over(model, Worker(engine, model, run="").start_pulling())
