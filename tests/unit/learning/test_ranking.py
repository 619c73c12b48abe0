"""Ranking by evidence: single reviews, decayed evidence, and simulations of many days."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest

from router.learning.evidence import Evidence, Moments, PeriodStats, decayed
from router.learning.ranking import Candidate, Placed, Standing, rank
from router.settings.learning import LearningSettings, load_learning
from router.settings.router import load_config

GENERAL = "general"
LEARNING = load_learning(None, load_config().categories)


@dataclass(frozen=True)
class Nature:
    """True properties of a simulated model."""

    success: float = 0.98
    score: float = 0.9
    seconds: float = 10.0
    cost: float = 0.001


def of(values: list[float]) -> Moments:
    return Moments.of(len(values), sum(values), sum(value**2 for value in values))


def day_of(nature: Nature, calls: int, period: int, draw: random.Random) -> PeriodStats:
    answered = sum(draw.random() < nature.success for _ in range(calls))
    graded = min(answered, LEARNING.grading.answers)
    return PeriodStats(
        period,
        calls,
        answered,
        of([math.log(nature.seconds) + draw.gauss(0, 0.7) for _ in range(answered)]),
        of([nature.cost * draw.uniform(0.5, 1.5) for _ in range(answered)]),
        {"check": of([1.0 if draw.random() < nature.score else 0.2 for _ in range(graded)])},
    )


def evidence(calls: int, nature: Nature | None = None, seed: int = 1) -> Evidence:
    """Evidence of that many recent calls of a model of that nature."""
    sums = [day_of(nature or Nature(), calls, 0, random.Random(seed))] if calls else []
    return decayed(sums, 0, half_life=7, memory=28, change_errors=4)


def order(placed: list[Placed]) -> list[str]:
    return [p.model for p in placed]


# Single reviews.


def test_without_evidence_the_order_stays() -> None:
    placed = rank(GENERAL, [Candidate("a", 2), Candidate("b", 1), Candidate("c", 3)], LEARNING)
    assert order(placed) == ["b", "a", "c"]
    assert {p.standing for p in placed} == {Standing.NEW}
    assert all(p.most_share == 1 for p in placed)


def test_the_better_model_is_ranked_first() -> None:
    found = rank(
        GENERAL,
        [Candidate("a", 1, evidence(500, Nature(score=0.7))), Candidate("b", 2, evidence(500, Nature()))],
        LEARNING,
    )
    assert order(found) == ["b", "a"]
    assert "exceeds a" in found[0].reason
    assert found[0].quality >= found[1].quality


@pytest.mark.parametrize(
    "worse", [Nature(success=0.8), Nature(score=0.7), Nature(seconds=90), Nature(cost=0.02)]
)  # fmt: skip
def test_every_part_of_the_utility_counts(worse: Nature) -> None:
    found = rank(
        GENERAL, [Candidate("a", 1, evidence(500, worse)), Candidate("b", 2, evidence(500))], LEARNING
    )
    assert order(found) == ["b", "a"]


def test_models_are_ordered_by_lower_bound_not_by_mean() -> None:
    def scored(calls: int, score: float) -> Evidence:
        scores = {"check": Moments.of(calls, calls * score, calls * (score**2 + 0.06))}
        sums = PeriodStats(0, calls, calls * 0.98, Moments(), Moments(), scores)
        return decayed([sums], 0, half_life=7, memory=28, change_errors=4)

    bare = LEARNING.model_copy(update={"margin": 0.0, "margin_errors": 0.0})
    candidates = [Candidate("many", 1, scored(2000, 0.92)), Candidate("few", 2, scored(45, 0.94))]
    many, few = rank(GENERAL, candidates, bare)
    assert (many.model, few.model) == ("many", "few")
    assert few.utility.mean > many.utility.mean


def test_a_model_with_too_few_calls_does_not_move_up() -> None:
    few = evidence(LEARNING.enough_calls - 1, Nature(success=1, score=1, seconds=1, cost=0))
    found = rank(GENERAL, [Candidate("a", 1, evidence(500)), Candidate("b", 2, few)], LEARNING)
    assert order(found) == ["a", "b"]
    assert found[1].standing is Standing.NEW
    assert 0 < found[1].least_share <= LEARNING.exploration.share


def test_the_first_model_is_overtaken_early_if_all_its_calls_fail() -> None:
    failing = evidence(30, Nature(success=0.0))
    found = rank(GENERAL, [Candidate("a", 1, failing), Candidate("b", 2, evidence(500))], LEARNING)
    assert order(found) == ["b", "a"]


def test_a_model_below_the_floor_gets_only_exploration() -> None:
    bad = evidence(500, Nature(success=0.3))
    found = rank(GENERAL, [Candidate("a", 1, bad), Candidate("b", 2, evidence(500))], LEARNING)
    assert found[-1].standing is Standing.BELOW_FLOOR
    assert found[-1].most_share <= LEARNING.exploration.share
    assert found[-1].most_share * 1000 <= LEARNING.exploration.calls  # of yesterday's tasks
    assert found[0].most_share == 1


def test_one_model_keeps_the_tasks_if_all_are_below_the_floor() -> None:
    bad = [Candidate(m, n, evidence(500, Nature(success=0.3 / n))) for n, m in enumerate("abc", 1)]
    found = rank(GENERAL, bad, LEARNING)
    assert found[0].model == "a"
    assert (found[0].standing, found[0].most_share) == (Standing.RANKED, 1.0)


def test_a_model_on_probation_has_a_bounded_share() -> None:
    candidate = Candidate("new", 2, evidence(100), on_probation=True)
    found = rank(GENERAL, [Candidate("a", 1, evidence(500)), candidate], LEARNING)
    assert found[1].standing is Standing.PROBATION
    assert 0 < found[1].most_share <= LEARNING.exploration.share


def test_bounded_shares_together_stay_within_exploration() -> None:
    bad = [Candidate(f"bad{n}", n, evidence(50, Nature(success=0.1))) for n in range(2, 7)]
    found = rank(GENERAL, [Candidate("a", 1, evidence(50)), *bad], LEARNING)
    assert (
        sum(p.most_share for p in found if p.standing is Standing.BELOW_FLOOR)
        <= LEARNING.exploration.share + 1e-9
    )


def test_a_model_that_may_be_below_the_floor_gets_exploration() -> None:
    """It is no longer significantly below the floor, but too far from the first to be promising."""
    doubtful = evidence(120, Nature(success=0.45, score=1.0))
    found = rank(GENERAL, [Candidate("a", 1, evidence(500)), Candidate("b", 2, doubtful)], LEARNING)
    assert found[1].standing is Standing.RANKED
    assert found[1].utility.upper < found[0].utility.lower
    assert (found[1].least_share, found[1].most_share) == (LEARNING.exploration.share, 1.0)


def test_a_grade_source_known_for_one_model_does_not_bias_the_other() -> None:
    plain = evidence(300)
    judged = replace(plain, scores={**plain.scores, "judge": Moments.of(50, 40.0, 33.0)})
    found = {p.model: p for p in rank(
        GENERAL, [Candidate("plain", 1, plain), Candidate("judged", 2, judged)], LEARNING
    )}  # fmt: skip
    assert found["plain"].utility.score.mean == pytest.approx(found["judged"].utility.score.mean, abs=0.01)


def test_qualities_never_increase_with_rank_even_within_the_margin() -> None:
    near = [Candidate(m, n, evidence(3000, seed=n)) for n, m in enumerate("abcde", 1)]
    qualities = [p.quality for p in rank(GENERAL, near, LEARNING)]
    assert qualities == sorted(qualities, reverse=True)


# Decayed evidence.


def test_older_evidence_weighs_less() -> None:
    old = PeriodStats(0, 100, 100, Moments(), Moments(), {})
    at = {
        age: decayed([old], age, half_life=7, memory=28, change_errors=4).success.count
        for age in (0, 7, 14, 28)
    }
    assert at == {0: 100, 7: pytest.approx(50), 14: pytest.approx(25), 28: 0}


def test_a_period_ahead_of_now_counts_as_new() -> None:
    ahead = PeriodStats(5, 100, 90)
    assert decayed([ahead], 0, half_life=7, memory=28, change_errors=4).success.count == 100


def test_evidence_before_a_change_is_dropped_at_once() -> None:
    history = [*(PeriodStats(day, 5000, 4900) for day in range(10)), PeriodStats(10, 50, 5)]
    found = decayed(history, 10, half_life=7, memory=28, change_errors=4)
    assert found.forgot_before == 10
    assert found.success.mean == pytest.approx(0.1)
    # Dropped periods must not return and hide the next change.
    history += [PeriodStats(11, 50, 5), PeriodStats(12, 50, 49)]
    found = decayed(history, 12, half_life=7, memory=28, change_errors=4)
    assert found.forgot_before == 12
    assert found.success.mean == pytest.approx(0.98)


def test_noise_is_not_a_change() -> None:
    draw = random.Random(3)
    history = [day_of(Nature(), 200, day, draw) for day in range(28)]
    assert decayed(history, 28, half_life=7, memory=29, change_errors=4).forgot_before is None


# Simulations.


@dataclass
class Simulation:
    """Each day the traffic follows the ranks; then a review ranks the models."""

    natures: Mapping[str, Nature]
    calls: int
    seed: int = 1
    learning: LearningSettings = LEARNING
    change: Callable[[int, str, Nature], Nature] = lambda _day, _model, nature: nature
    reviews: list[list[Placed]] = field(default_factory=list)
    shares: list[dict[str, float]] = field(default_factory=list)  # of a day's calls

    def run(self, days: int) -> Simulation:
        draw = random.Random(self.seed)
        places = {model: place for place, model in enumerate(self.natures, 1)}
        history: dict[str, list[PeriodStats]] = {model: [] for model in self.natures}
        for day in range(days):
            calls = self._traffic(places)
            self.shares.append({model: n / self.calls for model, n in calls.items()})
            for model, n in calls.items():
                if n:
                    nature = self.change(day, model, self.natures[model])
                    history[model].append(day_of(nature, n, day, draw))
            candidates = [Candidate(m, places[m], self._decayed(history[m], day)) for m in self.natures]
            self.reviews.append(rank(GENERAL, candidates, self.learning))
            places = {p.model: p.place for p in self.reviews[-1]}
        return self

    def _decayed(self, history: list[PeriodStats], day: int) -> Evidence:
        known = self.learning
        return decayed(
            history, day, half_life=known.half_life_periods, memory=known.memory_periods,
            change_errors=known.change_errors,
        )  # fmt: skip

    def _traffic(self, places: Mapping[str, int]) -> dict[str, int]:
        last = self.reviews[-1] if self.reviews else []
        bounded = {p.model: p.most_share for p in last if p.most_share < 1}
        free = sorted((m for m in places if m not in bounded), key=lambda m: places[m])
        weights = {model: 1 / (place + 1) for place, model in enumerate(free)}
        left = self.calls * (1 - sum(bounded.values()))
        whole = sum(weights.values())
        return {
            model: int(self.calls * bounded[model])
            if model in bounded
            else int(left * weights[model] / whole)
            for model in places
        }

    @property
    def firsts(self) -> list[str]:
        return [review[0].model for review in self.reviews]

    def placed(self, day: int, model: str) -> Placed:
        return next(p for p in self.reviews[day] if p.model == model)


ALIKE = {
    "a": Nature(score=0.90), "b": Nature(score=0.90), "c": Nature(score=0.89), "d": Nature(score=0.905),
}  # fmt: skip


@pytest.mark.parametrize("calls", [200, pytest.param(800, marks=pytest.mark.soak)])
def test_the_order_does_not_flap_over_a_hundred_days_of_noise(calls: int) -> None:
    simulation = Simulation(ALIKE, calls).run(100)
    firsts = ["a", *simulation.firsts]
    returns = sum(now != before and now in firsts[:day] for day, (before, now) in enumerate(pairwise(firsts)))
    assert returns == 0
    assert sum(now != before for before, now in pairwise(firsts)) <= 1


def test_without_margins_the_order_flaps() -> None:
    bare = LEARNING.model_copy(update={"margin": 0.0, "margin_errors": 0.0, "half_life_periods": 7.0})
    firsts = Simulation(ALIKE, 200, learning=bare).run(50).firsts
    assert sum(now != before for before, now in pairwise(firsts)) > 3


@pytest.mark.parametrize("calls", [1000, 5000])
def test_a_failing_model_drops_at_the_next_review_and_recovers_within_three(calls: int) -> None:
    natures = {"a": Nature(score=0.98), "b": Nature(), "c": Nature(score=0.88), "d": Nature(score=0.85)}
    failing = range(8, 13)

    def change(day: int, model: str, nature: Nature) -> Nature:
        return replace(nature, success=0.2) if model == "a" and day in failing else nature

    simulation = Simulation(natures, calls, change=change).run(18)
    assert simulation.placed(7, "a").place == 1
    assert simulation.placed(8, "a").place == 4  # the first review after the failures began
    for day in failing:
        assert simulation.placed(day, "a").standing is Standing.BELOW_FLOOR
        if day > failing.start:
            assert 0 < simulation.shares[day]["a"] <= LEARNING.exploration.share
    assert simulation.placed(15, "a").place == 1  # the third review after it recovered


@pytest.mark.parametrize("worse", [{"seconds": 90.0}, {"cost": 0.02}, {"score": 0.75}])
def test_a_model_that_gets_slower_costlier_or_worse_is_overtaken_at_the_next_review(
    worse: dict[str, float],
) -> None:
    natures = {"a": Nature(score=0.96), "b": Nature()}

    def change(day: int, model: str, nature: Nature) -> Nature:
        return replace(nature, **worse) if model == "a" and day >= 6 else nature

    simulation = Simulation(natures, 1000, change=change).run(8)
    assert simulation.placed(5, "a").place == 1
    assert simulation.placed(6, "a").place == 2
    assert simulation.placed(6, "a").most_share == 1  # worse is still above the floor
