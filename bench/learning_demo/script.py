"""What happens in the demo of learning: who is there, what is asked each day, and what becomes of whom.

The order at the beginning is that of config/models.yaml, and true: it is the world that changes. Everything
that is measured in seconds runs on a fast clock.
"""

from __future__ import annotations

import functools
import itertools
import json
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from bench.learning_demo.cast import (
    CATEGORIES,
    CLIMATE,
    DEAR,
    FAILING,
    MODELS,
    NEWCOMERS,
    OF_TEN,
    SLOW,
    Newcomer,
)
from router.discovery.trial_prompts import read_trial_prompts
from router.settings import (
    DEFAULT_CONFIG_FOLDER,
    DiscoverySettings,
    FallbackSettings,
    LearningSettings,
    RouterConfig,
    load_config,
    load_discovery,
    load_learning,
)
from router.settings.models import ModelSettings
from router.settings.router import AnsweringSettings, TrafficSettings, WorkerSettings

PROMPTS = Path(__file__).parents[1] / "demo_prompts.jsonl"
TODAY = date(2026, 1, 1)  # so that the catalogue's models do not grow old
TIME_SCALE = 60.0  # a model's minute is a second
SHORTEST_DAYS = 3
PERIODS_A_DAY = 3  # about: a day begins with a period, and takes as long as the machine needs


@dataclass(frozen=True)
class Event:
    """What becomes of a model in a category, from the morning of day `begins` until before that of `ends`."""

    model: str
    category: str | None
    begins: int
    ends: int | None
    weather: Mapping[str, Any]
    words: str
    end_words: str = ""

    def holds(self, day: int) -> bool:
        return self.begins <= day and (self.ends is None or day < self.ends)


@dataclass(frozen=True)
class Task:
    """One prompt of a day. What is asked for is waited for; the others are a backlog."""

    key: str
    prompt: str
    category: str
    asked: bool


@dataclass(frozen=True)
class Script:
    """The whole story. `tasks` and `asked` are a day's, `rate` a model's calls a second.

    Of FAILING's calls `failing_share` fail while it does, and of its answers `failing_quality` are good.
    """

    days: int = 12
    period_seconds: int = 6
    seed: int = 1
    tasks: int = 600
    asked: int = 90
    rate: int = 14
    trial_prompts: int = 36
    failing_share: float = 0.4
    failing_quality: float = 0.1
    today: date = TODAY

    @property
    def failing_days(self) -> range:
        """When FAILING fails in technical; what follows are the days in which it is well again."""
        begins = self._day(4)
        return range(begins, max(begins + 2, self._day(8)))

    @property
    def slow_from(self) -> int:
        return self._day(3)

    @property
    def dear_from(self) -> int:
        return self._day(9)

    def _day(self, of_twelve: int) -> int:
        return max(2, round(of_twelve * self.days / 12))

    @property
    def events(self) -> tuple[Event, ...]:
        failing = self.failing_days
        return (
            Event(
                FAILING, "technical", failing.start, failing.stop,
                {"failing": self.failing_share, "quality": self.failing_quality},
                f"{FAILING} begins to fail for technical: {self.failing_share:.0%} of its calls,"
                f" and {1 - self.failing_quality:.0%} of its answers",
                f"{FAILING} is well again",
            ),
            Event(
                SLOW, None, self.slow_from, None, {"latency_factor": 12.0},
                f"{SLOW} becomes slow: 12 times as many seconds for an answer",
            ),
            Event(
                DEAR, None, self.dear_from, None, {"price_factor": 60.0},
                f"{DEAR} becomes dear: 60 times the price",
            ),
        )  # fmt: skip

    def weather(self, day: int) -> list[dict[str, Any]]:
        """The whole weather of a day: an order for each model and category that differs."""
        orders: dict[tuple[str, str], dict[str, Any]] = {}

        def change(model: str, category: str, **what: Any) -> None:
            orders.setdefault((model, category), {}).update(what)

        for category, qualities in CLIMATE.items():
            for model, quality in qualities.items():
                change(model, category, quality=quality)
        for event in self.events:
            for category in CATEGORIES if event.holds(day) else ():
                if event.category in (None, category):
                    change(event.model, category, **event.weather)
        for newcomer in NEWCOMERS:
            for category, quality in newcomer.quality.items():
                change(newcomer.model, category, quality=quality)
        found = [{"model": model, "category": category, **what} for (model, category), what in orders.items()]
        away = [newcomer.model for newcomer in NEWCOMERS if day < self.comes(newcomer)]
        return found + [{"model": model, "served": False} for model in away]

    def comes(self, newcomer: Newcomer) -> int:
        """The day from which on the newcomer can be called."""
        return 1 if newcomer.from_day == 1 else self._day(newcomer.from_day)

    def news(self, day: int) -> list[str]:
        """What is different on the morning of a day, in words."""
        found = [event.words for event in self.events if event.begins == day]
        found += [event.end_words for event in self.events if event.ends == day]
        found += [
            f"{newcomer.model} can be called from now on"
            for newcomer in NEWCOMERS
            if 1 < self.comes(newcomer) == day
        ]
        return found

    def day(self, day: int) -> list[Task]:
        """The day's prompts, each of them new, the same for the same seed."""
        dice = random.Random(f"{self.seed} {day}")
        found = []
        for asked, number in ((False, self.tasks), (True, self.asked)):
            kind = "ask" if asked else "task"
            for place in range(number):
                category = OF_TEN[place * 3 % len(OF_TEN)]
                key = f"d{day:02}-{kind}-{place:04}"
                prompt = dice.choice(_prompts()[category])
                found.append(Task(key, f"{prompt} [{key}]", category, asked))
        return found

    def config(self) -> RouterConfig:
        """The shipped config with fewer models, on the fast clock."""
        shipped = load_config()
        models = {name: self._on_the_fast_clock(shipped.models[name]) for name in MODELS}
        models = {
            name: about.model_copy(update={"ranks": _places_among(models, name)})
            for name, about in models.items()
        }
        worker = WorkerSettings(
            retry_base_seconds=0.1, retry_cap_seconds=0.5, another_model_seconds=1.0, idle_leave_seconds=3600,
            poll_seconds=0.5,
        )  # fmt: skip
        return RouterConfig(
            models=models,
            default_category=shipped.default_category,
            categories=shipped.categories,
            worker=worker,
            # A busy machine sends late: that is not what is shown here.
            traffic=TrafficSettings(
                initial_cooldown_seconds=0.1,
                max_cooldown_seconds=1.0,
                minute_send_slack=2.0,
                minute_transit_slack=2.0,
            ),
            answering=AnsweringSettings(default_deadline_seconds=8.0, late_seconds=1.0),
            fallback=FallbackSettings(),
        )

    @property
    def target(self) -> str:
        """What each model of the file may be sent."""
        return f"{60 * self.rate}/min"

    def _on_the_fast_clock(self, model: ModelSettings) -> ModelSettings:
        timeout_seconds = model.timeout_seconds / TIME_SCALE
        return model.model_copy(update={"target": self.target, "timeout_seconds": timeout_seconds})

    def learning(self) -> LearningSettings:
        """The shipped settings; a day is a few periods, seconds are those of the fast clock.

        A day has a few hundred calls a category instead of thousands: so 12 % of them explore instead of 5,
        and fewer are enough to judge a model by.
        """
        shipped = load_learning(None, CATEGORIES)
        whole = shipped.model_dump()
        whole["period_hours"] = self.period_seconds / 3600
        whole["half_life_periods"] *= PERIODS_A_DAY
        whole["memory_periods"] *= PERIODS_A_DAY
        whole["enough_calls"] = 15
        whole["prior_calls"] = 8
        whole["exploration"]["share"] = 0.12
        whole["utility"]["latency_seconds"] = shipped.utility.latency_seconds / TIME_SCALE
        whole["outage"]["seconds"] = 1
        return LearningSettings.model_validate(whole)

    def search(self) -> DiscoverySettings:
        """The shipped settings, with targets and patience of the fast clock."""
        whole = load_discovery(None, CATEGORIES).model_dump()
        whole["catalogues"] = [one for one in whole["catalogues"] if one["kind"] == "file"]
        whole["trials"].update(
            prompts=self.trial_prompts, timeout_seconds=5.0, max_concurrency=16, judged=0
        )  # the stand-in is no judge
        whole["probation"].update(target=f"{30 * self.rate}/min", min_calls=20, timeout_seconds=4.0)
        return DiscoverySettings.model_validate(whole)

    def make_folder(self, folder: Path) -> Path:
        """A copy of the shipped config, for the search to write into."""
        copy = folder / "config"
        shutil.copytree(DEFAULT_CONFIG_FOLDER, copy, ignore=shutil.ignore_patterns("discovered.yaml"))
        return copy

    def backend_arguments(self, folder: Path) -> list[str]:
        """The stand-in's command line; it is told the categories of all prompts, and must not guess."""
        references = folder / "prompts.jsonl"
        references.write_text("".join(self._known_prompts()), encoding="utf-8")
        also: list[str] = []
        for newcomer in NEWCOMERS:
            also += ["--also", f"{newcomer.model}={newcomer.input_price:g}/{newcomer.output_price:g}"]
        return ["--seed", str(self.seed), "--references", str(references), *also]

    def _known_prompts(self) -> Iterator[str]:
        days: Sequence[list[Task]] = [self.day(day) for day in range(1, self.days + 1)]
        for task in itertools.chain.from_iterable(days):
            yield json.dumps({"prompt": task.prompt, "category": task.category}) + "\n"
        for category in CATEGORIES:
            for held_back in read_trial_prompts(DEFAULT_CONFIG_FOLDER, category):
                yield json.dumps({**asdict(held_back), "category": category}) + "\n"


def _places_among(models: Mapping[str, ModelSettings], name: str) -> dict[str, int]:
    """The model's places in the order of models.yaml, counted among these models alone."""
    own = models[name].ranks
    return {
        category: 1 + sum(other.ranks[category] < place for other in models.values())
        for category, place in own.items()
    }


@functools.cache
def _prompts() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {category: [] for category in CATEGORIES}
    for line in PROMPTS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found[row["category"]].append(row["prompt"])
    return found
