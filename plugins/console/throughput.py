"""Throughput, estimated completion and the bottleneck. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from router.status import ModelStatus

WINDOW_SECONDS = 30.0
MIN_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Throughput:
    """Completed tasks per minute, and seconds until none is unsolved; None if unknown."""

    per_minute: float | None
    seconds_left: float | None


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """The category that completes last, its preferred model, and what limits that model."""

    category: str
    model: str
    why: str


class ThroughputMeter:
    """Measures completed tasks per second by category over WINDOW_SECONDS."""

    def __init__(self) -> None:
        self._readings: deque[tuple[float, Mapping[str, int]]] = deque()

    def record(self, at: float, ended: Mapping[str, int]) -> None:
        """Records the number of completed tasks by category; `at` is a monotonic time."""
        if self._readings and at - self._readings[-1][0] > WINDOW_SECONDS:
            self._readings.clear()  # older readings would average over a gap
        self._readings.append((at, ended))
        while at - self._readings[0][0] > WINDOW_SECONDS:
            self._readings.popleft()

    def per_second(self) -> dict[str, float] | None:
        """Returns completed tasks per second by category; None for the first MIN_SECONDS."""
        if not self._readings:
            return None
        (since, before), (until, after) = self._readings[0], self._readings[-1]
        if until - since < MIN_SECONDS:
            return None
        names = before.keys() | after.keys()
        return {n: max(0, after.get(n, 0) - before.get(n, 0)) / (until - since) for n in names}


def throughput(unsolved: int, per_second: float | None) -> Throughput:
    """Returns the throughput and the time left for the unsolved tasks."""
    if per_second is None:
        return Throughput(None, 0.0 if not unsolved else None)
    left = unsolved / per_second if per_second > 0 else None
    return Throughput(per_second * 60, 0.0 if not unsolved else left)


def bottleneck(
    unsolved: Mapping[str, int],
    throughputs: Mapping[str, Throughput],
    rankings: Mapping[str, Sequence[str]],
    models: Mapping[str, ModelStatus],
) -> Bottleneck | None:
    """Returns what limits the category that completes last; None if nothing is unsolved or no model active.

    `rankings`: category -> models, preferred first.
    """
    waiting = {category: count for category, count in unsolved.items() if count}
    if not waiting:
        return None
    last = max(waiting, key=lambda name: (_seconds_left(throughputs.get(name)), waiting[name]))
    for name in rankings.get(last, ()):
        model = models.get(name)
        if model is not None and model.state == "active":
            return Bottleneck(last, name, limiting_factor(model))
    return None


def _seconds_left(known: Throughput | None) -> float:
    if known is None or known.seconds_left is None:
        return float("inf")
    return known.seconds_left


def limiting_factor(model: ModelStatus) -> str:
    """Describes what limits a model's throughput."""
    if model.target is None:
        return "it has no target"
    if model.target == "0":
        return "its target is 0"
    if model.resting_seconds > 0:
        return f"it is cooling down for {model.resting_seconds:.0f} s"
    return _WAITS.get(model.waiting_for or "", "its latency").format(model.target)


_WAITS = {
    "window": "its target {}",
    "tokens": "the token limit of {}",
    "budget": "the budget of {}",
    "concurrency": "the concurrency limit of {}",
    "half_open": "its circuit breaker is half-open",
    "rebuilding": "its limiter state is being rebuilt",
    "no_target": "it has no target",
}
