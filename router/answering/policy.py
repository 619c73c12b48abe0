"""The race of preferred model and fallback, decided from values and a `now`: what to do next.

The preferred model and the fallback start together. The preferred answer wins if it comes within the
deadline. If the preferred model fails, the next in rank is asked while time allows, and the fallback
model's answer is given as soon as it is there. If it has no permit in time, it stays in line while the next
in rank is asked, and whichever has one first is sent to. At the deadline the best that is there is given, at
the least the passages.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TIME_ALLOWS_SHARE = 0.1  # with less of the deadline left nobody else is asked
PERMIT_SHARE = 0.25  # of the deadline that is borne in the line for a permit


class AttemptState(enum.Enum):
    """How far one runner is."""

    RUNNING = "running"  # sent, or in line for a permit and still borne with
    STUCK = "stuck"  # in line for longer than is borne; it may still be sent
    RESTING = "resting"  # in line for a model that rests after failures; it may still be sent
    ANSWERED = "answered"
    FAILED = "failed"  # it was sent and brought nothing, or its model rested
    UNSENT = "unsent"  # it never was sent


@dataclass(frozen=True, slots=True)
class RequestState:
    """The race as it stands. `chosen` are the models of the ranking in the order they were asked.

    `fallback` and `passages` are None where there is none. Times in seconds since the prompt came.
    """

    chosen: tuple[AttemptState, ...]
    fallback: AttemptState | None
    passages: AttemptState | None
    next_model: bool  # there is another model that may be asked
    now: float
    deadline: float


@dataclass(frozen=True, slots=True)
class ReturnPreferred:
    """Give the answer of the chosen model at this index."""

    index: int


@dataclass(frozen=True, slots=True)
class ReturnFallback:
    """Give the fallback model's answer."""


@dataclass(frozen=True, slots=True)
class ReturnPassages:
    """Give the passages, or say that nothing is known."""


@dataclass(frozen=True, slots=True)
class TryNextModel:
    """Ask the next model in rank."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do until something happens, at most for `seconds`."""

    seconds: float


Action = ReturnPreferred | ReturnFallback | ReturnPassages | TryNextModel | Wait


def next_action(race: RequestState) -> Action:
    """The next move; Wait only while something better may still come before the deadline."""
    if AttemptState.ANSWERED in race.chosen:
        return ReturnPreferred(race.chosen.index(AttemptState.ANSWERED))
    left = race.deadline - race.now
    if race.fallback is AttemptState.ANSWERED and (left <= 0 or _chosen_is_out(race)):
        return ReturnFallback()
    if left <= 0:
        return ReturnPassages()
    if _may_ask(race):
        return TryNextModel()
    hopeful = {AttemptState.RUNNING, AttemptState.STUCK, AttemptState.RESTING} & {*race.chosen, race.fallback}
    if not hopeful and race.passages is not AttemptState.RUNNING:
        return ReturnPassages()
    return Wait(left)


def _chosen_is_out(race: RequestState) -> bool:
    """Whether the fallback need not be held back any longer: the chosen model failed, or nobody runs."""
    failed = bool({AttemptState.FAILED, AttemptState.RESTING} & {*race.chosen})
    return not _may_ask(race) and (failed or AttemptState.RUNNING not in race.chosen)


def _may_ask(race: RequestState) -> bool:
    """Whether the next in rank is to be asked now: nobody of the ranking runs, and time allows."""
    time_allows = race.deadline - race.now > TIME_ALLOWS_SHARE * race.deadline
    return race.next_model and time_allows and AttemptState.RUNNING not in race.chosen


def ranked(places: Mapping[str, int], usable: Sequence[str]) -> tuple[str, ...]:
    """The usable models that have a place, the best first; equal places by name."""
    return tuple(sorted((model for model in usable if model in places), key=lambda m: (places[m], m)))


def fallback_order(wanted: Sequence[str], usable: Sequence[str], preferred: str | None) -> tuple[str, ...]:
    """The models that may answer as fallback, in the config's order; never the preferred one itself."""
    return tuple(model for model in wanted if model in usable and model != preferred)


def permit_patience(deadline: float, permit_seconds: float) -> float:
    """Seconds that a prompt stands in one model's line for a permit before the next in rank is asked too."""
    return min(permit_seconds, PERMIT_SHARE * deadline)
