"""The values that pass between queue, limiter, backend and worker. No I/O."""

from __future__ import annotations

import enum
import secrets
import uuid
from dataclasses import dataclass
from datetime import datetime


class TaskStatus(str, enum.Enum):
    """What `tasks.status` may hold; `running` is derived, in the view `task_states`."""

    UNSOLVED = "unsolved"
    SOLVED = "solved"
    FAILED = "failed"


class AnswerRank(enum.IntEnum):
    """How good the giver of an answer is; an answer replaces only one of lower rank."""

    PASSAGES = 1
    FALLBACK_MODEL = 2
    CHOSEN_MODEL = 3


class Outcome(str, enum.Enum):
    """What one call came to; the values of `model_calls.outcome`.

    `counts_as_attempt` tells whether the task paid for it: a quota that was merely used up, or a model
    that is not there, is not the task's fault.
    """

    ANSWERED = "answered"
    RATE_LIMITED = "rate_limited"  # 429
    OVERLOADED = "overloaded"  # 503
    ERROR = "error"  # other 5xx, connection broken
    TIMEOUT = "timeout"
    GARBAGE = "garbage"  # 200, but not an answer
    REJECTED = "rejected"  # other 4xx: this prompt, by this model
    UNKNOWN_MODEL = "unknown_model"  # 404
    UNSENT = "unsent"  # nothing left this machine
    ABANDONED = "abandoned"  # whoever asked gave it up on purpose; the backend may still work on it
    LOST = "lost"  # the worker's lease ran out; the only outcome that a real one replaces

    @property
    def counts_as_attempt(self) -> bool:
        return self in _COUNTED


_COUNTED = frozenset(
    {Outcome.ERROR, Outcome.TIMEOUT, Outcome.GARBAGE, Outcome.REJECTED, Outcome.LOST, Outcome.ANSWERED}
)


@dataclass(frozen=True, slots=True)
class Claim:
    """A worker's fenced hold on one task; `call_id` is the fence."""

    call_id: uuid.UUID
    task_id: int
    model: str
    category: str
    prompt: str
    prompt_version: int
    attempt: int
    max_tokens: int
    reserved_tokens: int
    deadline_at: datetime | None


@dataclass(frozen=True, slots=True)
class CallResult:
    """What one call to the Models Backend came to, whatever happened.

    `retry_after_seconds` is the provider's own word (429, 503); `error` is one line for people, without
    secrets. Tokens are the provider's count, None where it gave none.
    """

    outcome: Outcome
    answer: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost_usd: float | None = None
    latency_seconds: float | None = None
    retry_after_seconds: float | None = None
    error: str | None = None
    may_go_on: bool = False  # no answer came: the backend may still be working on it

    @property
    def used_tokens(self) -> int | None:
        """Prompt and completion together; None if the provider did not say."""
        if self.prompt_tokens is None and self.completion_tokens is None:
            return None
        return (self.prompt_tokens or 0) + (self.completion_tokens or 0)


def new_call_id(now_seconds: float) -> uuid.UUID:
    """A UUIDv7 (RFC 9562, section 5.7) for the database's time `now_seconds` (Unix epoch).

    The caller passes the database's time, not the machine's: the call log is partitioned by it.
    """
    milliseconds = int(now_seconds * 1000)
    value = (milliseconds & 0xFFFF_FFFF_FFFF) << 80
    value |= 0x7 << 76
    value |= secrets.randbits(12) << 64
    value |= 0b10 << 62
    value |= secrets.randbits(62)
    return uuid.UUID(int=value)


class Role(str, enum.Enum):
    """Why a model was called; the values of `model_calls.role`. Without a task its purpose stands there."""

    BATCH = "batch"  # by a worker of solve_tasks
    ASKED = "asked"  # the preferred model, or the one that was named
    NEXT = "next"  # the next in rank, after the one before failed
    FALLBACK = "fallback"  # the cheap model, given passages
    PASSAGES = "passages"  # no model: what was found in knowledge
