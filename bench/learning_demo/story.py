"""What the demo of learning came to: every day and night as it was, and what follows from them. No I/O."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from bench.learning_demo.cast import FAILING
from bench.learning_demo.night import Night
from bench.learning_demo.script import Script
from bench.learning_demo.side import SideDay, share_good

WITH, WITHOUT = "with_learning", "without_learning"
SIDES = (WITH, WITHOUT)
NAMES = {WITH: "with learning", WITHOUT: "without"}


@dataclass(frozen=True)
class Day:
    """One day and the night after it; `sides` by name."""

    number: int
    news: tuple[str, ...]
    sides: dict[str, SideDay]
    night: Night


@dataclass(frozen=True)
class Totals:
    """One side over all days. `good_asked`: of prompts that were waited for; `seconds` is the median wait.

    `cost` in USD a thousand asked prompts, `failed` the share of all calls that brought no answer.
    """

    tasks: int
    good: float
    good_by_category: dict[str, float]
    good_asked: float
    seconds: float
    cost: float
    failed: float


@dataclass(frozen=True)
class FailingModel:
    """What became of the model that failed. Nights are numbered as their days; None: it did not happen.

    `shares`: its calls as a share of the category's tasks, by day, while it failed and learning knew.
    """

    first_before: str
    off_at: int | None
    back_at: int | None
    reviews_until_off: int | None
    reviews_until_back: int | None
    shares: tuple[float, ...]
    shares_without: tuple[float, ...]


@dataclass
class Story:
    """Grows day by day."""

    script: Script
    days: list[Day] = field(default_factory=list)

    def totals(self, side: str) -> Totals:
        tasks = [task for day in self.days for task in day.sides[side].tasks]
        asked = [task for task in tasks if task.asked]
        calls = [call for day in self.days for call in day.sides[side].calls]
        made = sum(call.calls for call in calls)
        cost = sum(call.cost for call in calls if call.asked)
        waits = [task.seconds for task in asked if task.seconds is not None]
        return Totals(
            tasks=len(tasks),
            good=share_good(tasks),
            good_by_category={c: share_good([t for t in tasks if t.category == c])
                              for c in sorted({t.category for t in tasks})},
            good_asked=share_good(asked),
            seconds=statistics.median(waits) if waits else 0.0,
            cost=1000 * cost / len(asked) if asked else 0.0,
            failed=1 - sum(call.answered for call in calls) / made if made else 0.0,
        )  # fmt: skip

    def gain(self, *, asked: bool | None = None) -> tuple[float, float]:
        """How much larger the share of good answers is with learning, and its standard error.

        Prompt against the same prompt; `asked`: only of those that were asked for, or were not.
        """
        pairs = [
            int(one.good) - int(other.good)
            for day in self.days
            for one, other in zip(day.sides[WITH].tasks, day.sides[WITHOUT].tasks, strict=True)
            if asked is None or one.asked == asked
        ]
        if len(pairs) < 2:
            return 0.0, 0.0
        return statistics.fmean(pairs), statistics.stdev(pairs) / math.sqrt(len(pairs))

    @property
    def failing(self) -> FailingModel:
        days, category = self.script.failing_days, "technical"
        nights = {day.number: day.night for day in self.days}
        first = {number: night.first(category) for number, night in nights.items()}
        off_at = next((n for n in sorted(first) if n >= days.start and first[n] != FAILING), None)
        back_at = next((n for n in sorted(first) if n >= days.stop and first[n] == FAILING), None)
        knew = [day for day in self.days if day.number in days and off_at and day.number > off_at]
        return FailingModel(
            first_before=first.get(days.start - 1, ""),
            off_at=off_at,
            back_at=back_at,
            reviews_until_off=None if off_at is None else off_at - days.start + 1,
            reviews_until_back=None if back_at is None else back_at - days.stop + 1,
            shares=tuple(day.sides[WITH].share_of_calls(FAILING, category) for day in knew),
            shares_without=tuple(day.sides[WITHOUT].share_of_calls(FAILING, category) for day in knew),
        )

    @property
    def new_firsts(self) -> list[tuple[int, str, str, str]]:
        """(night, category, model before, model now) of every change of a first place."""
        return [(day.number, *change) for day in self.days for change in day.night.new_firsts]

    @property
    def searched(self) -> list[tuple[int, str]]:
        """(night, what was found, tried, taken, promoted or dropped)."""
        return [(day.number, line) for day in self.days for line in day.night.searched]

    def as_json(self) -> dict[str, Any]:
        """What `--json FILE` holds: shares of 1, seconds of the fast clock, USD."""
        gain, error = self.gain()
        gain_asked, error_asked = self.gain(asked=True)
        failing = self.failing
        return {
            "days": self.script.days,
            "seed": self.script.seed,
            "sides": {side: vars(self.totals(side)) for side in SIDES},
            "gain": {"good": gain, "error": error, "good_asked": gain_asked, "error_asked": error_asked},
            "failing": {**vars(failing), "model": FAILING, "category": "technical",
                        "exploration_share": self.script.learning().exploration.share},
            "first_places": [
                {"night": night, "category": category, "before": before, "now": now}
                for night, category, before, now in self.new_firsts
            ],
            "searched": [{"night": night, "what": line} for night, line in self.searched],
            "nights": [_as_json(day) for day in self.days],
        }  # fmt: skip


def _as_json(day: Day) -> dict[str, Any]:
    return {
        "day": day.number,
        "news": list(day.news),
        "good": {name: side.good for name, side in day.sides.items()},
        "places": {
            category: {model: stands.place for model, stands in order.items()}
            for category, order in day.night.after.items()
        },
        "moves": [str(move) for move in day.night.moves if move.is_news],
        "review_seconds": day.night.seconds,
    }
