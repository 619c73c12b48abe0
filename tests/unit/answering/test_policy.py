"""The next action of a request, for every state."""

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
    rank_models,
)

RUNNING, WAITING = AttemptState.RUNNING, AttemptState.WAITING_FOR_PERMIT
UNAVAILABLE = AttemptState.UNAVAILABLE
ANSWERED, FAILED, UNSENT = AttemptState.ANSWERED, AttemptState.FAILED, AttemptState.UNSENT
START = RequestState(
    ranked=(RUNNING,), fallback=RUNNING, passages=ANSWERED, next_model=True, now=1.0, deadline=10.0
)


@pytest.mark.parametrize(
    ("ranked", "fallback", "more", "now", "action"),
    [
        # The preferred model is running: the fallback's answer is held until the deadline.
        ((RUNNING,), RUNNING, True, 1.0, Wait(9.0)),
        ((RUNNING,), ANSWERED, True, 1.0, Wait(9.0)),
        ((RUNNING,), ANSWERED, True, 10.0, ReturnFallback()),
        ((RUNNING,), RUNNING, True, 10.0, ReturnPassages()),
        ((ANSWERED,), ANSWERED, True, 1.0, ReturnPreferred(0)),
        ((ANSWERED,), RUNNING, True, 11.0, ReturnPreferred(0)),
        # It failed: the next in rank is called, and the fallback's answer returned as soon as it is there.
        ((FAILED,), RUNNING, True, 1.0, TryNextModel()),
        ((FAILED,), ANSWERED, True, 1.0, TryNextModel()),
        ((FAILED, RUNNING), RUNNING, True, 1.0, Wait(9.0)),
        ((FAILED, RUNNING), ANSWERED, True, 1.0, ReturnFallback()),
        ((FAILED, ANSWERED), ANSWERED, True, 1.0, ReturnPreferred(1)),
        ((FAILED,), RUNNING, True, 9.5, Wait(0.5)),  # too little time for another model
        ((FAILED,), ANSWERED, True, 9.5, ReturnFallback()),
        # It has no permit: the next in rank is called, and the fallback's answer is held for that one.
        ((WAITING,), RUNNING, True, 1.0, TryNextModel()),
        ((WAITING, RUNNING), ANSWERED, True, 1.0, Wait(9.0)),
        ((UNSENT, RUNNING), ANSWERED, True, 1.0, Wait(9.0)),
        ((WAITING, WAITING), ANSWERED, False, 1.0, ReturnFallback()),
        ((WAITING, WAITING), FAILED, False, 1.0, Wait(9.0)),
        ((UNSENT, UNSENT), ANSWERED, False, 1.0, ReturnFallback()),
        # It is cooling down: the same as failed.
        ((UNAVAILABLE, RUNNING), ANSWERED, True, 1.0, ReturnFallback()),
        ((UNAVAILABLE,), RUNNING, False, 1.0, Wait(9.0)),
        # No better answer may come: nothing to wait for.
        ((FAILED, FAILED), FAILED, False, 1.0, ReturnPassages()),
        ((), None, False, 1.0, ReturnPassages()),
        ((), RUNNING, False, 1.0, Wait(9.0)),
        ((), ANSWERED, False, 1.0, ReturnFallback()),
    ],
)
def test_next_action(
    ranked: tuple[AttemptState, ...], fallback: AttemptState | None, more: bool, now: float, action: object
) -> None:
    state = replace(START, ranked=ranked, fallback=fallback, next_model=more, now=now)
    assert next_action(state) == action


def test_waits_for_a_search_in_progress() -> None:
    state = replace(START, ranked=(FAILED,), fallback=FAILED, next_model=False, passages=RUNNING)
    assert next_action(state) == Wait(9.0)
    assert next_action(replace(state, now=10.0)) == ReturnPassages()


def every_state() -> itertools.product[tuple[object, ...]]:
    ranked = [states for size in range(3) for states in itertools.product(AttemptState, repeat=size)]
    fallback = [None, RUNNING, ANSWERED, FAILED]
    return itertools.product(ranked, fallback, (RUNNING, ANSWERED), (True, False), (1.0, 9.5, 10.0, 99.0))


def test_every_state_leads_to_an_answer_that_exists() -> None:
    for ranked, fallback, passages, more, now in every_state():
        state = RequestState(ranked, fallback, passages, more, now, 10.0)  # type: ignore[arg-type]
        action = next_action(state)
        if isinstance(action, ReturnPreferred):
            assert state.ranked[action.index] is ANSWERED
        if isinstance(action, ReturnFallback):
            assert state.fallback is ANSWERED
            assert ANSWERED not in state.ranked
        if isinstance(action, Wait):
            assert 0 < action.seconds <= 10.0 - state.now
            pending = {RUNNING, WAITING, UNAVAILABLE} & {*state.ranked, state.fallback, state.passages}
            assert pending, f"nothing to wait for: {state}"
        if isinstance(action, TryNextModel):
            assert state.next_model
            assert RUNNING not in state.ranked
        if state.now >= state.deadline:
            assert isinstance(action, (ReturnPreferred, ReturnFallback, ReturnPassages))


def test_usable_models_are_ranked_by_place() -> None:
    assert rank_models({"b": 1, "a": 1, "c": 3, "gone": 2}, ("a", "b", "c", "no place")) == ("a", "b", "c")


def test_the_preferred_model_is_not_its_own_fallback() -> None:
    assert fallback_order(("cheap", "cheaper", "gone"), ("cheap", "cheaper"), "cheap") == ("cheaper",)


def test_patience_is_a_share_of_a_short_deadline() -> None:
    assert permit_patience(30.0, 2.0) == 2.0
    assert permit_patience(1.0, 2.0) == 0.25
