"""Comparison of trials: paired differences, significance, and trials that show nothing."""

from __future__ import annotations

import random

import pytest

from router.discovery.comparison import (
    TrialCall,
    TrialResult,
    TrialVerdict,
    could_win,
    has_failed,
    judge_trial,
)
from router.settings.discovery import TrialSettings
from router.settings.learning import UtilitySettings
from router.task import Outcome

SOURCES = {"check": 1.0, "reference": 2.0, "judge": 2.0}


def answered(score: float = 1.0, seconds: float = 5.0, cost_usd: float = 0.001) -> TrialCall:
    return TrialCall(Outcome.ANSWERED, {"check": score}, seconds, cost_usd)


def failed(outcome: Outcome = Outcome.ERROR) -> TrialCall:
    return TrialCall(outcome, error="it broke")


def judged(candidate: list[TrialCall], incumbent: list[TrialCall], **settings: float) -> TrialResult:
    trials = TrialSettings.model_validate(settings)
    return judge_trial(candidate, incumbent, UtilitySettings(), SOURCES, trials)


def test_a_significantly_better_candidate_wins() -> None:
    result = judged([answered()] * 30, [answered(0.4)] * 30)
    assert (result.verdict, result.pairs) == (TrialVerdict.WON, 30)
    assert result.difference == pytest.approx(0.5 * 0.6)  # the weight of the score
    assert result.lower > 0.2
    assert "+0.300 +-" in result.reason


@pytest.mark.parametrize(
    "candidate",
    [
        [answered()] * 30,  # as good
        [answered(0.9)] * 30,  # worse
        [answered(1.0, seconds=60.0)] * 30,  # as good, and slow
        [answered(1.0, cost_usd=0.05)] * 30,  # as good, and costly
        [answered()] * 24 + [failed()] * 6,  # as good when it answers
    ],
)
def test_a_candidate_that_is_not_better_loses(candidate: list[TrialCall]) -> None:
    assert judged(candidate, [answered()] * 30).verdict is TrialVerdict.LOST


def test_fewer_prompts_make_the_same_difference_less_significant() -> None:
    many = judged([answered()] * 30, [answered(0.7)] * 30)
    few = judged([answered()] * 4, [answered(0.7)] * 4, min_answers=1)
    assert (many.verdict, few.verdict) == (TrialVerdict.WON, TrialVerdict.LOST)
    assert few.difference == pytest.approx(many.difference)
    assert few.error > 3 * many.error > 0  # even if all prompts agree


def test_pairing_cancels_the_difficulty_of_prompts() -> None:
    hard = [0.1 * (n % 10) for n in range(30)]
    paired = judged([answered(score + 0.1) for score in hard], [answered(score) for score in hard])
    crossed = judged([answered(score + 0.1) for score in hard], [answered(score) for score in hard[::-1]])
    assert paired.difference == pytest.approx(crossed.difference)
    assert paired.error < crossed.error / 2


def test_calls_without_a_permit_or_quota_are_not_compared() -> None:
    limited = [failed(Outcome.RATE_LIMITED)] * 10 + [TrialCall(error="no permit in time")] * 5
    result = judged([answered()] * 15 + limited, [answered(0.4)] * 30)
    assert (result.verdict, result.pairs) == (TrialVerdict.WON, 15)
    assert judged([answered()] * 30, [answered(0.4)] * 15 + limited).pairs == 15


def test_too_few_calls_are_not_compared() -> None:
    few = [answered()] * 5 + [failed(Outcome.RATE_LIMITED)] * 25
    assert judged(few, [answered(0.4)] * 30).verdict is TrialVerdict.UNREACHABLE
    assert judged([answered()] * 30, few).verdict is TrialVerdict.VOID


def test_a_trial_with_a_failing_incumbent_is_void() -> None:
    result = judged([failed()] * 5 + [TrialCall()] * 25, [failed()] * 30)
    assert result.verdict is TrialVerdict.VOID
    assert "the incumbent answered only 0 of 30 calls: it broke" in result.reason


def test_a_model_unknown_to_the_backend_is_unreachable() -> None:
    calls = [failed(Outcome.UNKNOWN_MODEL)] + [TrialCall()] * 29
    assert judged(calls, [answered()] * 30).verdict is TrialVerdict.UNREACHABLE


def test_an_overloaded_candidate_is_unreachable_and_a_failing_one_loses() -> None:
    for outcome, verdict in (
        (Outcome.OVERLOADED, TrialVerdict.UNREACHABLE),
        (Outcome.ERROR, TrialVerdict.LOST),
    ):
        calls = [failed(outcome)] * 5 + [TrialCall()] * 25
        assert judged(calls, [answered()] * 30).verdict is verdict


def test_a_candidate_below_the_floor_loses_in_any_case() -> None:
    result = judged([answered(0.3)] * 30, [answered(0.0)] * 30)
    assert result.verdict is TrialVerdict.LOST
    assert "below the floor" in result.reason


def test_a_trial_ends_early_if_no_first_call_succeeds() -> None:
    assert has_failed([failed(Outcome.UNKNOWN_MODEL)])
    assert has_failed([failed()] * 5 + [TrialCall()] * 25)
    assert has_failed([TrialCall(error="no permit in time")] * 5)
    assert not has_failed([failed()] * 4 + [TrialCall()] * 26)
    assert not has_failed([failed()] * 20 + [answered()])


def drawn(dice: random.Random, quality: float) -> list[TrialCall]:
    return [answered(1.0 if dice.random() < quality else 0.2) for _ in range(30)]


def wins(candidate: float, incumbent: float) -> float:
    dice = random.Random(7)
    trials = [judged(drawn(dice, candidate), drawn(dice, incumbent)) for _ in range(400)]
    return sum(trial.verdict is TrialVerdict.WON for trial in trials) / len(trials)


def test_error_rates_with_the_shipped_settings() -> None:
    """A candidate that is not better rarely wins; a much better one usually does."""
    assert max(wins(quality, quality) for quality in (0.5, 0.8, 0.95)) <= 0.06
    assert wins(0.7, 0.8) <= 0.01
    assert wins(0.95, 0.7) >= 0.7
    assert wins(0.95, 0.5) >= 0.99


@pytest.mark.parametrize(
    ("candidate", "incumbent", "expected"),
    [
        ([answered()] * 30, [answered()] * 30, True),
        ([answered(0.9)] * 30, [answered()] * 30, True),
        ([answered(0.2)] * 30, [answered()] * 30, False),  # not even with all judges on its side
        ([failed()] * 5 + [TrialCall()] * 25, [answered()] * 30, False),
        ([answered()] * 30, [failed()] * 30, False),  # the trial is void
    ],
)
def test_only_a_candidate_that_could_win_is_judged(
    candidate: list[TrialCall], incumbent: list[TrialCall], *, expected: bool
) -> None:
    settings = TrialSettings()
    assert could_win(
        candidate, incumbent, range(10), utility=UtilitySettings(), sources=SOURCES, settings=settings
    ) is expected  # fmt: skip


@pytest.mark.parametrize(
    ("outcome", "verdict"),
    [(Outcome.ERROR, TrialVerdict.LOST), (Outcome.OVERLOADED, TrialVerdict.UNREACHABLE),
     (Outcome.UNKNOWN_MODEL, TrialVerdict.UNREACHABLE)],
)  # fmt: skip
def test_a_model_that_failed_for_other_categories_is_judged_by_those_calls(
    outcome: Outcome, verdict: TrialVerdict
) -> None:
    result = judge_trial(
        [failed(outcome), *[TrialCall()] * 29], [answered()] * 30, UtilitySettings(), SOURCES,
        TrialSettings(), elsewhere=[failed(outcome)] * 4,
    )  # fmt: skip
    assert result.verdict is verdict
