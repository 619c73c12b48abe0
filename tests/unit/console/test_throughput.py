"""What the console says about the pace of the work, and about the model that it waits for."""

from __future__ import annotations

from typing import Any

import pytest

from plugins.console.dashboard import joined, requests_of
from plugins.console.throughput import Bottleneck, Counter, Pace, bottleneck, held_up_by, pace
from router.status import ModelStatus


def model(name: str = "phi-4", **more: Any) -> ModelStatus:
    known: dict[str, Any] = {
        "state": "active", "target": "60/min", "target_kept": False, "target_since": None,
        "sent": {"60/min": 3}, "tokens": {}, "sent_last_minute": None, "in_flight": 0,
        "at_once": None, "waiting_for": None, "resting_seconds": 0.0, "calls": 0,
        "failed_calls": 0, "last_error": None, "trouble": None,
    }  # fmt: skip
    return ModelStatus(name, **{**known, **more})


def test_the_pace_is_known_once_it_was_looked_at_for_a_while() -> None:
    counter = Counter()
    assert counter.per_second() is None
    counter.look(100.0, {"general": 10})
    counter.look(102.0, {"general": 20})
    assert counter.per_second() is None
    counter.look(110.0, {"general": 60, "technical": 5})
    assert counter.per_second() == {"general": 5.0, "technical": 0.5}


def test_the_pace_is_that_of_the_last_half_minute() -> None:
    counter = Counter()
    for second in range(100):
        counter.look(float(second), {"general": 0 if second < 60 else (second - 60) * 2})
    assert counter.per_second() == {"general": pytest.approx(2.0)}


def test_a_look_after_a_long_while_begins_anew() -> None:
    counter = Counter()
    counter.look(0.0, {"general": 0})
    counter.look(10.0, {"general": 100})
    counter.look(500.0, {"general": 100_000})
    assert counter.per_second() is None


def test_the_end_follows_from_backlog_and_pace() -> None:
    assert pace(120, 2.0) == Pace(120.0, 60.0)
    assert pace(120, 0.0) == Pace(0.0, None)
    assert pace(0, None) == Pace(None, 0.0)
    assert pace(7, None) == Pace(None, None)


def test_the_bottleneck_is_first_for_the_category_that_ends_last() -> None:
    models = {"a": model("a", target="0"), "b": model("b"), "c": model("c", state="paused")}
    paces = {"general": Pace(60, 10), "technical": Pace(60, 900)}
    places = {"general": ["b"], "technical": ["c", "a", "b"]}
    unsolved = {"general": 10, "technical": 900}
    assert bottleneck(unsolved, paces, places, models) == Bottleneck("technical", "a", "its target is 0")
    stuck = {"general": Pace(0, None), "technical": Pace(60, 900)}
    found = bottleneck(unsolved, stuck, places, models)
    assert found is not None
    assert found.category == "general"
    assert bottleneck({"general": 0}, paces, places, models) is None


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"target": None}, "it has no target yet"),
        ({"resting_seconds": 12.4}, "it rests 12 s more"),
        ({"waiting_for": "window"}, "it is held to 60/min"),
        ({"waiting_for": "concurrency"}, "all places of 60/min are taken"),
        ({}, "its calls take their time"),
    ],
)
def test_what_holds_a_model_up_is_said_in_words(more: dict[str, Any], why: str) -> None:
    assert held_up_by(model(**more)) == why


def test_what_is_new_joins_what_is_known() -> None:
    known = {
        "seconds": 5,
        "first": 100,
        "last": 104,
        "models": {"a": [1, 2, 3, 4, 1], "gone": [9, 0, 0, 0, 0]},
    }
    newer = {"seconds": 5, "first": 103, "last": 106, "models": {"a": [4, 5, 6, 1], "b": [0, 0, 1, 1]}}
    both = joined(known, newer, 101)
    assert (both["first"], both["last"]) == (101, 106)
    assert both["models"] == {"a": [2, 3, 4, 5, 6, 1], "b": [0, 0, 0, 0, 1, 1]}


def test_a_target_says_what_it_allows_a_minute() -> None:
    assert requests_of("120/min, 1/s") == {"per_minute": 60.0, "window_seconds": 1}
    assert requests_of("5 at once") == {"per_minute": None, "window_seconds": None}
    assert requests_of("0") == {"per_minute": 0.0, "window_seconds": None}
    assert requests_of(None) == {"per_minute": None, "window_seconds": None}
