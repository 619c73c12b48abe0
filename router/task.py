"""Values that pass between queue, limiter, backend and worker. No I/O."""

from __future__ import annotations

import enum
import re
import secrets
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from router.errors import InputError

if TYPE_CHECKING:  # reading requests takes pydantic, which few programs need at once
    from router.request import ModelRequest

CLIENT_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}"  # as is_client() in sql/functions/10_helpers.sql


class TaskStatus(str, enum.Enum):
    """Values of `tasks.status`. The view `task_states` derives `running` in addition."""

    UNSOLVED = "unsolved"
    SOLVED = "solved"
    FAILED = "failed"


class AnswerRank(enum.IntEnum):
    """Rank of an answer by its source; an answer replaces only one of lower rank.

    The chosen model is any model of the category's ranking, as opposed to a fallback model.
    """

    PASSAGES = 1
    FALLBACK_MODEL = 2
    CHOSEN_MODEL = 3


class Outcome(str, enum.Enum):
    """Outcome of one call; the values of `model_calls.outcome`.

    `router.models.replies` maps replies to outcomes; docs/architecture.md shows the whole table.
    """

    ANSWERED = "answered"
    RATE_LIMITED = "rate_limited"  # the quota is exhausted
    OVERLOADED = "overloaded"  # the backend names a time to retry
    UNAVAILABLE = "unavailable"  # a gateway answers for a backend that is down, or the connection broke
    DENIED = "denied"  # access or address are wrong: the operator's to correct
    ERROR = "error"
    TIMEOUT = "timeout"
    GARBAGE = "garbage"  # invalid response: 2xx without a usable answer
    REJECTED = "rejected"  # the model rejects this prompt
    TOO_LONG = "too_long"  # the prompt does not fit into the model's context
    UNKNOWN_MODEL = "unknown_model"
    UNSENT = "unsent"  # no byte was written
    ABANDONED = "abandoned"  # canceled by the caller; the backend may still work on it
    LOST = "lost"  # the worker's lease expired; the only outcome that a later one replaces

    @property
    def counts_as_attempt(self) -> bool:
        """Whether the call uses up an attempt of its task.

        An exhausted quota, an outage or a missing model does not. Postgres bounds lost claims.
        """
        return self in _ATTEMPTS

    @property
    def is_evidence(self) -> bool:
        """Whether the call counts for or against its model in the ranking.

        What is the prompt's fault does not: otherwise a client could lower a model's rank by bad prompts.
        """
        return self in _EVIDENCE


_ATTEMPTS = frozenset({Outcome.ERROR, Outcome.TIMEOUT, Outcome.GARBAGE, Outcome.REJECTED, Outcome.ANSWERED})
_EVIDENCE = frozenset(
    {
        Outcome.ANSWERED, Outcome.ERROR, Outcome.TIMEOUT, Outcome.GARBAGE, Outcome.OVERLOADED,
        Outcome.UNKNOWN_MODEL,
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Claim:
    """Hold on one task, fenced by `call_id`; it expires with the lease of the worker process."""

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
    request: ModelRequest | None = None  # None: a bare prompt
    client: str = ""


@dataclass(frozen=True, slots=True)
class ContextLimit:
    """Tokens that a model takes for one call, prompt and answer together; see `router.models.context`.

    `token_limit` is that of the traffic target, if any. `is_largest`: no model in use takes a longer prompt.
    """

    model: str
    tokens: int
    tokens_per_byte: float
    token_limit: int | None = None
    is_largest: bool = False

    def fits(self, prompt_bytes: int, max_tokens: int) -> bool:
        """Whether a prompt of this many bytes, and its answer, are expected to fit."""
        return prompt_bytes * self.tokens_per_byte + max_tokens <= self.tokens


@dataclass(frozen=True, slots=True)
class CallResult:
    """Result of one call to the Models Backend, successful or not.

    `retry_after_seconds` comes from the provider (429, 503). `error` is one line without secrets. Tokens are
    the provider's count, None where it reported none. `finish_reason`, `tool_calls` and `refusal` are as in
    OpenAI's API.
    """

    outcome: Outcome
    answer: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost_usd: float | None = None
    latency_seconds: float | None = None
    retry_after_seconds: float | None = None
    error: str | None = None
    finish_reason: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    refusal: str | None = None
    cached_tokens: int | None = None
    may_go_on: bool = False  # no reply: the backend may still be working on it

    @property
    def message(self) -> dict[str, Any] | None:
        """What the answer is beside its text: the value of `tasks.answer_message`; None for a plain text."""
        found = {
            "finish_reason": self.finish_reason,
            "tool_calls": list(self.tool_calls),
            "refusal": self.refusal,
            "cached_tokens": self.cached_tokens,
        }
        kept = {name: value for name, value in found.items() if value}
        return None if kept.keys() <= {"finish_reason"} and self.finish_reason in {None, "stop"} else kept

    @property
    def used_tokens(self) -> int | None:
        """Tokens of prompt and completion; None if the provider reported neither."""
        if self.prompt_tokens is None and self.completion_tokens is None:
            return None
        return (self.prompt_tokens or 0) + (self.completion_tokens or 0)


def new_call_id(now_seconds: float) -> uuid.UUID:
    """Returns a UUIDv7 (RFC 9562, section 5.7) for `now_seconds`, the database's Unix time.

    The machine's clock will not do: the call log is partitioned by this time.
    """
    milliseconds = int(now_seconds * 1000)
    value = (milliseconds & 0xFFFF_FFFF_FFFF) << 80
    value |= 0x7 << 76
    value |= secrets.randbits(12) << 64
    value |= 0b10 << 62
    value |= secrets.randbits(62)
    return uuid.UUID(int=value)


def checked_client(client: str) -> str:
    """Returns the client. Raises InputError unless it matches CLIENT_PATTERN or is empty."""
    if client and re.fullmatch(CLIENT_PATTERN, client) is None:
        raise InputError(
            f"{client[:80]!r} is not a client: use letters, digits and . _ @ -, at most 64 characters."
        )
    return client


def client_of_user(name: str | None) -> str:
    """Returns the client for a user name of another system: characters that a client cannot have become -."""
    return re.sub(r"[^A-Za-z0-9._@-]", "-", name or "").lstrip("._@-")[:64]


class Role(str, enum.Enum):
    """Role of a call for its task; the values of `model_calls.role`. Calls without a task have a purpose."""

    BATCH = "batch"  # a worker of solve_tasks
    ASKED = "asked"  # the preferred model
    NAMED = "named"  # the only model, named by the request
    NEXT = "next"  # the next in rank, after a failure
    FALLBACK = "fallback"  # the cheap model, with retrieved passages
    PASSAGES = "passages"  # no model: the retrieved passages
