"""The values of asking: an answer, the calls behind it, and what is told while it is under way. No I/O."""

from __future__ import annotations

import enum
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from router.task import AnswerRank, Outcome, Role


@dataclass(frozen=True, slots=True)
class CallSummary:
    """One call of an asking as it stands now. Times in seconds since the prompt came.

    `outcome` is None while it is under way; `sent_seconds` is None if it never went out.
    """

    call_id: uuid.UUID
    model: str
    role: Role
    rank: AnswerRank
    started_seconds: float
    sent_seconds: float | None = None
    ended_seconds: float | None = None
    outcome: Outcome | None = None
    error: str | None = None
    cost_usd: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    retry_after_seconds: float | None = None  # when there may be a permit, or the provider wants us again


@dataclass(frozen=True, slots=True)
class Answer:
    """What a prompt was answered with.

    `model` is None if the text is passages from knowledge, whose `sources` are named. `provisional` says that
    a better answer may still come (`Router.late`). `cost_usd` is that of all calls that have ended so far,
    tokens are those of the call that answered. `task_id` is None if nothing could be logged.
    """

    text: str
    model: str | None
    rank: AnswerRank
    category: str
    confidence: float
    reason: str
    preferred: str | None
    fallback: str | None
    provisional: bool
    seconds: float
    cost_usd: float
    prompt_tokens: int | None
    completion_tokens: int | None
    sources: tuple[str, ...]
    task_id: int | None
    calls: tuple[CallSummary, ...]
    late: bool = False


class EventKind(str, enum.Enum):
    """What can be told while a prompt is being answered."""

    CATEGORISED = "categorised"  # category and why
    FOUND = "found"  # what knowledge holds
    ASKED = "asked"  # a model is to be called, and stands in line for a permit
    SENT = "sent"  # its call went out
    ENDED = "ended"  # its call ended; text says how
    ANSWERED = "answered"  # the answer is returned
    LATE = "late"  # a better one came afterwards
    TROUBLE = "trouble"  # something is away: what follows from it


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened, `seconds` after the prompt came; `text` is one line for people."""

    kind: EventKind
    seconds: float
    text: str
    call: CallSummary | None = None
    category: str | None = None
    confidence: float | None = None


Listener = Callable[[Event], None]
