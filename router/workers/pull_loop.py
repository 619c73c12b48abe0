"""Pull loop of one model: wait for a permit, claim one task, send it, settle it.

There is no batch barrier: the loop claims the next task while calls are in flight. Target and latency
determine how many are in flight.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections import deque
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from router.errors import ClientLimited, LimiterError, RouterError, SendingPaused, first_line
from router.limiter import Permit, TrafficLimiter
from router.models import (
    CallRequest,
    ModelsBackend,
    Roster,
    RosterModel,
    capable_models,
    context_limits,
    request_for,
    send_permitted,
)
from router.queue import TaskQueue
from router.request import RequestError
from router.settings import RouterConfig
from router.status import Reason
from router.task import CallResult, Claim, ContextLimit, Outcome
from router.traffic import TrafficTarget
from router.workers.assignment import PullOrder
from router.workers.standstill import StandstillReports, reason_of

log = logging.getLogger("router.workers.pull_loop")

MAX_HOLD_SECONDS = 1.0  # a claimed task that cannot be sent within it is requeued
MAX_AHEAD = 64
PAUSE_SECONDS = 0.5  # after an error, and while nothing may be sent
MAX_BACKOFF_SECONDS = 5.0
CLIENT_SECONDS = (
    30.0  # a client whose limit is used up is tried again, as its calls may cost less than reserved
)


@dataclass(frozen=True, slots=True)
class PullPlan:
    """Targets and assignment, computed every second for all models.

    shares: model -> category -> share of its calls. bounds: model -> category -> maximum share of the tasks.
    contexts: model -> tokens that it takes. solved: category -> tasks solved so far, read while there are
    bounds.
    """

    targets: Mapping[str, TrafficTarget] = field(default_factory=dict)
    shares: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    bounds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    contexts: Mapping[str, ContextLimit] = field(default_factory=dict)
    solved: Mapping[str, int] = field(default_factory=dict)


class PullHost(Protocol):
    """The part of `Engine` that a pull loop uses."""

    queue: TaskQueue
    limiter: TrafficLimiter
    backend: ModelsBackend
    reports: StandstillReports
    roster: Roster
    config: RouterConfig
    plan: PullPlan
    poll_seconds: float
    look_ahead_seconds: float
    limited_clients: dict[str, float]

    @property
    def wakeup(self) -> asyncio.Event: ...
    async def wait_for_wakeup(self, seconds: float, wakeup: asyncio.Event | None = None) -> None: ...
    def may_send(self) -> bool: ...
    def check_may_send(self) -> None: ...
    def spawn(self, call: Coroutine[Any, Any, None], call_id: uuid.UUID) -> None: ...
    async def record_error(self, model: str, result: CallResult) -> None: ...
    def count(self, result: CallResult) -> None: ...


class PullLoop:
    """Claims, sends and settles tasks with one model until its task is canceled."""

    def __init__(self, host: PullHost, model: str) -> None:
        self._host = host
        self._model = model
        self._order = PullOrder(places={})
        self._ahead = asyncio.Semaphore(1)
        self._ahead_size = 1
        self._ahead_wanted = 1
        self._sent_at: deque[float] = deque(maxlen=MAX_AHEAD)
        self._failures = 0
        self._not_before = 0.0
        self._unexpected: str | None = None  # the error that is logged and not over

    def start(self) -> asyncio.Task[None]:
        """Starts the loop in a task. Canceling it requeues what was claimed but not sent."""
        return asyncio.create_task(self._run(), name=f"router pull {self._model}")

    async def _run(self) -> None:
        self._host.reports.loop_began(self._model)
        try:
            while True:
                try:
                    await self._pull_one()
                    self._unexpected = None
                except Exception as error:  # noqa: BLE001, PERF203 - no error ends the loop
                    # The engine's periodic jobs renew a lost lease.
                    self._report(error)
                    await asyncio.sleep(PAUSE_SECONDS)
        finally:
            self._host.reports.loop_ended(self._model)

    async def _pull_one(self) -> None:
        host = self._host
        roster_model = host.roster.models.get(self._model)
        if roster_model is None or not host.may_send() or time.monotonic() < self._not_before:
            await host.wait_for_wakeup(PAUSE_SECONDS)
            return
        await self._ahead.acquire()
        claim: Claim | None = None
        try:
            await host.limiter.wait_until_available(self._model)
            self._clear(Reason.REDIS_UNAVAILABLE, Reason.REDIS_READ_ONLY)
            wakeup = host.wakeup  # taken before the claim, so that a wake-up during it is not missed
            if host.may_send() and self._model in host.roster.models:
                claim = await self._claim(roster_model)
                self._clear(Reason.CLAIMS_FAILING)
        finally:
            if claim is None:
                self._release_ahead()
        if claim is None:
            await host.wait_for_wakeup(host.poll_seconds, wakeup)
            return
        self._order.record_pull(claim.category)
        host.spawn(self._solve(claim, roster_model), claim.call_id)

    async def _claim(self, roster_model: RosterModel) -> Claim | None:
        roster, plan = self._host.roster, self._host.plan
        places = {c: p[self._model] for c, p in roster.places.items() if self._model in p}
        self._order.set_shares(plan.shares.get(self._model, {}), places)
        self._order.set_bounds(plan.bounds.get(self._model, {}), plan.solved)
        self._ahead_wanted = min(1 + self._sends_within_look_ahead(), MAX_AHEAD)
        while self._ahead_size < self._ahead_wanted:
            self._ahead.release()
            self._ahead_size += 1
        categories = self._order.categories(roster.categories)
        if not categories:
            return None
        limit = plan.contexts.get(self._model) or context_limits(roster.models).get(self._model)
        queue = self._host.queue
        claim = await queue.claim(
            self._model, categories, max_tokens=roster_model.max_tokens, limit=limit,
            skip_clients=self._limited_clients(),
        )  # fmt: skip
        if claim is None or claim.request is None:
            return claim
        try:
            return replace(claim, request=request_for(self._host.config, self._model, claim.request))
        except RequestError as error:
            others = capable_models(self._host.config, roster.models, claim.request)
            await queue.leave(claim, others, str(error))
            return None

    def _limited_clients(self) -> list[str]:
        """Returns the clients whose limits are used up: their tasks would be claimed in vain."""
        waits, now = self._host.limited_clients, time.monotonic()
        for client in [client for client, until in waits.items() if until <= now]:
            del waits[client]
        return list(waits)

    def _sends_within_look_ahead(self) -> int:
        """Returns how many calls are certain to be sent within the look-ahead: by the target, or as of late.

        A claim beyond them would keep the task from a model that can send it, and where sends are seconds
        apart it would exceed MAX_HOLD_SECONDS.
        """
        seconds = self._host.look_ahead_seconds
        target = self._host.plan.targets.get(self._model)
        if target is not None and target.gap_seconds and target.at_once is None and not target.tokens:
            return math.floor((target.requests_per_second() or 0.0) * seconds)
        since = time.monotonic() - seconds
        return sum(sent_at > since for sent_at in self._sent_at)

    def _release_ahead(self) -> None:
        if self._ahead_size > self._ahead_wanted:
            self._ahead_size -= 1
        else:
            self._ahead.release()

    async def _solve(self, claim: Claim, roster_model: RosterModel) -> None:
        host = self._host
        sent = False
        result: CallResult | None = None

        def before_send(permit: Permit) -> None:
            nonlocal sent
            host.check_may_send()
            permit.check()
            sent = True
            self._sent_at.append(time.monotonic())
            self._release_ahead()

        try:
            result = await send_permitted(
                host.limiter, host.backend, CallRequest.of_claim(claim, roster_model),
                permit_seconds=MAX_HOLD_SECONDS, before_send=before_send,
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001 - every call is settled or released
            result = self._result_after(error)
        except asyncio.CancelledError:
            if not sent:
                await asyncio.shield(host.queue.unclaim(claim.call_id))
            raise
        finally:
            if not sent:
                self._release_ahead()
        if result is None:
            await host.queue.unclaim(claim.call_id)
        else:
            await self._settle(claim, result)

    def _result_after(self, error: Exception) -> CallResult | None:
        """Returns the result of a call that ended with an error; None if it costs the task no attempt.

        Any other error counts: without that the task would return forever.
        """
        if isinstance(error, (SendingPaused, asyncio.TimeoutError)):
            return None
        if isinstance(error, ClientLimited):
            again = (
                CLIENT_SECONDS if error.again_seconds is None else min(error.again_seconds, CLIENT_SECONDS)
            )
            self._host.limited_clients[error.client] = time.monotonic() + again
            return None
        if isinstance(error, RouterError) and not isinstance(error, LimiterError):
            return CallResult(Outcome.REJECTED, error=str(error))
        self._report(error)
        if isinstance(error, LimiterError):
            return None
        return CallResult(Outcome.ERROR, error=f"unexpected error: {first_line(error)}")

    async def _settle(self, claim: Claim, result: CallResult) -> None:
        queue = self._host.queue
        if result.outcome in {Outcome.UNSENT, Outcome.UNAVAILABLE}:
            self._back_off()
            error = result.error or "it cannot be connected to"
            # A gateway that answers for it can be connected to: the next call tells whether it is back.
            certain = 0.0 if result.outcome is Outcome.UNSENT else MAX_BACKOFF_SECONDS + 0.5
            self._host.reports.record(Reason.BACKEND_UNREACHABLE, error, self._model, certain_seconds=certain)
        else:
            self._failures = 0
            self._clear(Reason.BACKEND_UNREACHABLE)
        if result.outcome is Outcome.UNSENT:
            await queue.unclaim(claim.call_id)
            return
        await self._host.record_error(self._model, result)
        await queue.settle(claim, result)
        self._host.count(result)

    def _report(self, error: Exception) -> None:
        """Records why the loop cannot go on; logs an unexpected error once, until it changes or ends."""
        reason: Reason | None = Reason.CLAIMS_FAILING
        shown: str | Exception = error
        if isinstance(error, RouterError):
            reason = reason_of(error)
        else:
            shown = f"{type(error).__name__}: {first_line(error)}"
            if shown != self._unexpected:
                log.error("unexpected error: model=%s, retrying", self._model, exc_info=error)
            self._unexpected = shown
        if reason is not None:
            self._host.reports.record(reason, shown, self._model)

    def _clear(self, *reasons: Reason) -> None:
        for reason in reasons:
            self._host.reports.clear(reason, self._model)

    def _back_off(self) -> None:
        # The backend, or what is behind its gateway, is unreachable, which costs the task no attempt.
        self._failures += 1
        backoff = min(MAX_BACKOFF_SECONDS, 0.25 * 2 ** min(self._failures, 10))
        self._not_before = time.monotonic() + backoff
