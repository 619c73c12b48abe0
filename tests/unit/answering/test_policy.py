"""The race of preferred model and fallback: what is done next, for every way it can stand."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from router.answering.policy import (
    AttemptState,
    RequestState,
    ReturnFallback,
    ReturnPassages,
    ReturnPreferred,
    TryNextModel,
    Wait,
    fallback_order,
    next_action,
    permit_patience,
    ranked,
)

RUNNING, STUCK, RESTING = AttemptState.RUNNING, AttemptState.STUCK, AttemptState.RESTING
ANSWERED, FAILED, UNSENT = AttemptState.ANSWERED, AttemptState.FAILED, AttemptState.UNSENT
START = RequestState(
    chosen=(RUNNING,), fallback=RUNNING, passages=ANSWERED, next_model=True, now=1.0, deadline=10.0
)


@pytest.mark.parametrize(
    ("chosen", "fallback", "more", "now", "move"),
    [
        # The preferred model runs: the fallback's answer is held back until the deadline.
        ((RUNNING,), RUNNING, True, 1.0, Wait(9.0)),
        ((RUNNING,), ANSWERED, True, 1.0, Wait(9.0)),
        ((RUNNING,), ANSWERED, True, 10.0, ReturnFallback()),
        ((RUNNING,), RUNNING, True, 10.0, ReturnPassages()),
        ((ANSWERED,), ANSWERED, True, 1.0, ReturnPreferred(0)),
        ((ANSWERED,), RUNNING, True, 11.0, ReturnPreferred(0)),
        # It failed: the next in rank is asked, and the fallback's answer given as soon as it is there.
        ((FAILED,), RUNNING, True, 1.0, TryNextModel()),
        ((FAILED,), ANSWERED, True, 1.0, TryNextModel()),
        ((FAILED, RUNNING), RUNNING, True, 1.0, Wait(9.0)),
        ((FAILED, RUNNING), ANSWERED, True, 1.0, ReturnFallback()),
        ((FAILED, ANSWERED), ANSWERED, True, 1.0, ReturnPreferred(1)),
        ((FAILED,), RUNNING, True, 9.5, Wait(0.5)),  # time does not allow another one
        ((FAILED,), ANSWERED, True, 9.5, ReturnFallback()),
        # It has no permit: the next in rank takes its place, and the fallback's answer is held back for that.
        ((STUCK,), RUNNING, True, 1.0, TryNextModel()),
        ((STUCK, RUNNING), ANSWERED, True, 1.0, Wait(9.0)),
        ((UNSENT, RUNNING), ANSWERED, True, 1.0, Wait(9.0)),
        ((STUCK, STUCK), ANSWERED, False, 1.0, ReturnFallback()),
        ((STUCK, STUCK), FAILED, False, 1.0, Wait(9.0)),
        ((UNSENT, UNSENT), ANSWERED, False, 1.0, ReturnFallback()),
        # It rests after failures: that is as if it had failed.
        ((RESTING, RUNNING), ANSWERED, True, 1.0, ReturnFallback()),
        ((RESTING,), RUNNING, False, 1.0, Wait(9.0)),
        # Nothing better may come: there is nothing to wait for.
        ((FAILED, FAILED), FAILED, False, 1.0, ReturnPassages()),
        ((), None, False, 1.0, ReturnPassages()),
        ((), RUNNING, False, 1.0, Wait(9.0)),
        ((), ANSWERED, False, 1.0, ReturnFallback()),
    ],
)
def test_the_next_move(
    chosen: tuple[AttemptState, ...], fallback: AttemptState | None, more: bool, now: float, move: object
) -> None:
    race = replace(START, chosen=chosen, fallback=fallback, next_model=more, now=now)
    assert next_action(race) == move


def test_passages_that_are_still_looked_for_are_waited_for() -> None:
    race = replace(START, chosen=(FAILED,), fallback=FAILED, next_model=False, passages=RUNNING)
    assert next_action(race) == Wait(9.0)
    assert next_action(replace(race, now=10.0)) == ReturnPassages()


def every_standing() -> itertools.product[tuple[object, ...]]:
    chosen = [legs for size in range(3) for legs in itertools.product(AttemptState, repeat=size)]
    fallback = [None, RUNNING, ANSWERED, FAILED]
    return itertools.product(chosen, fallback, (RUNNING, ANSWERED), (True, False), (1.0, 9.5, 10.0, 99.0))


def test_it_always_ends_and_never_gives_what_is_not_there() -> None:
    for chosen, fallback, passages, more, now in every_standing():
        race = RequestState(chosen, fallback, passages, more, now, 10.0)  # type: ignore[arg-type]
        move = next_action(race)
        if isinstance(move, ReturnPreferred):
            assert race.chosen[move.index] is ANSWERED
        if isinstance(move, ReturnFallback):
            assert race.fallback is ANSWERED
            assert ANSWERED not in race.chosen
        if isinstance(move, Wait):
            assert 0 < move.seconds <= 10.0 - race.now
            alive = {RUNNING, STUCK, RESTING} & {*race.chosen, race.fallback, race.passages}
            assert alive, f"nothing can happen: {race}"
        if isinstance(move, TryNextModel):
            assert race.next_model
            assert RUNNING not in race.chosen
        if race.now >= race.deadline:
            assert isinstance(move, (ReturnPreferred, ReturnFallback, ReturnPassages))


def test_models_are_ranked_by_their_place_and_only_those_in_use() -> None:
    assert ranked({"b": 1, "a": 1, "c": 3, "gone": 2}, ("a", "b", "c", "no place")) == ("a", "b", "c")


def test_the_fallback_is_never_the_preferred_model_itself() -> None:
    assert fallback_order(("cheap", "cheaper", "gone"), ("cheap", "cheaper"), "cheap") == ("cheaper",)


def test_a_short_deadline_makes_impatient() -> None:
    assert permit_patience(30.0, 2.0) == 2.0
    assert permit_patience(1.0, 2.0) == 0.25
