"""One prompt being answered: preferred model and fallback run at once, and the best in time is given.

What to do next is decided in `race`; here the runners are started, listened to and, in the end, given up or
kept until their answers come late.
"""

from __future__ import annotations

import asyncio
import time
import uuid

from router.answering import plan as line_up
from router.answering import policy as race
from router.answering.answer import Answer, EventKind, Listener
from router.answering.attempt import Attempt
from router.answering.fallback import prompt_with, search, sources
from router.answering.plan import PASSAGES_SOURCE, Classify, Desk, RequestOptions, RoutingPlan
from router.answering.policy import (
    AttemptState,
    RequestState,
    ReturnFallback,
    ReturnPreferred,
    TryNextModel,
    Wait,
)
from router.answering.progress import Progress, tell
from router.answering.task_record import TaskRecord
from router.background import Broadcast, TrackedTasks, wait_for_event
from router.classification import Classification
from router.errors import CapacityExceeded, RouterError
from router.models import CallRequest, availability
from router.task import AnswerRank, CallResult, Outcome, Role

CATEGORISE_SHARE = 0.2  # of the deadline
SETTLED_WITHIN_SECONDS = 0.25  # an answer is returned at most so much later for being kept first


class Request:
    """`await answer()` once; afterwards `await better(rank)` for what comes late. All on one event loop."""

    def __init__(self, desk: Desk, question: RequestOptions, on_event: Listener | None = None) -> None:
        self.question = question
        self._desk = desk
        self._account = Progress(on_event)
        self._deadline = question.deadline_seconds or desk.config.answering.default_deadline_seconds
        self._ledger = TaskRecord(desk.means, question.prompt, self._deadline)
        self._racing = self._ledger.grow()
        self._line_up = RoutingPlan(
            Classification(desk.config.default_category, 0.0, "not known yet"), (), ()
        )
        self._changed = Broadcast()
        self._errands = TrackedTasks(self._changed.notify_all)
        self._search: asyncio.Task[None] | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._fallback_leg: AttemptState | None = None
        self._given: AnswerRank | None = None
        self._is_over = False

    # -- what Router uses ---------------------------------------------------------------------------------

    async def answer(self, classify: Classify) -> Answer:
        """The best answer in time. InputError, CapacityExceeded or ModelFailed as `Router.answer` says.

        Cancelled, it gives everything up that is under way.
        """
        try:
            await self._start(classify)
            answer = await self._give(await self._race())
        except asyncio.CancelledError:
            self.give_up("whoever asked went away")
            raise
        finally:
            self._leave_to_late()
        tell(answer)
        return answer

    async def better(self, rank: AnswerRank) -> Answer | None:
        """The next answer of a higher rank than `rank`; None once none can come any more."""
        while True:
            runner = self._account.best()
            if runner is not None and runner.row.rank > rank:
                await wait_for_event(runner.settled, SETTLED_WITHIN_SECONDS)
                answer = self._answer_of(runner, late=True)
                tell(answer)
                self._account.tell(EventKind.LATE, f"a better answer, from {runner.row.model}", runner)
                return answer
            under_way = set(self._errands.tasks)
            if not under_way or not self._may_come(rank):
                return None
            await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)

    def give_up(self, why: str) -> None:
        """Give up every call that has not ended; what has ended is still settled."""
        self._is_over = True
        for runner in self._account.runners:
            runner.give_up(why)
        if self._search is not None:
            self._search.cancel()
        if self._keeping is not None and self._ledger.task is None:
            self._keeping.cancel()

    async def stop(self) -> None:
        """Cancel whatever is left, settling included: afterwards only the lease can tell of it."""
        await self._errands.stop()

    @property
    def ended(self) -> asyncio.Event:
        """Set when nothing of it is under way any more."""
        return self._errands.over

    @property
    def task_id(self) -> int | None:
        """The task that the prompt became; None until it is one."""
        return self._ledger.task.task_id if self._ledger.task else None

    @property
    def open_calls(self) -> set[uuid.UUID]:
        """The calls that are not settled yet."""
        return {runner.row.call_id for runner in self._account.runners if not runner.settled.is_set()}

    # -- the start ----------------------------------------------------------------------------------------

    async def _start(self, classify: Classify) -> None:
        question, desk, account = self.question, self._desk, self._account
        self._search = self._errands.begin(self._find(), "search")
        about = await classify(question.prompt, CATEGORISE_SHARE * self._deadline)
        if question.deadline_seconds is None:
            self._deadline = desk.config.answering.deadline_of(about.category)
            self._ledger.deadline_seconds = self._deadline
        account.tell(EventKind.CATEGORISED, f"{about.category} ({about.confidence:.2f}): {about.reason}")
        self._line_up = RoutingPlan.of(desk.roster, desk.config, about, question.model)
        if question.model is not None:
            ahead = await availability(desk.means.limiter, question.model)
            if ahead.seconds is None or ahead.seconds > self._deadline - account.now():
                raise CapacityExceeded(
                    f"There is no room for {question.model}: {ahead.why}.", ahead.retry_after_seconds
                )
        if self._line_up.ranking:
            self._ask_next()
        if self._line_up.cheap:
            self._fallback_leg = AttemptState.RUNNING
            self._errands.begin(self._fall_back(self._search), "fallback")

    async def _find(self) -> None:
        knowledge = self._desk.knowledge
        if knowledge is not None and self.question.model is None:
            found = await search(knowledge, self.question.prompt, self._desk.config.fallback.passages)
            self._account.found = found
            names = ", ".join(sources(found)) or "nothing to the point"
            self._account.tell(EventKind.FOUND, f"knowledge holds {names} ({found.confidence:.2f})")

    def _ask_next(self) -> None:
        role = Role.NEXT if self._account.chosen else Role.ASKED
        runner = self._runner(self._not_asked()[0], role, self.question.prompt)
        work = runner.run(self._patience(), self._account.began + self._deadline)
        self._errands.begin(work, f"call {runner.row.call_id}")

    def _not_asked(self) -> list[str]:
        """Who may be asked of the ranking, in order: also those whom another one's permit spared."""
        asked = {runner.row.model for runner in self._account.chosen if not runner.spared}
        return [model for model in self._line_up.ranking if model not in asked]

    async def _fall_back(self, search: asyncio.Task[None]) -> None:
        """Search, then ask one cheap model after the other until one answers."""
        fallback = self._desk.config.fallback
        coming = self._ledger.grow()
        try:
            await asyncio.wait({search})
            prompt = prompt_with(self.question.prompt, self._account.found, fallback)
            for model in self._line_up.cheap:
                if self._is_over or self._given is not None:
                    return
                runner = self._runner(model, Role.FALLBACK, prompt, fallback.max_tokens)
                until = self._account.began + self._deadline
                if model != self._line_up.cheap[-1]:  # the last one may use up the time
                    until = min(until, time.monotonic() + self._patience())
                await runner.run(self._patience(), until)
                if runner.leg is AttemptState.ANSWERED:
                    return
        finally:
            coming.end()
            if self._fallback_leg is AttemptState.RUNNING:
                self._fallback_leg = AttemptState.FAILED
            self._changed.notify_all()

    def _runner(self, model: str, role: Role, prompt: str, most_tokens: int | None = None) -> Attempt:
        means = self._desk.means
        call_id, attempt = means.new_call_id(), len(self._account.chosen) + 1
        order = line_up.call_request(
            self._desk.roster, call_id, model, prompt, most_tokens, self.question.max_tokens
        )
        row = self._line_up.row(order, role, worker=means.worker(), attempt=attempt)
        runner = Attempt(self._ledger, row, order, self._news)
        self._account.asked(runner)
        return runner

    # -- the race -----------------------------------------------------------------------------------------

    async def _race(self) -> race.Action:
        while True:
            for runner in self._account.runners:
                if runner.refusal is not None:
                    raise runner.refusal
            move = race.next_action(self._standing())
            if isinstance(move, TryNextModel):
                self._ask_next()
            elif isinstance(move, Wait):
                await self._changed.wait(move.seconds)
            else:
                return move

    def _standing(self) -> RequestState:
        chosen = self._account.chosen
        searching = self._search is not None and not self._search.done()
        # What could not be logged a moment ago cannot be logged now.
        no_more = self._is_over or any(runner.unlogged for runner in chosen)
        next_model = not no_more and bool(self._not_asked())
        return RequestState(
            chosen=tuple(runner.leg for runner in chosen), fallback=self._fallback_leg,
            passages=AttemptState.RUNNING if searching else AttemptState.ANSWERED, next_model=next_model,
            now=self._account.now(), deadline=self._deadline,
        )  # fmt: skip

    async def _give(self, move: race.Action) -> Answer:
        runner: Attempt | None = None
        if isinstance(move, ReturnPreferred):
            runner = self._account.chosen[move.index]
        elif isinstance(move, ReturnFallback):
            runner = self._account.best()
        elif self.question.model is not None:
            ahead = await availability(self._desk.means.limiter, self.question.model)
            raise self._account.no_answer(self._account.chosen[0], self._deadline, ahead)
        self._given = runner.row.rank if runner else AnswerRank.PASSAGES
        self._racing.end()
        settle_seconds = max(0.0, min(SETTLED_WITHIN_SECONDS, self._deadline - self._account.now()))
        if runner is None:
            self._keeping = self._errands.begin(self._keep_passages(), "keep passages")
            if settle_seconds > 0:
                await asyncio.wait({self._keeping}, timeout=settle_seconds)
        else:
            await wait_for_event(runner.settled, settle_seconds)
        answer = self._answer_of(runner)
        self._account.tell(EventKind.ANSWERED, f"answered by {answer.model or 'knowledge: passages'}", runner)
        return answer

    async def _keep_passages(self) -> None:
        means = self._desk.means
        attempt = len(self._account.chosen) + 1
        no_order = CallRequest(means.new_call_id(), PASSAGES_SOURCE, "", "", 0, 0, 0.0)
        row = self._line_up.row(no_order, Role.PASSAGES, worker=means.worker(), attempt=attempt)
        try:
            row = await self._ledger.write(row)
            said = CallResult(Outcome.ANSWERED, answer=self._account.found.as_answer())
            await self._ledger.settle(row, said, late=False)
        except RouterError as error:
            self._account.tell(EventKind.TROUBLE, f"this answer is not in the log: {error}")

    # -- afterwards ---------------------------------------------------------------------------------------

    def _leave_to_late(self) -> None:
        """What still runs is late from now on, and held for `late_seconds` at most."""
        self._racing.end()
        for runner in self._account.runners:
            runner.late = runner.under_way
            if self._given is AnswerRank.CHOSEN_MODEL or runner.leg in (
                AttemptState.STUCK,
                AttemptState.RESTING,
            ):
                runner.spare("the prompt was answered")
        if self._given is None:
            self.give_up("there is no answer to wait for")
        late = self._desk.config.answering.late_seconds
        why = f"no answer came within {late:g} s after the prompt was answered"
        ending = asyncio.get_running_loop().call_later(late, self.give_up, why)
        self._errands.close(ending.cancel)

    def _may_come(self, rank: AnswerRank) -> bool:
        """Whether an answer of a higher rank may still come."""
        return any(runner.under_way and runner.row.rank > rank for runner in self._account.runners)

    def _answer_of(self, runner: Attempt | None, *, late: bool = False) -> Answer:
        rank = runner.row.rank if runner else AnswerRank.PASSAGES
        return self._account.answer(
            runner, self._line_up, provisional=self._may_come(rank), task_id=self.task_id, late=late
        )

    def _news(self, runner: Attempt, what: str) -> None:
        """Told by a runner: its call went out, has no permit yet, or ended."""
        account, model = self._account, runner.row.model
        if what == "sent":
            self._spare_others(runner)
            # Told later: nothing may delay the write that follows.
            asyncio.get_running_loop().call_soon(account.tell, EventKind.SENT, f"sent to {model}", runner)
        elif what == "stuck":
            account.tell(EventKind.TROUBLE, f"{model} has no permit yet", runner)
        else:
            if runner.leg is AttemptState.ANSWERED and runner.row.role is Role.FALLBACK:
                self._fallback_leg = AttemptState.ANSWERED
            account.ended(runner)
            self._errands.begin(runner.close(), f"settle {runner.row.call_id}")
        self._changed.notify_all()

    def _spare_others(self, sent: Attempt) -> None:
        """Of several models of the ranking that stand in line, only the first to have a permit is sent to."""
        chosen = self._account.chosen
        for runner in chosen if sent in chosen else ():
            runner.spare(f"{sent.row.model} had a permit sooner")  # the sent one is not touched

    def _patience(self) -> float:
        if self.question.model is not None:
            return self._deadline
        return race.permit_patience(self._deadline, self._desk.config.answering.permit_seconds)
