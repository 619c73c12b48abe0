"""Decides what a request does next, from values alone.

The preferred model and the fallback start together. The preferred answer wins if it comes before the
deadline. If the preferred model fails, the next in rank is called while time allows, and the fallback's
answer is returned as soon as it is there. If the preferred model has no permit in time, it keeps waiting
while the next in rank is called; the first of them to get a permit is sent. At the deadline the best answer
so far is returned, or the passages.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MIN_TIME_SHARE = 0.1  # with less of the deadline left no other model is called
PERMIT_SHARE = 0.25  # of the deadline, before a call counts as waiting for its permit


class AttemptState(enum.Enum):
    """Progress of one call. WAITING_FOR_PERMIT and UNAVAILABLE may still be sent."""

    RUNNING = "running"  # sent, or waiting for a permit within its patience
    WAITING_FOR_PERMIT = "waiting for permit"  # for longer than its patience
    UNAVAILABLE = "unavailable"  # waiting for a model that is cooling down after failures
    ANSWERED = "answered"
    FAILED = "failed"  # sent without an answer, or the model was unavailable
    UNSENT = "unsent"


PENDING = frozenset({AttemptState.RUNNING, AttemptState.WAITING_FOR_PERMIT, AttemptState.UNAVAILABLE})


@dataclass(frozen=True, slots=True)
class RequestState:
    """State of one request. Times are in seconds since it arrived.

    `ranked` are the calls to models of the ranking, in the order they were started. `fallback` and `passages`
    are None where there are none. `next_model` is true if another model of the ranking may be called.
    """

    ranked: tuple[AttemptState, ...]
    fallback: AttemptState | None
    passages: AttemptState | None
    next_model: bool
    now: float
    deadline: float


@dataclass(frozen=True, slots=True)
class ReturnPreferred:
    """Return the answer of the ranked model at this index."""

    index: int


@dataclass(frozen=True, slots=True)
class ReturnFallback:
    """Return the fallback model's answer."""


@dataclass(frozen=True, slots=True)
class ReturnPassages:
    """Return the passages, or report that none were found."""


@dataclass(frozen=True, slots=True)
class TryNextModel:
    """Call the next model in rank."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait for a change, at most `seconds`."""

    seconds: float


Action = ReturnPreferred | ReturnFallback | ReturnPassages | TryNextModel | Wait


def next_action(state: RequestState) -> Action:
    """Returns the next action; Wait only while a better answer may still come before the deadline."""
    if AttemptState.ANSWERED in state.ranked:
        return ReturnPreferred(state.ranked.index(AttemptState.ANSWERED))
    left = state.deadline - state.now
    if state.fallback is AttemptState.ANSWERED and (left <= 0 or _fallback_is_due(state)):
        return ReturnFallback()
    if left <= 0:
        return ReturnPassages()
    if _may_try_next(state):
        return TryNextModel()
    if state.passages is not AttemptState.RUNNING and PENDING.isdisjoint({*state.ranked, state.fallback}):
        return ReturnPassages()
    return Wait(left)


def _fallback_is_due(state: RequestState) -> bool:
    """Returns whether the fallback's answer need not wait for a ranked model any longer."""
    failed = not {AttemptState.FAILED, AttemptState.UNAVAILABLE}.isdisjoint(state.ranked)
    return not _may_try_next(state) and (failed or AttemptState.RUNNING not in state.ranked)


def _may_try_next(state: RequestState) -> bool:
    time_allows = state.deadline - state.now > MIN_TIME_SHARE * state.deadline
    return state.next_model and time_allows and AttemptState.RUNNING not in state.ranked


def rank_models(places: Mapping[str, int], usable: Sequence[str]) -> tuple[str, ...]:
    """Returns the usable models that have a place, best first; equal places by name."""
    return tuple(sorted((model for model in usable if model in places), key=lambda m: (places[m], m)))


def fallback_order(listed: Sequence[str], usable: Sequence[str], preferred: str | None) -> tuple[str, ...]:
    """Returns the usable fallback models in the configured order, without the preferred model."""
    return tuple(model for model in listed if model in usable and model != preferred)


def permit_patience(deadline: float, permit_seconds: float) -> float:
    """Returns the seconds that a call waits for its permit before the next model in rank is called too."""
    return min(permit_seconds, PERMIT_SHARE * deadline)
