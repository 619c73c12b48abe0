"""The process-wide engine that all workers of one process share, and that outlives each of them.

It holds the pool, the limiter, the HTTP session and the lease, does the duties that go on beside solving, and
owns the calls in flight: a worker that leaves does not take its calls with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

from router.background import PeriodicJobs, Step, cancel_and_wait, freeze_garbage_collector, wait_for_event
from router.errors import RouterError, SendingPaused
from router.models import Roster, open_services, read_roster, read_solved, read_targets
from router.queue import QueueState, TaskQueue, listening
from router.settings import Addresses, RouterConfig
from router.traffic import TrafficTarget
from router.workers.assignment import Work, bounds, shares
from router.workers.classification_job import ClassificationJob

log = logging.getLogger("router.workers.engine")

STATE_SECONDS = 1.0
CATEGORISE_SECONDS = 0.5
HOUSE_SECONDS = 0.5
RECONCILE_SECONDS = 2.0
PARTITION_SECONDS = 3600.0
VARIABLE_SECONDS = 10.0  # only the net: a watch near the metadata database is faster
SUMMARY_SECONDS = 30.0
OVERLOOKED_SECONDS = 30.0
TOLERATED_HEARTBEATS = 2  # heartbeats that others may need to prolong their leases after Postgres was away
UNLIMITED_CALL_SECONDS = 5.0  # how long a call is taken to last where only calls at once are limited

ROSTER_CHANGED = "the roster changed"
DRAINED = "the queue was empty"
HANDOVER_SECONDS = 30.0  # workers come and go one by one; all of a run are there within seconds

T = TypeVar("T")
ReadVariables = Callable[[list[str]], Awaitable[Mapping[str, "str | None"]]]


class Engine:
    """Start it, let workers join runs, stop it. All its state belongs to one event loop."""

    def __init__(
        self, addresses: Addresses, config: RouterConfig, read_variables: ReadVariables | None = None
    ) -> None:
        self.addresses = addresses
        self.config = config
        self._read_variables = read_variables
        self._open = contextlib.AsyncExitStack()
        self._duties = PeriodicJobs()
        self._calls: dict[asyncio.Task[None], uuid.UUID] = {}
        self._runs: dict[str, tuple[frozenset[str], int]] = {}  # run -> its models, workers here
        self._pulls_handed_over: dict[str, asyncio.Task[None]] = {}
        self._attending = 0
        self._endings: set[asyncio.Task[None]] = set()
        self._woken = asyncio.Event()
        self._control = asyncio.Event()
        self._tasks_came = asyncio.Event()
        self._empty_since: float | None = None
        self._alive_at = 0.0
        self._release_from = 0.0
        self._reconciled = -(2**62)
        self._work: Work | None = None
        self.state: QueueState | None = None
        self.targets: dict[str, TrafficTarget] = {}
        self.shares: dict[str, dict[str, float]] = {}
        self.bounds: dict[str, dict[str, float]] = {}  # model -> category -> the most that it may have
        self.solved_tasks: dict[str, int] = {}  # by category, looked at while there are bounds
        self.solved = 0
        self.failed_calls = 0

    async def start(self) -> None:
        """Connect, begin the lease, put the last good targets in force, take up the duties."""
        try:
            await self._connect()
        except BaseException:
            await self._open.aclose()
            raise
        freeze_garbage_collector()
        self._take_up_duties()

    async def _connect(self) -> None:
        services = await self._open.enter_async_context(open_services(self.addresses, self.config))
        self.pool, self.limiter, self.backend = services.pool, services.limiter, services.backend
        self.watch = services.targets
        self.queue = TaskQueue(self.pool, host=socket.gethostname())
        await self.queue.start()
        self._alive_at = time.monotonic()
        self.roster: Roster = await read_roster(self.pool)
        await self.watch.begin(self.roster)
        self.state = await self.queue.state([])
        self._classification = ClassificationJob(self.queue, self.config.classification)
        await self._classification.start(self._open)

    def _take_up_duties(self) -> None:
        worker = self.config.worker
        self._duties.start(self._listen_step, 1.0, "listen")
        self._duties.start(self._heartbeat_step, worker.heartbeat_seconds, "heartbeat")
        self._duties.start(self._state_step, STATE_SECONDS, "state", wake=self._control)
        self._duties.start(self._classification.step, CATEGORISE_SECONDS, "categorise", wake=self._tasks_came)
        self._duties.start(self._house_step, HOUSE_SECONDS, "house")
        self._duties.start(self._reconcile_step, RECONCILE_SECONDS, "reconcile")
        self._duties.start(self.queue.create_partitions, PARTITION_SECONDS, "partitions")
        self._duties.start(self._overlooked_step, OVERLOOKED_SECONDS, "overlooked claims")
        self._duties.start(self._summary_step, SUMMARY_SECONDS, "summary")
        if self._read_variables is not None:
            self._duties.start(self._variables_step, VARIABLE_SECONDS, "variables")

    def start_job(self, step: Step, seconds: float, name: str, stop: Callable[[], Awaitable[None]]) -> None:
        """Do one duty more, about every `seconds`; `stop` ends what it began, before the engine is gone."""
        self._open.push_async_callback(stop)
        self._duties.start(step, seconds, name)

    async def enter(self, manager: AbstractAsyncContextManager[T]) -> T:
        """Open something that is closed with the engine."""
        return await self._open.enter_async_context(manager)

    async def stop(self, *, grace_seconds: float = 5.0) -> None:
        """End the duties, wait for calls in flight, give back what was not sent, close everything."""
        await cancel_and_wait(*self._pulls_handed_over.values())
        if self._calls:
            await asyncio.wait(self._calls, timeout=grace_seconds)
        await self._duties.end()
        await cancel_and_wait(*self._calls)
        with contextlib.suppress(RouterError):
            await self.queue.release()
        await self._open.aclose()

    # What workers use.

    def join(self, run: str, models: frozenset[str]) -> bool:
        """A worker of this run is here; True if it is the run's first in this process."""
        _, workers = self._runs.get(run, (models, 0))
        self._runs[run] = (models, workers + 1)
        self._empty_since = None
        self._control.set()
        return workers == 0

    def part(self, run: str) -> None:
        """A worker of this run is gone."""
        models, workers = self._runs[run]
        if workers > 1:
            self._runs[run] = (models, workers - 1)
        else:
            del self._runs[run]

    def hand_over(self, model: str, pulling: asyncio.Task[None]) -> None:
        """Keep this pulling alive while no worker is there: until take_over, at most HANDOVER_SECONDS."""
        self._pulls_handed_over[model] = pulling
        ending = asyncio.get_running_loop().call_later(HANDOVER_SECONDS, self._end_pulling, pulling)
        pulling.add_done_callback(lambda _task: ending.cancel())
        pulling.add_done_callback(lambda task: self._end_of_handover(model, task))

    def _end_of_handover(self, model: str, pulling: asyncio.Task[None]) -> None:
        if self._pulls_handed_over.get(model) is pulling:
            del self._pulls_handed_over[model]

    def hands_over(self, model: str) -> bool:
        """Whether the model is pulled for while its worker is not there."""
        return model in self._pulls_handed_over

    def handed_over(self, pulling: asyncio.Task[None]) -> bool:
        """Whether this pulling is the engine's now."""
        return pulling in self._pulls_handed_over.values()

    def take_over(self, model: str) -> None:
        """The model's worker is here: end the pulling in its place."""
        pulling = self._pulls_handed_over.get(model)
        if pulling is not None:
            self._end_pulling(pulling)

    def _end_pulling(self, pulling: asyncio.Task[None]) -> None:
        ending = asyncio.get_running_loop().create_task(
            cancel_and_wait(pulling), name="router end of pulling"
        )
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)

    @contextlib.contextmanager
    def attended(self) -> Iterator[None]:
        """Somebody waits for work here: the engine stays up for it."""
        self._attending += 1
        try:
            yield
        finally:
            self._attending -= 1

    @property
    def idle(self) -> bool:
        """True when nobody pulls or waits here and no call is in flight."""
        return not (self._runs or self._calls or self._pulls_handed_over or self._attending)

    def left(self, run: str) -> str | None:
        """Why the run is over; None while it goes on."""
        return self.state.left_runs.get(run) if self.state else None

    @property
    def news(self) -> asyncio.Event:
        """Set when there is news (work, a control word) after now; good for one wait."""
        return self._woken

    async def woken(self, seconds: float, news: asyncio.Event | None = None) -> None:
        """Wait for `news` (by default what comes from now on), at most `seconds`, with jitter."""
        await wait_for_event(news or self._woken, seconds * random.uniform(0.75, 1.25))

    def check_may_send(self) -> None:
        """Raise SendingPaused if the batch is held or the lease may be gone; called just before a send."""
        if self.state is None or self.state.held:
            raise SendingPaused("the batch is held: solve_tasks is paused")
        if not self._lease_is_sure():
            raise SendingPaused("the lease was not prolonged in time: Postgres is away")

    def held_back(self) -> bool:
        """Whether check_may_send would raise now."""
        try:
            self.check_may_send()
        except SendingPaused:
            return True
        return False

    def may_send(self) -> bool:
        """Whether there is room for a call, and check_may_send would let it through."""
        return not self.held_back() and len(self._calls) < self.config.worker.max_in_flight

    def in_flight(self) -> int:
        """Calls of this process that are not settled yet."""
        return len(self._calls)

    def spawn(self, call: Coroutine[Any, Any, None], call_id: uuid.UUID) -> None:
        """Own a call until it is settled, whatever becomes of its worker."""
        task = asyncio.get_running_loop().create_task(call, name=f"router call {call_id}")
        self._calls[task] = call_id
        task.add_done_callback(self._call_done)

    def _call_done(self, task: asyncio.Task[None]) -> None:
        del self._calls[task]
        if not task.cancelled() and task.exception() is not None:
            log.error("%s ended in an error; its lease or the next settle puts it right", task.get_name(),
                      exc_info=task.exception())  # fmt: skip

    # PeriodicJobs.

    async def _listen_step(self) -> None:
        async with listening(self.addresses.database_url, self._heard) as connection:
            self._wake_all()  # what was said before we listened
            lost = asyncio.Event()
            connection.add_termination_listener(lambda _connection: lost.set())
            await lost.wait()

    def _heard(self, channel: str) -> None:
        if channel == "router_control":
            self._control.set()
        else:
            self._empty_since = None
            self._tasks_came.set()
        self._wake_all()

    def _wake_all(self) -> None:
        woken, self._woken = self._woken, asyncio.Event()
        woken.set()

    async def _heartbeat_step(self) -> None:
        asked_at, worker = time.monotonic(), self.queue.worker
        if not await self.queue.heartbeat():
            log.warning("the lease was lost; going on under a new name, old claims are fenced off")
            self.queue.rename(worker)
            await self.queue.heartbeat()
        if not self._lease_is_sure():
            self._release_from = asked_at + TOLERATED_HEARTBEATS * self.config.worker.heartbeat_seconds
        self._alive_at = asked_at

    def _lease_is_sure(self) -> bool:
        return time.monotonic() - self._alive_at <= self.config.worker.lease_seconds

    async def _house_step(self) -> None:
        # When Postgres was away nobody could prolong a lease: those who live are let do so first.
        sure = self._lease_is_sure() and time.monotonic() >= self._release_from
        await self.queue.run_maintenance(release_lost=sure)

    async def _state_step(self) -> None:
        state = await self.queue.state(list(self._runs))
        if state.roster_version != self.roster.version:
            self.roster = await read_roster(self.pool)
            await self.watch.begin(self.roster)
        changed = self.state is None or (state.held, state.left_runs) != (
            self.state.held,
            self.state.left_runs,
        )
        self.state = state
        await self._aim()
        await self._leave_runs_that_are_over()
        if changed:
            self._wake_all()

    async def _leave_runs_that_are_over(self) -> None:
        assert self.state is not None
        if sum(self.state.unsolved.values()) > 0 or self._calls:
            self._empty_since = None
        elif self._empty_since is None:
            self._empty_since = time.monotonic()
        drained = (
            self._empty_since is not None
            and time.monotonic() - self._empty_since > self.config.worker.idle_leave_seconds
        )
        for run, (models, _) in list(self._runs.items()):
            if run in self.state.left_runs:
                continue
            if models and models != frozenset(self.roster.models):
                await self.queue.finish_run(run, ROSTER_CHANGED)
                self._control.set()
            elif drained:
                await self.queue.finish_run(run, DRAINED)
                self._control.set()

    async def _aim(self) -> None:
        assert self.state is not None
        kept = await read_targets(self.pool)
        self.targets = {model: target for model, (target, _) in kept.items()}
        rates = {model: _rate(self.targets[model]) for model in self.roster.models if model in self.targets}
        work = Work(self.state.unsolved, rates, self.roster.places, self.roster.learned)
        self.bounds = bounds(work)
        if self.bounds:
            self.solved_tasks = await read_solved(self.pool)
        if work != self._work:
            self.shares = await asyncio.to_thread(shares, work)
            self._work = work

    async def _variables_step(self) -> None:
        assert self._read_variables is not None
        if self.state is not None and self.state.watched:
            return  # reading them here holds the triggerer's supervisor up, the first time for seconds
        version = int(self.queue.database_time() * 1e6)
        lines = await self._read_variables(list(self.roster.models))
        await self.watch.apply(lines, version=version)
        await self.watch.clear_errors(lines)

    async def _reconcile_step(self) -> None:
        after = await self.queue.reconcile_step(self._reconciled)
        self._reconciled = -(2**62) if after is None else after

    async def _overlooked_step(self) -> None:
        await self.queue.release_orphaned_claims(set(self._calls.values()))

    async def _summary_step(self) -> None:
        if self.solved or self.failed_calls or self._calls:
            log.info("solved %d, failed calls %d, in flight %d, unsolved %s", self.solved, self.failed_calls,
                     len(self._calls), dict(self.state.unsolved) if self.state else {})  # fmt: skip


def _rate(target: TrafficTarget) -> float:
    rate = target.requests_per_second()
    if rate is None:
        rate = (target.at_once or 100) / UNLIMITED_CALL_SECONDS
    return rate
