"""Shared runtime of a process's workers: connections, lease, periodic jobs, calls in flight.

Calls belong to the engine, so that they continue when the worker that began them ends.
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
from router.models import (
    Roster,
    RosterModel,
    calls_per_second,
    context_limits,
    open_services,
    read_roster,
    read_solved,
    read_targets,
    record_model_error,
)
from router.queue import QueueState, TaskQueue, listening, still_listening
from router.settings import Addresses, RouterConfig
from router.task import CallResult, Outcome
from router.traffic import TrafficTarget
from router.workers.assignment import Work, bounds, shares
from router.workers.budget_watch import STEP_SECONDS as BUDGET_SECONDS
from router.workers.budget_watch import BudgetWatch
from router.workers.classification_job import ClassificationJob
from router.workers.failure_alarm import AlarmSettings, FailureAlarm
from router.workers.handover import Handover
from router.workers.pull_loop import PullPlan
from router.workers.standstill import StandstillReports
from router.workers.standstill_watch import STEP_SECONDS, StandstillWatch

log = logging.getLogger("router.workers.engine")

STATE_SECONDS = 1.0
CLASSIFICATION_SECONDS = 0.5
MAINTENANCE_SECONDS = 0.5
REPORT_SECONDS = 1.0
ALARM_SECONDS = 2.0
RECONCILE_SECONDS = 2.0
PARTITION_SECONDS = 3600.0
LANE_SECONDS = 20.0
LISTENER_CHECK_SECONDS = 4.0
VARIABLE_SECONDS = 10.0  # a fallback poll: the watcher near the metadata database is faster
SUMMARY_SECONDS = 30.0
USAGE_SECONDS = 30.0
LEARN_SECONDS = 20.0
ORPHAN_SECONDS = 30.0
GRACE_HEARTBEATS = 2  # in which others may renew their leases after Postgres was unavailable
UNLIMITED_CALL_SECONDS = 5.0  # assumed latency of a call where only concurrency is limited
FIRST_ID = -(2**62)

ROSTER_CHANGED = "the roster changed"
DRAINED = "the queue was empty"

T = TypeVar("T")
ReadVariables = Callable[[list[str]], Awaitable[Mapping[str, "str | None"]]]


class Engine:
    """Shared runtime of a process's workers: connections, lease, periodic jobs, calls in flight.

    An instance belongs to one event loop.
    """

    def __init__(
        self, addresses: Addresses, config: RouterConfig, read_variables: ReadVariables | None = None
    ) -> None:
        """`read_variables` returns model -> text of its Variable, where no watcher reads them elsewhere."""
        self.addresses = addresses
        self.config = config
        self.poll_seconds = config.worker.poll_seconds
        self.look_ahead_seconds = config.worker.look_ahead_seconds
        self._read_variables = read_variables
        self._open = contextlib.AsyncExitStack()
        self._jobs = PeriodicJobs()
        self._calls: dict[asyncio.Task[None], uuid.UUID] = {}
        self._runs: dict[str, tuple[frozenset[str], int]] = {}  # run -> its models, number of workers here
        self.handover = Handover(self)
        self._users = 0
        self._wakeup = asyncio.Event()
        self._control = asyncio.Event()
        self._new_tasks = asyncio.Event()
        self._empty_since: float | None = None
        self._lease_renewed_at = 0.0
        self._release_from = 0.0
        self._reconciled = FIRST_ID
        self._work: Work | None = None
        self._alarms: dict[str, FailureAlarm] = {}
        self._stored_alarms: dict[str, str | None] = {}
        self.state: QueueState | None = None
        self.plan = PullPlan()
        self.limited_clients: dict[str, float] = {}  # until when, on the monotonic clock
        self.solved = 0
        self.failed_calls = 0

    async def start(self) -> None:
        """Connects, begins the lease, applies the last valid targets and starts the periodic jobs.

        Raises DatabaseError or LimiterUnavailable if Postgres or Redis is unavailable.
        """
        try:
            await self._connect()
        except BaseException:
            await self._open.aclose()
            raise
        freeze_garbage_collector()
        self._start_jobs()

    async def _connect(self) -> None:
        services = await self._open.enter_async_context(open_services(self.addresses, self.config))
        self.pool, self.limiter, self.backend = services.pool, services.limiter, services.backend
        self.targets = services.targets
        self.queue = TaskQueue(self.pool, host=socket.gethostname(), lease=services.lease)
        self.reports = StandstillReports(self.pool, self.queue.worker)
        await self.queue.renew_lease()
        self._lease_renewed_at = time.monotonic()
        self.roster: Roster = await read_roster(self.pool)
        await self.targets.restore(self.roster)
        self.state = await self.queue.state([])
        self._classification = ClassificationJob(self.queue, self.config.classification)
        await self._classification.start(self._open)

    def _start_jobs(self) -> None:
        start, worker = self._jobs.start, self.config.worker
        start(self._listen_step, 1.0, "listen")
        start(self._heartbeat_step, worker.heartbeat_seconds, "heartbeat")
        start(self._state_step, STATE_SECONDS, "state", wake=self._control)
        start(self._classification.step, CLASSIFICATION_SECONDS, "classification", wake=self._new_tasks)
        start(self._maintenance_step, MAINTENANCE_SECONDS, "maintenance")
        start(self._alarms_step, ALARM_SECONDS, "alarms")
        start(self.reports.step, REPORT_SECONDS, "reports")
        start(StandstillWatch(self).step, STEP_SECONDS, "standstill")
        start(self._reconcile_step, RECONCILE_SECONDS, "reconcile")
        start(self.queue.create_partitions, PARTITION_SECONDS, "partitions")
        start(self.queue.close_empty_lanes, LANE_SECONDS, "empty lanes")
        start(self._orphans_step, ORPHAN_SECONDS, "orphaned claims")
        start(self.queue.learn_tokens, LEARN_SECONDS, "tokens per byte")
        start(self.queue.sum_client_usage, USAGE_SECONDS, "client usage")
        start(BudgetWatch(self).step, BUDGET_SECONDS, "budgets")
        start(self._summary_step, SUMMARY_SECONDS, "summary")
        if self._read_variables is not None:
            start(self._variables_step, VARIABLE_SECONDS, "variables")

    def start_job(self, step: Step, seconds: float, name: str, stop: Callable[[], Awaitable[None]]) -> None:
        """Starts one more periodic job; `stop` ends what it began, before the engine closes."""
        self._open.push_async_callback(stop)
        self._jobs.start(step, seconds, name)

    async def enter(self, manager: AbstractAsyncContextManager[T]) -> T:
        """Opens something that is closed with the engine."""
        return await self._open.enter_async_context(manager)

    async def stop(self, *, grace_seconds: float = 5.0) -> None:
        """Waits for the calls in flight, stops the jobs, requeues what was not sent and closes everything."""
        await self.handover.stop()
        if self._calls:
            await asyncio.wait(self._calls, timeout=grace_seconds)
        await self._jobs.stop()
        await cancel_and_wait(*self._calls)
        with contextlib.suppress(RouterError):
            await self.queue.release()
            await self.reports.withdraw()
        await self._open.aclose()

    # Runs and wake-ups

    def enter_run(self, run: str, models: frozenset[str]) -> bool:
        """Registers a worker of the run; returns whether it is the run's first in this process."""
        _, workers = self._runs.get(run, (models, 0))
        self._runs[run] = (models, workers + 1)
        self._empty_since = None
        self._control.set()
        return workers == 0

    def leave_run(self, run: str) -> None:
        """Removes a worker of the run."""
        models, workers = self._runs[run]
        if workers > 1:
            self._runs[run] = (models, workers - 1)
        else:
            del self._runs[run]

    def run_ended(self, run: str) -> str | None:
        """Returns why the run ended; None while it goes on."""
        return self.state.left_runs.get(run) if self.state else None

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Keeps the engine from being idle during the block."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1

    @property
    def idle(self) -> bool:
        """True if no worker uses the engine and no call is in flight."""
        return not (self._runs or self._calls or self.handover.active or self._users)

    @property
    def wakeup(self) -> asyncio.Event:
        """Set at the next new task or control message; each event is good for one wait."""
        return self._wakeup

    async def wait_for_wakeup(self, seconds: float, wakeup: asyncio.Event | None = None) -> None:
        """Waits for `wakeup`, by default the next one, at most `seconds`, with jitter."""
        await wait_for_event(wakeup or self._wakeup, seconds * random.uniform(0.75, 1.25))

    # Calls

    def check_may_send(self) -> None:
        """Raises SendingPaused if the batch is paused or the lease may have expired."""
        if self.state is None or self.state.held:
            raise SendingPaused("the batch is paused: the DAG solve_tasks is paused in Airflow")
        if not self._lease_is_valid():
            raise SendingPaused("the lease was not renewed in time: Postgres is unavailable")

    def sending_paused(self) -> bool:
        """Whether check_may_send would raise now."""
        try:
            self.check_may_send()
        except SendingPaused:
            return True
        return False

    def may_send(self) -> bool:
        """Whether sending is not paused and there is room for another call."""
        return not self.sending_paused() and len(self._calls) < self.config.worker.max_in_flight

    def in_flight(self) -> int:
        """Number of calls of this process that are not settled yet."""
        return len(self._calls)

    def spawn(self, call: Coroutine[Any, Any, None], call_id: uuid.UUID) -> None:
        """Runs a call until it is settled, whatever happens to its worker."""
        task = asyncio.create_task(call, name=f"router call {call_id}")
        self._calls[task] = call_id
        task.add_done_callback(self._call_done)

    def _call_done(self, task: asyncio.Task[None]) -> None:
        del self._calls[task]
        if not task.cancelled() and task.exception() is not None:
            log.error("unexpected error in %s; its task is requeued when the claim expires", task.get_name(),
                      exc_info=task.exception())  # fmt: skip

    async def record_error(self, model: str, result: CallResult) -> None:
        """Counts a call for the model's alarm."""
        answered = result.outcome is Outcome.ANSWERED
        error = None if answered else f"{result.outcome.value}: {result.error or ''}"
        certain = result.outcome is Outcome.UNKNOWN_MODEL  # by its name, so that it will not go away
        self._alarm(model).record(time.monotonic(), error, certain=certain)

    def _alarm(self, model: str) -> FailureAlarm:
        alarm = self._alarms.get(model)
        if alarm is None:
            worker = self.config.worker
            settings = AlarmSettings(
                worker.alarm_failure_rate, worker.alarm_min_failures, worker.alarm_seconds
            )
            alarm = self._alarms[model] = FailureAlarm(settings)
        return alarm

    def count(self, result: CallResult) -> None:
        """Counts a settled call for the summary."""
        if result.outcome is Outcome.ANSWERED:
            self.solved += 1
        else:
            self.failed_calls += 1

    # Periodic jobs

    async def _alarms_step(self) -> None:
        """Stores alarms that began, changed or ended; the first step ends those of a process before."""
        for model in self.roster.models:
            text = self._alarm(model).text(time.monotonic())
            if text != self._stored_alarms.get(model, ""):
                await record_model_error(self.pool, model, text)
                self._stored_alarms[model] = text

    async def _listen_step(self) -> None:
        async with listening(self.addresses.database_url, self._notified) as connection:
            self._wake_all()  # for notifications from before the connection
            lost = asyncio.Event()
            connection.add_termination_listener(lambda _connection: lost.set())
            while not await wait_for_event(lost, LISTENER_CHECK_SECONDS):
                await still_listening(connection)

    def _notified(self, channel: str) -> None:
        if channel == "router_control":
            self._control.set()
        else:
            self._empty_since = None
            self._new_tasks.set()
        self._wake_all()

    def _wake_all(self) -> None:
        wakeup, self._wakeup = self._wakeup, asyncio.Event()
        wakeup.set()

    async def _heartbeat_step(self) -> None:
        began = time.monotonic()
        await self.queue.renew_lease()
        if not self._lease_is_valid():
            self._release_from = began + GRACE_HEARTBEATS * self.config.worker.heartbeat_seconds
        self._lease_renewed_at = began

    def _lease_is_valid(self) -> bool:
        return time.monotonic() - self._lease_renewed_at <= self.config.worker.lease_seconds

    async def _maintenance_step(self) -> None:
        # While Postgres was unavailable no lease could be renewed: living workers get time to do so first.
        release_lost = self._lease_is_valid() and time.monotonic() >= self._release_from
        await self.queue.run_maintenance(release_lost=release_lost)

    async def _state_step(self) -> None:
        before, state = self.state, await self.queue.state(list(self._runs))
        if state.roster_version != self.roster.version:
            self.roster = await read_roster(self.pool)
            await self.targets.restore(self.roster)
        self.state = state
        await self._update_shares(state)
        await self._finish_runs(state)
        if before is None or (state.held, state.left_runs) != (before.held, before.left_runs):
            self._wake_all()

    async def _finish_runs(self, state: QueueState) -> None:
        now = time.monotonic()
        if sum(state.unsolved.values()) > 0 or self._calls:
            self._empty_since = None
        elif self._empty_since is None:
            self._empty_since = now
        drained = (
            self._empty_since is not None and now - self._empty_since > self.config.worker.idle_leave_seconds
        )
        for run, (models, _) in list(self._runs.items()):
            changed = bool(models) and models != frozenset(self.roster.models)
            if run not in state.left_runs and (changed or drained):
                await self.queue.finish_run(run, ROSTER_CHANGED if changed else DRAINED)
                self._control.set()

    async def _update_shares(self, state: QueueState) -> None:
        targets = {model: target for model, (target, _) in (await read_targets(self.pool)).items()}
        models = self.roster.models
        rates = {name: _rate(targets[name], model) for name, model in models.items() if name in targets}
        work = Work(state.unsolved, rates, self.roster.places, self.roster.learned)
        limits = bounds(work)
        solved = await read_solved(self.pool) if limits else self.plan.solved
        unchanged = work == self._work
        found = self.plan.shares if unchanged else await asyncio.to_thread(shares, work)
        self.plan = PullPlan(targets, found, limits, context_limits(models, targets), solved)
        self._work = work

    async def _variables_step(self) -> None:
        assert self._read_variables is not None
        if self.state is not None and self.state.watched:
            return  # reading them here blocks the triggerer's supervisor, the first time for seconds
        version = int(self.queue.database_time() * 1e6)
        lines = await self._read_variables(list(self.roster.models))
        await self.targets.apply(lines, version=version)
        await self.targets.clear_errors(lines)

    async def _reconcile_step(self) -> None:
        after = await self.queue.reconcile_step(self._reconciled)
        self._reconciled = FIRST_ID if after is None else after

    async def _orphans_step(self) -> None:
        await self.queue.release_orphaned_claims(set(self._calls.values()))

    async def _summary_step(self) -> None:
        if self.solved or self.failed_calls or self._calls:
            unsolved = dict(self.state.unsolved) if self.state else {}
            log.info("solved=%d failed_calls=%d in_flight=%d unsolved=%s", self.solved, self.failed_calls,
                     len(self._calls), unsolved)  # fmt: skip


def _rate(target: TrafficTarget, model: RosterModel) -> float:
    """Estimates the calls a second that a target allows."""
    rate = calls_per_second(target, model)
    if rate is None:
        rate = (target.at_once or 100) / UNLIMITED_CALL_SECONDS
    return rate
