"""Values of answering: an answer, the calls made for it, and the events on the way. No I/O."""

from __future__ import annotations

import enum
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from router.task import AnswerRank, Outcome, Role

MIN_DEADLINE_SECONDS = 0.05
MAX_DEADLINE_SECONDS = 3600.0
MAX_TOKENS = 1_000_000


@dataclass(frozen=True, slots=True)
class CallSummary:
    """One call of a request. Times are in seconds since the request arrived.

    `outcome` is None while the call is in progress. `sent_seconds` is None if it was not sent.
    `retry_after_seconds` is the expected wait for a permit, or the wait that the provider asked for.
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
    retry_after_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer to one prompt.

    `model` is None if the text is retrieved passages; `sources` names their origins. `provisional` is true
    while a better answer may still come (`Router.late`). `cost_usd` covers all calls that have ended; token
    counts are those of the call that answered. `task_id` is None if the request could not be logged.
    `finish_reason`, `tool_calls` and `refusal` are as in OpenAI's API.
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
    finish_reason: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    refusal: str | None = None
    cached_tokens: int | None = None


class EventKind(str, enum.Enum):
    """Kinds of event while a request is answered."""

    CATEGORISED = "categorised"
    FOUND = "found"  # the knowledge search has ended
    ASKED = "asked"  # a call was created and waits for its permit
    SENT = "sent"
    ENDED = "ended"  # a call ended; the text has its outcome
    ANSWERED = "answered"
    LATE = "late"  # a better answer came after the one that was returned
    TROUBLE = "trouble"


@dataclass(frozen=True, slots=True)
class Event:
    """One event, `seconds` after the request arrived. `text` is one line for people."""

    kind: EventKind
    seconds: float
    text: str
    call: CallSummary | None = None
    category: str | None = None
    confidence: float | None = None


Listener = Callable[[Event], None]
