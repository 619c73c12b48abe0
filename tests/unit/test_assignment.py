"""Which categories a model pulls: the linear program's shares, and the order that follows from them."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from router.assignment import PullOrder, Work, quality, shares

PLACES = {"technical": {"a": 1, "b": 2}, "creative": {"a": 2, "b": 1}}


def test_each_model_gets_what_it_is_best_at() -> None:
    found = shares(Work({"technical": 50, "creative": 50}, {"a": 1.0, "b": 1.0}, PLACES))
    assert found == {"a": {"technical": pytest.approx(1.0)}, "b": {"creative": pytest.approx(1.0)}}


def test_no_quota_is_idle_though_it_is_not_the_best() -> None:
    found = shares(Work({"technical": 90, "creative": 10}, {"a": 1.0, "b": 1.0}, PLACES))
    assert found["a"] == {"technical": pytest.approx(1.0)}
    assert found["b"] == {"technical": pytest.approx(0.8), "creative": pytest.approx(0.2)}


def test_without_work_or_models_there_are_no_shares() -> None:
    assert shares(Work({}, {"a": 1.0}, PLACES)) == {"a": {}}
    assert shares(Work({"technical": 5}, {"a": 0.0}, PLACES)) == {"a": {}}


@pytest.mark.parametrize("seed", range(20))
def test_all_work_is_shared_out_whatever_the_ranks(seed: int) -> None:
    draw = random.Random(seed)
    models, categories = [f"m{n}" for n in range(10)], ["technical", "creative", "general"]
    work = Work(
        {category: draw.randint(1, 10_000) for category in categories},
        {model: draw.uniform(0.05, 5) for model in models},
        {category: {model: draw.randint(1, 10) for model in models} for category in categories},
    )
    found = shares(work)
    seconds = sum(work.backlog.values()) / sum(work.rates.values())
    for category in categories:
        given = sum(found[model].get(category, 0.0) * work.rates[model] * seconds for model in models)
        assert given == pytest.approx(work.backlog[category], rel=1e-6)


def test_pulls_follow_the_shares_though_these_come_anew_every_second() -> None:
    order, taken = PullOrder(places={"technical": 1, "creative": 2}), Counter[str]()
    for turn in range(1000):
        order.aim({"technical": 0.7 + turn % 2 * 0.001, "creative": 0.3 - turn % 2 * 0.001}, order.places)
        category = order.categories(["general", "creative", "technical"])[0]
        order.took(category)
        taken[category] += 1
    assert taken["technical"] == pytest.approx(700, abs=5)
    assert taken["creative"] == pytest.approx(300, abs=5)


def test_a_category_without_a_share_comes_last_and_by_quality() -> None:
    order = PullOrder(places={"creative": 2, "general": 1})
    order.aim({"technical": 1.0}, order.places)
    assert order.categories(["creative", "general", "technical"]) == ["technical", "general", "creative"]
    assert quality(1) > quality(2) > quality(None) > 0
