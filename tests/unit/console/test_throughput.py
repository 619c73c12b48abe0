"""Throughput, estimates and the bottleneck that the console shows."""

from __future__ import annotations

from typing import Any

import pytest

from plugins.console.dashboard import merged, requests_of
from plugins.console.throughput import (
    Bottleneck,
    Throughput,
    ThroughputMeter,
    bottleneck,
    limiting_factor,
    throughput,
)
from router.status import ModelStatus


def model(name: str = "phi-4", **more: Any) -> ModelStatus:
    defaults: dict[str, Any] = {
        "state": "active", "target": "60/min", "target_kept": False, "target_since": None,
        "sent": {"60/min": 3}, "tokens": {}, "sent_last_minute": None, "in_flight": 0,
        "at_once": None, "waiting_for": None, "resting_seconds": 0.0, "calls": 0,
        "failed_calls": 0, "last_error": None, "trouble": None,
    }  # fmt: skip
    return ModelStatus(name, **{**defaults, **more})


def test_throughput_is_unknown_during_the_first_seconds() -> None:
    meter = ThroughputMeter()
    assert meter.per_second() is None
    meter.record(100.0, {"general": 10})
    meter.record(102.0, {"general": 20})
    assert meter.per_second() is None
    meter.record(110.0, {"general": 60, "technical": 5})
    assert meter.per_second() == {"general": 5.0, "technical": 0.5}


def test_throughput_is_measured_over_half_a_minute() -> None:
    meter = ThroughputMeter()
    for second in range(100):
        meter.record(float(second), {"general": 0 if second < 60 else (second - 60) * 2})
    assert meter.per_second() == {"general": pytest.approx(2.0)}


def test_a_gap_in_the_readings_restarts_the_measurement() -> None:
    meter = ThroughputMeter()
    meter.record(0.0, {"general": 0})
    meter.record(10.0, {"general": 100})
    meter.record(500.0, {"general": 100_000})
    assert meter.per_second() is None


def test_time_left_follows_from_backlog_and_throughput() -> None:
    assert throughput(120, 2.0) == Throughput(120.0, 60.0)
    assert throughput(120, 0.0) == Throughput(0.0, None)
    assert throughput(0, None) == Throughput(None, 0.0)
    assert throughput(7, None) == Throughput(None, None)


def test_the_bottleneck_is_preferred_for_the_category_that_completes_last() -> None:
    models = {"a": model("a", target="0"), "b": model("b"), "c": model("c", state="paused")}
    throughputs = {"general": Throughput(60, 10), "technical": Throughput(60, 900)}
    rankings = {"general": ["b"], "technical": ["c", "a", "b"]}
    unsolved = {"general": 10, "technical": 900}
    assert bottleneck(unsolved, throughputs, rankings, models) == Bottleneck(
        "technical", "a", "its target is 0"
    )
    stuck = {"general": Throughput(0, None), "technical": Throughput(60, 900)}
    found = bottleneck(unsolved, stuck, rankings, models)
    assert found is not None
    assert found.category == "general"
    assert bottleneck({"general": 0}, throughputs, rankings, models) is None


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"target": None}, "it has no target"),
        ({"resting_seconds": 12.4}, "it is cooling down for 12 s"),
        ({"waiting_for": "window"}, "its target 60/min"),
        ({"waiting_for": "concurrency"}, "the concurrency limit of 60/min"),
        ({}, "its latency"),
    ],
)
def test_the_limiting_factor_is_described(more: dict[str, Any], expected: str) -> None:
    assert limiting_factor(model(**more)) == expected


def test_newer_sends_are_merged_into_older_ones() -> None:
    older = {
        "seconds": 5,
        "first": 100,
        "last": 104,
        "models": {"a": [1, 2, 3, 4, 1], "gone": [9, 0, 0, 0, 0]},
    }
    newer = {"seconds": 5, "first": 103, "last": 106, "models": {"a": [4, 5, 6, 1], "b": [0, 0, 1, 1]}}
    both = merged(older, newer, 101)
    assert (both["first"], both["last"]) == (101, 106)
    assert both["models"] == {"a": [2, 3, 4, 5, 6, 1], "b": [0, 0, 0, 0, 1, 1]}


def test_requests_per_minute_of_a_target() -> None:
    assert requests_of("120/min, 1/s") == {"per_minute": 60.0, "window_seconds": 1}
    assert requests_of("5 at once") == {"per_minute": None, "window_seconds": None}
    assert requests_of("0") == {"per_minute": 0.0, "window_seconds": None}
    assert requests_of(None) == {"per_minute": None, "window_seconds": None}
