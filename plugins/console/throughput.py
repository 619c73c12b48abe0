"""How fast the work goes, when it will be done, and which model it waits for. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from router.status import ModelStatus

OVER_SECONDS = 30.0
ENOUGH_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Pace:
    """Tasks that end in a minute, and seconds until none is left at this pace; None where nobody can know."""

    per_minute: float | None
    seconds_left: float | None


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """The category that ends last, the model that is first for it, and what keeps that from doing more."""

    category: str
    model: str
    why: str


class Counter:
    """Remembers how many tasks had ended when; `ended` is by category."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, Mapping[str, int]]] = deque()

    def look(self, at: float, ended: Mapping[str, int]) -> None:
        """What the counters say now, `at` on a clock that only goes forward."""
        if self._looks and at - self._looks[-1][0] > OVER_SECONDS:
            self._looks.clear()  # nobody looked for a while
        self._looks.append((at, ended))
        while at - self._looks[0][0] > OVER_SECONDS:
            self._looks.popleft()

    def per_second(self) -> dict[str, float] | None:
        """Tasks that ended a second lately, by category; None until it can be known."""
        if not self._looks:
            return None
        (since, before), (until, after) = self._looks[0], self._looks[-1]
        if until - since < ENOUGH_SECONDS:
            return None
        names = before.keys() | after.keys()
        return {n: max(0, after.get(n, 0) - before.get(n, 0)) / (until - since) for n in names}


def pace(unsolved: int, per_second: float | None) -> Pace:
    """The pace at which so many are left."""
    if per_second is None:
        return Pace(None, 0.0 if not unsolved else None)
    left = unsolved / per_second if per_second > 0 else None
    return Pace(per_second * 60, 0.0 if not unsolved else left)


def bottleneck(
    unsolved: Mapping[str, int],
    paces: Mapping[str, Pace],
    places: Mapping[str, Sequence[str]],
    models: Mapping[str, ModelStatus],
) -> Bottleneck | None:
    """What the last task will have waited for. `places`: category -> models, the best first."""
    waiting = {category: count for category, count in unsolved.items() if count}
    if not waiting:
        return None
    last = max(waiting, key=lambda name: (_left(paces.get(name)), waiting[name]))
    for name in places.get(last, ()):
        model = models.get(name)
        if model is not None and model.state == "active":
            return Bottleneck(last, name, held_up_by(model))
    return None


def _left(known: Pace | None) -> float:
    if known is None or known.seconds_left is None:
        return float("inf")
    return known.seconds_left


def held_up_by(model: ModelStatus) -> str:
    """What keeps a model from doing more, in a few words."""
    if model.target is None:
        return "it has no target yet"
    if model.target == "0":
        return "its target is 0"
    if model.resting_seconds > 0:
        return f"it rests {model.resting_seconds:.0f} s more"
    return _WAITS.get(model.waiting_for or "", "its calls take their time").format(model.target)


_WAITS = {
    "window": "it is held to {}",
    "tokens": "the tokens of {} are used up",
    "concurrency": "all places of {} are taken",
    "half_open": "its breaker lets single calls through to try it out",
    "rebuilding": "what it was sent is being recounted",
    "no_target": "it has no target yet",
}
