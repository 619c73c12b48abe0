"""The account of one asking: what happened, told as it happens, and the answer that comes of it."""

from __future__ import annotations

import logging
import time

import structlog

from router.answering.answer import Answer, Event, EventKind, Listener
from router.answering.attempt import Attempt
from router.answering.fallback import Found, NothingFound, sources
from router.answering.plan import RoutingPlan
from router.answering.policy import AttemptState
from router.classification import Classification
from router.errors import BackendUnavailable, CapacityExceeded, ModelFailed, RouterError
from router.models import NO_CONNECTION, Availability
from router.task import AnswerRank, Outcome, Role

log = logging.getLogger("router.answering")

NO_ROOM_OUTCOMES = frozenset({Outcome.RATE_LIMITED, Outcome.OVERLOADED})
SHORTEST_RETRY_SECONDS = 1.0
WHY_ASKED = {
    Role.ASKED: "the first for this category",
    Role.NEXT: "the next in rank",
    Role.FALLBACK: "the fallback",
}


class Progress:
    """Tells the listener, and sums up. A listener that raises is logged and not heard of further."""

    def __init__(self, listener: Listener | None) -> None:
        self.began = time.monotonic()
        self.runners: list[Attempt] = []
        self.found: Found = NothingFound()
        self._listener = listener

    def now(self) -> float:
        """Seconds since the prompt came."""
        return time.monotonic() - self.began

    @property
    def chosen(self) -> list[Attempt]:
        """The calls to models of the ranking, in the order they were asked."""
        return [runner for runner in self.runners if runner.row.rank is AnswerRank.CHOSEN_MODEL]

    def best(self) -> Attempt | None:
        """The call with the best answer so far."""
        answered = [runner for runner in self.runners if runner.leg is AttemptState.ANSWERED]
        return max(answered, key=lambda runner: runner.row.rank, default=None)

    def answer(
        self,
        runner: Attempt | None,
        line_up: RoutingPlan,
        *,
        provisional: bool,
        task_id: int | None,
        late: bool,
    ) -> Answer:
        """The answer of this call, or of knowledge."""
        result = runner.result if runner else None
        rank = runner.row.rank if runner else AnswerRank.PASSAGES
        calls = tuple(each.as_call(self.began) for each in self.runners)
        about: Classification = line_up.categorised
        return Answer(
            text=(result.answer if result else None) or self.found.as_answer(),
            model=runner.row.model if runner else None, rank=rank, category=about.category,
            confidence=about.confidence, reason=about.reason, preferred=line_up.preferred,
            fallback=line_up.fallback, provisional=provisional, seconds=self.now(),
            cost_usd=sum(call.cost_usd or 0.0 for call in calls),
            prompt_tokens=result.prompt_tokens if result else None,
            completion_tokens=result.completion_tokens if result else None,
            sources=sources(self.found) if rank < AnswerRank.CHOSEN_MODEL else (),
            task_id=task_id, calls=calls, late=late,
        )  # fmt: skip

    def no_answer(self, runner: Attempt, deadline: float, ahead: Availability) -> RouterError:
        """Why the one model that was named did not answer."""
        model, result = runner.row.model, runner.result
        if result is None and runner.sent_at is not None:
            return ModelFailed(f"{model} did not answer within {deadline:g} s. Give it a longer deadline.")
        why = result.error if result and result.error else f"no permit within {deadline:g} s"
        if runner.unlogged:
            return ModelFailed(
                f"{model} was not asked: Postgres takes no log, and without it nothing is sent."
            )
        retry = max(SHORTEST_RETRY_SECONDS, ahead.retry_after_seconds)
        if result is not None and why.startswith(NO_CONNECTION):
            return BackendUnavailable(f"{model} was not asked: {why}")
        if result is None or result.outcome is Outcome.UNSENT:
            return CapacityExceeded(f"There is no room for {model}: {why}", retry)
        if result.outcome in NO_ROOM_OUTCOMES:
            return CapacityExceeded(f"{model} takes no more now: {why}", result.retry_after_seconds or retry)
        return ModelFailed(f"{model} gave no answer: {result.outcome.value}: {why}")

    # -- told as it happens -------------------------------------------------------------------------------

    def asked(self, runner: Attempt) -> None:
        """A call is to be made."""
        self.runners.append(runner)
        self.tell(EventKind.ASKED, f"{runner.row.model} is asked, as {WHY_ASKED[runner.row.role]}", runner)

    def ended(self, runner: Attempt) -> None:
        """A call has ended."""
        if runner.result is not None:
            why = f": {runner.result.error}" if runner.result.error else ""
            self.tell(EventKind.ENDED, f"{runner.row.model}: {runner.result.outcome.value}{why}", runner)

    def tell(self, kind: EventKind, text: str, runner: Attempt | None = None) -> None:
        """Tell the listener."""
        if self._listener is None:
            return
        call = runner.as_call(self.began) if runner else None
        try:
            self._listener(Event(kind, self.now(), text, call))
        except Exception:
            self._listener = None
            log.exception("whoever listened to an asking raised, and is told no more")


LINES = logging.getLogger("router.answers")  # whoever hosts the router says where its lines go


def tell(answer: Answer) -> None:
    """Write one JSON line about an answered prompt; never its text, which stands in `tasks`."""
    _lines.info(
        "late" if answer.late else "answered",
        task_id=answer.task_id, category=answer.category, confidence=round(answer.confidence, 3),
        preferred=answer.preferred, fallback=answer.fallback, answered_by=answer.model or "knowledge",
        rank=int(answer.rank), is_fallback=answer.rank < AnswerRank.CHOSEN_MODEL,
        provisional=answer.provisional, seconds=round(answer.seconds, 3), cost_usd=round(answer.cost_usd, 9),
        calls=[
            {"model": call.model, "role": call.role.value, "outcome": call.outcome and call.outcome.value}
            for call in answer.calls
        ],
    )  # fmt: skip


_lines = structlog.wrap_logger(
    LINES,
    processors=[
        structlog.stdlib.filter_by_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.JSONRenderer(),
    ],
    wrapper_class=structlog.stdlib.BoundLogger,
)
