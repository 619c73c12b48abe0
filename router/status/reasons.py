"""Reasons for not sending: their codes, in order of precedence. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from datetime import datetime

_READ_ONLY = ("READONLY", "read only replica", "read-only", "NOREPLICAS", "not enough good replicas")


class Reason(str, enum.Enum):
    """Codes of the reasons, in order of precedence: of several that hold at once, the first is shown.

    A reason comes before those that it causes or hides. Where two are independent, the one that stops more
    comes first.
    """

    # All models
    DATABASE_UNAVAILABLE = "database_unavailable"
    DATABASE_READ_ONLY = "database_read_only"
    SCHEMA = "schema"  # not as this version of the program expects it
    OUTDATED = "outdated"  # the database was migrated by a newer version
    TRIGGERS_MISSING = "triggers_missing"
    ROSTER_EMPTY = "roster_empty"
    PAUSED = "paused"
    NO_WORKER = "no_worker"
    LEASE_LOST = "lease_lost"
    REDIS_UNAVAILABLE = "redis_unavailable"
    REDIS_READ_ONLY = "redis_read_only"
    # One model
    MODEL_RETIRED = "model_retired"
    MODEL_PAUSED = "model_paused"
    INVALID_TARGET = "invalid_target"
    NO_TARGET = "no_target"
    STOPPED = "stopped"  # its target is 0
    CLAIMS_FAILING = "claims_failing"
    BACKEND_UNREACHABLE = "backend_unreachable"
    BREAKER_OPEN = "breaker_open"
    HALF_OPEN = "half_open"
    COOLING_DOWN = "cooling_down"
    # Nothing to do
    NO_TASKS = "no_tasks"
    NOT_READY = "not_ready"  # its tasks are in flight, or wait for a retry or for their category
    NO_TASKS_FOR_MODEL = "no_tasks_for_model"
    # At its limits
    REBUILDING = "rebuilding"
    TOO_MANY_TOKENS = "too_many_tokens"
    TOO_EXPENSIVE = "too_expensive"
    BUDGET = "budget"
    TOKENS = "tokens"
    WINDOW = "window"
    CONCURRENCY = "concurrency"
    WORKER_FULL = "worker_full"

    @property
    def alarm(self) -> bool:
        """Whether somebody should act; False for a decision of an operator and for ordinary waits."""
        return self not in _ORDINARY

    @property
    def chosen(self) -> bool:
        """Whether an operator decided so."""
        return self in _CHOSEN


ORDER = {reason: place for place, reason in enumerate(Reason)}
_CHOSEN = frozenset({Reason.PAUSED, Reason.MODEL_RETIRED, Reason.MODEL_PAUSED, Reason.STOPPED})
_ORDINARY = frozenset(
    _CHOSEN | {reason for reason, place in ORDER.items() if place >= ORDER[Reason.NO_TASKS]}
) - {Reason.TOO_MANY_TOKENS, Reason.TOO_EXPENSIVE, Reason.BUDGET}


@dataclass(frozen=True, slots=True)
class WhyNot:
    """Reason for not sending: code, one sentence, and its start, None if unknown."""

    code: Reason
    text: str
    since: datetime | None = None
    alarm: bool = field(init=False)  # whether somebody should act

    def __post_init__(self) -> None:
        object.__setattr__(self, "alarm", self.code.alarm)


def redis_reason(error: str) -> Reason:
    """Returns whether Redis is unavailable, or refuses to write, by the text of its error."""
    read_only = any(word.lower() in error.lower() for word in _READ_ONLY)
    return Reason.REDIS_READ_ONLY if read_only else Reason.REDIS_UNAVAILABLE
