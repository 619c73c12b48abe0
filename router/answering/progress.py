"""Progress of one request: emits events, builds the final answer and logs it."""

from __future__ import annotations

import logging
import math
import time

import structlog

from router.answering.answer import Answer, Event, EventKind, Listener
from router.answering.attempt import Attempt
from router.answering.fallback import NOTHING_FOUND, sources
from router.answering.plan import RoutingPlan
from router.answering.policy import AttemptState
from router.errors import (
    BackendUnavailable,
    CapacityExceeded,
    ContextLengthExceeded,
    ModelFailed,
    RouterError,
)
from router.knowledge import SearchResult
from router.models import NO_CONNECTION, Availability
from router.task import AnswerRank, Outcome, Role

log = logging.getLogger("router.answering")

CAPACITY_OUTCOMES = frozenset({Outcome.RATE_LIMITED, Outcome.OVERLOADED, Outcome.UNSENT})
MIN_RETRY_SECONDS = 1.0
ROLE_TEXTS = {
    Role.ASKED: "preferred model",
    Role.NAMED: "named model",
    Role.NEXT: "next in rank",
    Role.FALLBACK: "fallback",
}


class Progress:
    """Attempts and search result of one request. A listener that raises is logged and removed."""

    def __init__(self, began: float, listener: Listener | None) -> None:
        self.began = began
        self.attempts: list[Attempt] = []
        self.found: SearchResult = NOTHING_FOUND
        self._listener = listener

    def now(self) -> float:
        """Returns the seconds since the request arrived."""
        return time.monotonic() - self.began

    @property
    def ranked(self) -> list[Attempt]:
        """The attempts at models of the ranking, in the order they were started."""
        return [attempt for attempt in self.attempts if attempt.row.rank is AnswerRank.CHOSEN_MODEL]

    def best(self) -> Attempt | None:
        """Returns the attempt with the best answer so far."""
        answered = [attempt for attempt in self.attempts if attempt.state is AttemptState.ANSWERED]
        return max(answered, key=lambda attempt: attempt.row.rank, default=None)

    def answer(
        self,
        attempt: Attempt | None,
        plan: RoutingPlan,
        *,
        provisional: bool,
        task_id: int | None,
        late: bool,
    ) -> Answer:
        """Builds the answer of this attempt, or of the passages if it is None."""
        result = attempt.result if attempt else None
        rank = attempt.row.rank if attempt else AnswerRank.PASSAGES
        calls = tuple(each.summary(self.began) for each in self.attempts)
        return Answer(
            text=self.found.as_answer() if result is None else result.answer or "",
            model=attempt.row.model if attempt else None, rank=rank, category=plan.category,
            confidence=plan.confidence or 0.0, reason=plan.reason, preferred=plan.preferred,
            fallback=plan.fallback, provisional=provisional, seconds=self.now(),
            cost_usd=sum(call.cost_usd or 0.0 for call in calls),
            prompt_tokens=result.prompt_tokens if result else None,
            completion_tokens=result.completion_tokens if result else None,
            sources=sources(self.found) if rank < AnswerRank.CHOSEN_MODEL else (),
            task_id=task_id, calls=calls, late=late,
            finish_reason=result.finish_reason if result else None,
            tool_calls=result.tool_calls if result else (),
            refusal=result.refusal if result else None,
            cached_tokens=result.cached_tokens if result else None,
        )  # fmt: skip

    def no_answer(self, attempt: Attempt, deadline: float, expected: Availability) -> RouterError:
        """Returns the error to raise because the one named model did not answer."""
        model, result = attempt.row.model, attempt.result
        if attempt.unlogged:
            return ModelFailed(
                f"{model} was not called: the call could not be logged because Postgres is unavailable."
            )
        if result is None and attempt.sent_at is not None:
            return ModelFailed(f"{model} did not answer within {deadline:g} s. Use a longer deadline.")
        why = (result.error if result else None) or f"no permit within {deadline:g} s"
        if why.startswith(NO_CONNECTION):
            return BackendUnavailable(f"{model} was not called: {why}")
        if attempt.too_long:
            return ContextLengthExceeded(f"The prompt is too long for {model}: {why}")
        if result is None or result.outcome in CAPACITY_OUTCOMES:
            seconds = max(MIN_RETRY_SECONDS, expected.retry_after_seconds)
            if result is not None and result.outcome is not Outcome.UNSENT:
                seconds = result.retry_after_seconds or seconds
            return at_capacity(model, why, seconds)
        return ModelFailed(f"{model} failed: {result.outcome.value}: {why}")

    def started(self, attempt: Attempt) -> None:
        """Adds an attempt."""
        self.attempts.append(attempt)
        self.emit(EventKind.ASKED, f"calling {attempt.row.model} ({ROLE_TEXTS[attempt.row.role]})", attempt)

    def ended(self, attempt: Attempt) -> None:
        """Reports the outcome of an attempt."""
        if attempt.result is not None:
            why = f": {attempt.result.error}" if attempt.result.error else ""
            self.emit(EventKind.ENDED, f"{attempt.row.model}: {attempt.result.outcome.value}{why}", attempt)

    def emit(self, kind: EventKind, text: str, attempt: Attempt | None = None) -> None:
        """Sends an event to the listener."""
        if self._listener is None:
            return
        call = attempt.summary(self.began) if attempt else None
        try:
            self._listener(Event(kind, self.now(), text, call))
        except Exception:
            self._listener = None
            log.exception("event listener raised and was removed")


def unanswered(began: float, category: str) -> Answer:
    """Returns the answer of a router that could not be opened by the deadline."""
    return Answer(
        text=NOTHING_FOUND.as_answer(), model=None, rank=AnswerRank.PASSAGES, category=category,
        confidence=0.0, reason="the router was not open by the deadline", preferred=None, fallback=None,
        provisional=False, seconds=time.monotonic() - began, cost_usd=0.0, prompt_tokens=None,
        completion_tokens=None, sources=(), task_id=None, calls=(),
    )  # fmt: skip


def at_capacity(model: str, why: str, retry_after_seconds: float) -> CapacityExceeded:
    """Returns the error for a model that has no permit in time."""
    text = f"{model} is at capacity: {why.rstrip('.')}. Retry in {math.ceil(retry_after_seconds)} s."
    return CapacityExceeded(text, retry_after_seconds)


def answered_text(answer: Answer) -> str:
    """Returns one line about who answered."""
    if answer.model is not None:
        return f"answered by {answer.model}"
    passages = "returning passages" if answer.sources else "no relevant passages were found"
    return f"no model answered; {passages}"


def log_answer(answer: Answer) -> None:
    """Writes one JSON line about an answered request, without its texts."""
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
    logging.getLogger("router.answers"),  # the host program configures where it goes
    processors=[
        structlog.stdlib.filter_by_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.JSONRenderer(),
    ],
    wrapper_class=structlog.stdlib.BoundLogger,
)
