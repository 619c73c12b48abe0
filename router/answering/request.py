"""Answers one prompt: preferred model and fallback in parallel, the best answer before the deadline.

`policy` decides what happens next. This module starts the attempts, waits for changes, and at the end cancels
what is not needed and leaves the rest for a late answer.
"""

from __future__ import annotations

import asyncio
import uuid

from router.answering.answer import Answer, EventKind, Listener
from router.answering.attempt import Attempt, Change
from router.answering.context import RequestContext
from router.answering.fallback import call_in_turn, request_with, search, sources, store_passages
from router.answering.plan import Classify, RequestOptions, RoutingPlan
from router.answering.policy import (
    Action,
    AttemptState,
    RequestState,
    ReturnFallback,
    ReturnPreferred,
    TryNextModel,
    Wait,
    next_action,
    permit_patience,
)
from router.answering.progress import Progress, answered_text, at_capacity, log_answer
from router.answering.task_record import TaskRecord
from router.background import Broadcast, TrackedTasks, wait_for_event
from router.errors import ContextLengthExceeded, RouterError
from router.models import Availability, availability
from router.request import ModelRequest
from router.task import AnswerRank, Role

SETTLE_SECONDS = 0.25  # that an answer may wait to be stored before it is returned


class Request:
    """One prompt being answered: `await answer()` once, then `await better(rank)` for late answers.

    All its state belongs to one event loop.
    """

    def __init__(
        self, context: RequestContext, options: RequestOptions, on_event: Listener | None = None
    ) -> None:
        config = context.config
        self._context = context
        self._options = options
        self._progress = Progress(options.began, on_event)
        self._deadline = options.deadline_seconds or config.answering.default_deadline_seconds
        self._record = TaskRecord(context, options.request, self._deadline, max_tokens=options.max_tokens)
        self._end_pending = self._record.expect_call()
        self._roster = context.roster()
        self._plan = RoutingPlan(
            self._roster, config.default_category, 0.0, "not classified yet", client=options.client
        )
        self._changed = Broadcast()
        self._tasks = TrackedTasks(self._changed.notify_all)
        self._search: asyncio.Task[None] | None = None
        self._storing: asyncio.Task[None] | None = None
        self._fallback: asyncio.Task[None] | None = None
        self._returned: AnswerRank | None = None
        self._expected = Availability(0.0, "")
        self._canceled = False

    async def answer(self, classify: Classify) -> Answer:
        """Returns the best answer in time. Raises InputError, CapacityExceeded or ModelFailed.

        A cancellation ends all calls in progress.
        """
        try:
            await self._start(classify)
            answer = await self._return(await self._decide())
        except asyncio.CancelledError:
            self.cancel("the caller canceled the request")
            raise
        finally:
            self._keep_for_late_answer()
        log_answer(answer)
        return answer

    async def better(self, rank: AnswerRank) -> Answer | None:
        """Waits for an answer of a higher rank; returns None once none can come."""
        while True:
            attempt = self._progress.best()
            if attempt is not None and attempt.row.rank > rank:
                await wait_for_event(attempt.settled, SETTLE_SECONDS)
                answer = self._answer_of(attempt, late=True)
                log_answer(answer)
                self._progress.emit(EventKind.LATE, f"better answer from {attempt.row.model}", attempt)
                return answer
            running = set(self._tasks.tasks)
            if not running or not self._may_improve(rank):
                return None
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)

    def cancel(self, why: str) -> None:
        """Cancels all calls in progress; ended calls are still settled."""
        self._canceled = True
        for attempt in self._progress.attempts:
            attempt.cancel(why)
        if self._search is not None:
            self._search.cancel()
        if self._storing is not None and self._record.task is None:
            self._storing.cancel()

    async def stop(self) -> None:
        """Cancels all calls, and settling too; remaining claims are released when the lease expires."""
        await self._tasks.stop()

    @property
    def ended(self) -> asyncio.Event:
        """Set when nothing of the request is in progress any more."""
        return self._tasks.over

    @property
    def open_calls(self) -> set[uuid.UUID]:
        """Calls that are not settled yet."""
        return {each.row.call_id for each in self._progress.attempts if not each.settled.is_set()}

    async def _start(self, classify: Classify) -> None:
        options, config = self._options, self._context.config
        self._search = self._tasks.begin(self._search_knowledge(), "search")
        found = await classify(options.chat, max(0.0, self._deadline - self._progress.now()))
        if options.deadline_seconds is None:
            self._deadline = config.answering.deadline_of(found.category)
            self._record.deadline_seconds = self._deadline
        self._progress.emit(
            EventKind.CATEGORISED, f"{found.category} ({found.confidence:.2f}): {found.reason}"
        )
        self._plan = RoutingPlan.of(
            self._roster, config, found.category, found.confidence,
            reason=found.reason, model=options.model, max_tokens=options.max_tokens,
            request=options.request, client=options.client, interactive=True, models=options.models,
        )  # fmt: skip
        if self._plan.too_long is not None:
            raise ContextLengthExceeded(self._plan.too_long)
        if options.model is not None:
            expected = self._expected = await self._availability(options.model)
            if expected.seconds is None or expected.seconds > self._deadline - self._progress.now():
                raise at_capacity(options.model, expected.why, expected.retry_after_seconds)
        if self._plan.ranking:
            self._try_next_model()
        if self._plan.fallback_models:
            self._fallback = self._tasks.begin(self._call_fallbacks(self._search), "fallback")

    async def _search_knowledge(self) -> None:
        if self._context.knowledge is None or self._options.model is not None:
            return
        self._progress.found = found = await search(self._context, self._options.chat, self._options.client)
        names = ", ".join(sources(found)) or "no relevant passages"
        self._progress.emit(EventKind.FOUND, f"found {names} (confidence {found.confidence:.2f})")

    def _try_next_model(self) -> None:
        first = Role.ASKED if self._options.model is None else Role.NAMED
        role = Role.NEXT if self._progress.ranked else first
        attempt = self._new_attempt(role, self._untried()[0], self._options.request)
        running = attempt.run(self._patience_seconds, self._ends_at)
        self._tasks.begin(running, f"call {attempt.row.call_id}")

    def _untried(self) -> list[str]:
        """Returns the ranked models that may be called, including those canceled for another one's permit."""
        tried = {attempt.row.model for attempt in self._progress.ranked if not attempt.canceled_unsent}
        models = self._plan.roster.models
        refused = max((models[attempt.row.model].context_tokens or 0
                       for attempt in self._progress.ranked if attempt.too_long), default=0)  # fmt: skip
        return [
            model for model in self._plan.ranking
            if model not in tried and (models[model].context_tokens or refused + 1) > refused
        ]  # fmt: skip

    async def _call_fallbacks(self, searching: asyncio.Task[None]) -> None:
        end_pending = self._record.expect_call()
        try:
            await asyncio.wait({searching})
            request = request_with(self._options.request, self._progress.found, self._context.config.fallback)

            async def call(model: str, until: float) -> Attempt:
                attempt = self._new_attempt(Role.FALLBACK, model, request)
                await attempt.run(self._patience_seconds, until)
                return attempt

            await call_in_turn(
                self._plan, call, until=self._ends_at, patience_seconds=self._patience_seconds,
                may_continue=lambda: not self._canceled and self._returned is None,
            )  # fmt: skip
        finally:
            end_pending()

    def _new_attempt(self, role: Role, model: str, request: ModelRequest) -> Attempt:
        attempt = Attempt(
            self._record, self._plan, role, model, request,
            number=self._next_number, on_change=self._on_change,
        )  # fmt: skip
        self._progress.started(attempt)
        return attempt

    async def _decide(self) -> Action:
        """Acts until an answer is to be returned."""
        while True:
            for attempt in self._progress.attempts:
                if attempt.refusal is not None:
                    raise attempt.refusal
            action = next_action(self._state())
            if isinstance(action, TryNextModel):
                self._try_next_model()
            elif isinstance(action, Wait):
                await self._changed.wait(action.seconds)
            else:
                return action

    def _state(self) -> RequestState:
        ranked = self._progress.ranked
        searching = self._search is not None and not self._search.done()
        # If Postgres refused a log row just now, it would refuse the next one as well.
        is_over = self._canceled or any(attempt.unlogged for attempt in ranked)
        return RequestState(
            ranked=tuple(attempt.state for attempt in ranked), fallback=self._fallback_state(),
            passages=AttemptState.RUNNING if searching else AttemptState.ANSWERED,
            next_model=not is_over and bool(self._untried()),
            now=self._progress.now(), deadline=self._deadline,
        )  # fmt: skip

    def _fallback_state(self) -> AttemptState | None:
        if self._fallback is None:
            return None
        fallbacks = [each.state for each in self._progress.attempts if each.row.role is Role.FALLBACK]
        if AttemptState.ANSWERED in fallbacks:
            return AttemptState.ANSWERED
        return AttemptState.FAILED if self._fallback.done() else AttemptState.RUNNING

    async def _return(self, action: Action) -> Answer:
        attempt: Attempt | None = None
        if isinstance(action, ReturnPreferred):
            attempt = self._progress.ranked[action.index]
        elif isinstance(action, ReturnFallback):
            attempt = self._progress.best()
        elif self._options.model is not None:
            raise self._progress.no_answer(
                self._progress.ranked[0], self._deadline, await self._availability(self._options.model)
            )
        self._returned = attempt.row.rank if attempt else AnswerRank.PASSAGES
        self._end_pending()
        settle_seconds = max(0.0, min(SETTLE_SECONDS, self._deadline - self._progress.now()))
        if attempt is None:
            self._storing = self._tasks.begin(self._store_passages(), "store passages")
            if settle_seconds > 0:
                await asyncio.wait({self._storing}, timeout=settle_seconds)
        else:
            await wait_for_event(attempt.settled, settle_seconds)
        answer = self._answer_of(attempt)
        self._progress.emit(EventKind.ANSWERED, answered_text(answer), attempt)
        return answer

    async def _availability(self, model: str) -> Availability:
        """Returns when the model may have a permit; at the deadline, what was known before."""
        left = self._deadline - self._progress.now()
        return await availability(self._context.limiter, model, left) if left > 0 else self._expected

    async def _store_passages(self) -> None:
        try:
            await store_passages(self._record, self._plan, self._progress.found, self._next_number)
        except RouterError as error:
            self._progress.emit(EventKind.TROUBLE, f"the answer was not logged: {error}")

    def _keep_for_late_answer(self) -> None:
        """Marks calls in progress as late, and cancels them after `late_seconds`."""
        self._end_pending()
        for attempt in self._progress.attempts:
            attempt.late = attempt.in_progress
            if self._returned is AnswerRank.CHOSEN_MODEL or attempt.state in (
                AttemptState.WAITING_FOR_PERMIT,
                AttemptState.UNAVAILABLE,
            ):
                attempt.cancel_unsent("the request was already answered")
        if self._returned is None:
            self.cancel("the request failed")
        late_seconds = self._context.config.answering.late_seconds
        why = f"no answer came within {late_seconds:g} s after the request was answered"
        ending = asyncio.get_running_loop().call_later(late_seconds, self.cancel, why)
        self._tasks.close(ending.cancel)

    def _may_improve(self, rank: AnswerRank) -> bool:
        """Returns whether an answer of a higher rank may still come."""
        return any(each.in_progress and each.row.rank > rank for each in self._progress.attempts)

    def _answer_of(self, attempt: Attempt | None, *, late: bool = False) -> Answer:
        rank = attempt.row.rank if attempt else AnswerRank.PASSAGES
        task = self._record.task
        return self._progress.answer(
            attempt, self._plan, provisional=self._may_improve(rank),
            task_id=task.task_id if task else None, late=late,
        )  # fmt: skip

    def _on_change(self, attempt: Attempt, change: Change) -> None:
        progress, model = self._progress, attempt.row.model
        if change == "sent":
            self._cancel_waiting(attempt)
            # Emitted later: nothing may delay the write to the socket that follows.
            asyncio.get_running_loop().call_soon(progress.emit, EventKind.SENT, f"sent to {model}", attempt)
        elif change == "waiting":
            progress.emit(EventKind.TROUBLE, f"{model} is waiting for a permit", attempt)
        else:
            progress.ended(attempt)
            self._tasks.begin(attempt.close(), f"settle {attempt.row.call_id}")
        self._changed.notify_all()

    def _cancel_waiting(self, sent: Attempt) -> None:
        """Of several ranked models that wait for a permit, only the first to get one is sent to."""
        ranked = self._progress.ranked
        for attempt in ranked if sent in ranked else ():
            attempt.cancel_unsent(f"{sent.row.model} got a permit first")  # leaves the sent one alone

    @property
    def _next_number(self) -> int:
        return len(self._progress.ranked) + 1

    @property
    def _ends_at(self) -> float:
        """The deadline on the monotonic clock."""
        return self._progress.began + self._deadline

    @property
    def _patience_seconds(self) -> float:
        if self._options.model is not None:
            return self._deadline
        return permit_patience(self._deadline, self._context.config.answering.permit_seconds)
