"""Distributed rate limiter over Redis. Exact at the point of arrival, for any number of processes.

In every rolling window, requests, reserved tokens and money arriving at the backend stay within the model's
traffic target, and so do calls in flight. One call of `limiter.lua` evaluates all limits of a model
atomically and returns a send time. Algorithm and proof: docs/limiter.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import redis.asyncio

from router.background import mark_retrieved
from router.errors import InputError, LimiterError, LimiterUnavailable
from router.limiter.breaker import Signal, Verdict
from router.limiter.clients import ClientLimits, LimitSource
from router.limiter.notifications import Notifications
from router.limiter.permit import Clock, Permit, Wait, WaitReason
from router.limiter.recovery import CallEnds, History, Recovery
from router.limiter.releases import Releases
from router.limiter.reservations import Reservations
from router.limiter.script import Outage, RedisScript
from router.limiter.settings import LimiterSettings
from router.limiter.snapshot import ModelTraffic
from router.limiter.state import ModelState
from router.limiter.tracker import ModelTracker, TargetSource
from router.limiter.waiters import WaitingCall, WaitQueue
from router.task import Outcome
from router.traffic import MAX_CALL_COST, MAX_COUNT, TrafficTarget

SCRIPT = Path(__file__).with_name("limiter.lua").read_text(encoding="utf-8")


class TrafficLimiter:
    """Grants permits for calls to models, decided in Redis on Redis's clock.

    After Redis lost a model's state, `history(model, seconds)` must return the model's calls of the last
    `seconds`. Without `history`, a model that this process has seen is blocked for its longest window, and
    any other starts at once. `call_ends(call_ids)` returns those of the calls that have ended, which frees
    the slots of calls that were open in the history. `stored_target(model)` returns the newest target in the
    database and its version: without it, a process that missed a change may restore an older target.

    `client_limit(client)` returns the limit of a client, None without one, and `client_history` is its
    `history`. On a Redis cluster, limits of clients need `one_slot`, alike in all processes: then all states
    are in one slot of the cluster, as a call of the script reads a model's and a client's.

    `clock` is monotonic, in seconds. The `redis` client needs a `socket_timeout`:
    nothing else bounds a request to Redis that hangs.
    """

    def __init__(
        self,
        redis: redis.asyncio.Redis,
        history: History | None = None,
        *,
        call_ends: CallEnds | None = None,
        stored_target: TargetSource | None = None,
        client_limit: LimitSource | None = None,
        client_history: History | None = None,
        settings: LimiterSettings | None = None,
        clock: Clock = time.monotonic,
        one_slot: bool = False,
    ) -> None:
        self.settings = settings or LimiterSettings()
        self._clock = clock
        self._script = RedisScript(redis, SCRIPT, sender=uuid.uuid4().hex)
        self._tracker = ModelTracker(
            self._script, self.settings, clock, stored_target=stored_target, has_log=history is not None,
            one_slot=one_slot,
        )  # fmt: skip
        possible = one_slot or not self._script.on_cluster
        self._clients = ClientLimits(self._tracker, client_limit, possible=possible)
        self._notifications = Notifications(redis, self._tracker)
        self._script.on_reconnect = self._notifications.restart
        self._releases = Releases(self._tracker)
        self._recovery = Recovery(self._tracker, self._releases, history, call_ends, client_history)
        self._reservations = Reservations(self._tracker, self._recovery)
        self._queues: dict[tuple[str, bool], WaitQueue] = {}
        self._snapshots: dict[str, asyncio.Task[ModelTraffic]] = {}

    async def __aenter__(self) -> TrafficLimiter:  # noqa: PYI034 - typing.Self is 3.11
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Returns permits in flight and ends all tasks; the Redis client stays the caller's."""
        for queue in self._queues.values():
            await queue.close()
        await self._recovery.close()
        await self._tracker.tasks.wait()
        await self._releases.close()
        await self._notifications.close()
        await self._script.close()

    # -- targets ------------------------------------------------------------------------------------------

    async def set_target(
        self, model: str, target: TrafficTarget | str, *, version: int | None = None
    ) -> bool:
        """Applies a target from the next decision on; False if a newer version is applied already.

        `version` is when the target was read, in microseconds of the reader's database clock. Without one it
        is newer than the applied target.
        """
        target = TrafficTarget.parse(target) if isinstance(target, str) else target
        return await self._tracker.set_target(self._tracker.state(model), target, version)

    async def set_client_limit(self, client: str, limit: TrafficTarget | str | None) -> None:
        """Applies a limit to all calls of a client, over all models, from the next decision on.

        Its requests are not paced. None: calls by this process are not limited.
        """
        limit = TrafficTarget.parse(limit) if isinstance(limit, str) else limit
        await self._clients.set(client, limit)

    # -- permits ------------------------------------------------------------------------------------------

    async def reserve(
        self, model: str, tokens: int = 0, *, cost: int = 0, holder_seconds: float | None = None,
        interactive: bool = False, client: str = "",
    ) -> Permit | Wait:  # fmt: skip
        """Returns a permit whose send time is within the look-ahead, else a `Wait`. Does not wait itself.

        `tokens` and `cost` are upper bounds of the tokens that the call uses and of its cost in millionths of
        a US dollar. `holder_seconds` is an upper bound of its duration (default: `max_call_seconds` of the
        settings); it occupies a slot for at most that long. Somebody waits for an `interactive` call. Limits
        of the `client` are checked with the model's: either both count the call, or neither.
        """
        _check_needs(tokens, cost)
        state = self._tracker.state(model)
        return await self._reservations.reserve(
            state,
            (tokens, cost),
            holder_seconds,
            interactive=interactive,
            client=await self._clients.state(client),
        )

    async def acquire(
        self, model: str, tokens: int = 0, *, cost: int = 0, timeout_seconds: float | None = None,
        call_id: uuid.UUID | None = None, interactive: bool = False, client: str = "",
    ) -> Permit:  # fmt: skip
        """Waits for a permit and returns at its send time; `interactive` calls go before the others.

        `call_id` is the call's in the call log. If Redis loses its state, a logged call takes no slot while
        it waits here, and the slot of one that was sent becomes free when its permit is released.

        Raises LimiterError if there is no permit within `timeout_seconds` (None: no limit), or if `tokens`
        or `cost` exceeds a limit of the target by itself; ClientLimited as soon as it is known that the
        limits of the `client` leave no room in time.
        """
        _check_needs(tokens, cost)
        queue = self._queue(model, interactive=interactive)
        call = WaitingCall(tokens, cost, call_id, await self._client_in_time(client, timeout_seconds))
        if timeout_seconds is None:
            return await queue.wait(call)
        waiting = asyncio.ensure_future(queue.wait(call._replace(until=self._clock() + timeout_seconds)))
        try:
            done, _ = await asyncio.wait({waiting}, timeout=timeout_seconds)
        except asyncio.CancelledError:
            await _cancelled(waiting)
            if not waiting.cancelled() and waiting.exception() is None:
                self._releases.cancel_later(waiting.result())
            raise
        if not done:
            await _cancelled(waiting)
        if waiting.cancelled():
            why = self._tracker.state(model).waiting_for.get(interactive, WaitReason.NOTHING).text
            raise LimiterError(f"No permit for {model} within {timeout_seconds:g} s: {why}. Retry later.")
        return waiting.result()

    async def wait_until_available(self, model: str) -> None:
        """Returns once a batch send looks possible within the look-ahead. Reserves nothing."""
        state = self._tracker.state(model)
        while True:
            changes = state.changes
            if self._clock() - state.available_known_at > self.settings.hint_seconds:
                await self._notifications.listen()
                await self._reservations.peek(state)
            left = None if state.available_at is None else state.available_at - self._clock()
            if changes != state.changes:
                state.forget_availability()  # the reply may be older than the change
            elif left is not None and left <= 0:
                return
            else:
                poll = self.settings.hint_seconds
                await state.broadcast.wait(poll if left is None else min(poll, left))

    async def wait_until_unavailable(self, model: str) -> None:
        """Returns once a reply to waiting interactive calls reports a cool-down or half-open breaker."""
        await self._queue(model, interactive=True).wait_until_unavailable()

    def queue_length(self, model: str) -> int:
        """Returns how many calls wait in this process for a permit of the model."""
        return sum(len(queue) for (name, _), queue in self._queues.items() if name == model)

    async def release(self, permit: Permit, tokens: int | None = None, cost: int | None = None) -> None:
        """Ends a call: frees its slot, and replaces its reservation by its `tokens` and `cost`. Idempotent.

        What is None stays as reserved.
        """
        _check_needs(tokens or 0, cost or 0)
        await self._releases.release(permit, tokens, cost)

    async def cancel(self, permit: Permit) -> None:
        """Returns a permit by which nothing was sent; it no longer counts. Idempotent."""
        await self._releases.cancel(permit)

    # -- breaker ------------------------------------------------------------------------------------------

    async def cool_down(self, model: str, seconds: float, reason: str) -> None:
        """Blocks the model in all processes for up to a day; 0 ends a cool-down and closes the breaker."""
        await self._tracker.report(self._tracker.state(model), Verdict(Signal.COOL_DOWN, seconds), reason)

    async def record_outcome(
        self,
        model: str,
        outcome: Outcome,
        retry_after_seconds: float | None = None,
        *,
        why: str = "",
        permit: Permit | None = None,
    ) -> None:
        """Records the outcome of a call for the circuit breaker of all processes.

        `why` is the call's error text; it is shown as the reason of a cool-down. `permit` is the call's
        permit, by which calls from before the breaker opened are recognized and ignored. For a model without
        failures, a success or an abandoned call costs no round trip.
        """
        verdict = self.settings.breaker.verdict(outcome, retry_after_seconds)
        state = self._tracker.state(model)
        failing = state.failures or state.trips
        if verdict is None or (verdict.signal in {Signal.SUCCESS, Signal.NEUTRAL} and not failing):
            return
        send = None if permit is None else (permit.generation, permit.number)
        await self._tracker.report(state, verdict, f"{outcome.value}: {why}", send)

    async def _client_in_time(self, client: str, seconds: float | None) -> ModelState | None:
        """Returns the state of a client with limits; while Redis is away, waits for it as for a permit."""
        until = float("inf") if seconds is None else self._clock() + seconds
        while True:
            with contextlib.suppress(LimiterUnavailable):
                return await self._clients.state(client)
            if self._clock() >= until:
                return await self._clients.state(client)
            await asyncio.sleep(self.settings.retry_base_seconds)

    # -- snapshots ----------------------------------------------------------------------------------------

    async def snapshot(self, models: Iterable[str]) -> dict[str, ModelTraffic]:
        """Reads target and usage of each model. Reserves nothing."""
        return {model: await self._tracker.snapshot(self._tracker.state(model)) for model in models}

    async def snapshot_clients(self, clients: Iterable[str]) -> dict[str, ModelTraffic]:
        """Reads limit and usage of each of the clients that have a limit in Redis."""
        found = {client: await self._tracker.snapshot(self._tracker.client(client)) for client in clients}
        return {client: traffic for client, traffic in found.items() if traffic.target is not None}

    async def check_writable(self) -> None:
        """Raises LimiterUnavailable if Redis does not answer or accepts no writes."""
        await self._script.check_writable()

    async def shared_snapshot(self, model: str) -> ModelTraffic:
        """Reads the snapshot of one model, and restores a target that Redis lost.

        Concurrent callers share one read.
        """
        reading = self._snapshots.get(model)
        if reading is None:
            work = self._tracker.restored_snapshot(self._tracker.state(model))
            reading = self._tracker.tasks.start(work, f"snapshot of {model}")
            self._snapshots[model] = reading
            reading.add_done_callback(lambda _: self._snapshots.pop(model))
            reading.add_done_callback(mark_retrieved)  # each caller may have given up waiting
        return await asyncio.shield(reading)

    @property
    def outage(self) -> Outage | None:
        """Outage of Redis as this process sees it; None while Redis answers."""
        return self._script.outage

    def _queue(self, model: str, *, interactive: bool) -> WaitQueue:
        queue = self._queues.get((model, interactive))
        if queue is None:
            queue = self._queues[model, interactive] = WaitQueue(
                self._tracker.state(model), self._tracker,
                self._reservations, self._releases, self._notifications, interactive=interactive,
            )  # fmt: skip
        return queue


def _check_needs(tokens: int, cost: int) -> None:
    if not 0 <= tokens <= MAX_COUNT:
        raise InputError(f"{tokens} is not a valid number of tokens: 0 to {MAX_COUNT:,}.")
    if not 0 <= cost <= MAX_CALL_COST:
        raise InputError(f"{cost} is not a valid cost: 0 to {MAX_CALL_COST:,} millionths of a dollar.")


async def _cancelled(waiting: asyncio.Future[Any]) -> None:
    waiting.cancel()
    await asyncio.wait({waiting})
