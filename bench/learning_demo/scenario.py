"""The scenario: models with their true quality, events, prompts by day, and settings on a fast clock."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from router.discovery.trial_prompts import read_trial_prompts
from router.settings import (
    DEFAULT_CONFIG_FOLDER,
    DiscoverySettings,
    LearningSettings,
    RouterConfig,
    load_config,
    load_discovery,
    load_learning,
)
from router.settings.models import ModelSettings
from router.settings.router import AnsweringSettings, TrafficSettings, WorkerSettings

PROMPTS = Path(__file__).parents[1] / "demo_prompts.jsonl"
TODAY = date(2026, 1, 1)  # the age of catalog entries counts from here
TIME_SCALE = 60.0  # a model's minute is a second
MIN_DAYS = 3
PERIODS_PER_DAY = 3  # about: a day starts with a period and lasts as long as the machine needs
CATEGORIES = ("technical", "creative", "general")
CATEGORY_MIX = (*("technical",) * 4, *("creative",) * 3, *("general",) * 3)
FAILING, SLOW, DEAR = "deepseek-v3", "mixtral-8x22b", "llama-3.3-70b"
MODELS = (FAILING, "qwen-2.5-72b", SLOW, "mistral-small-24b", DEAR, "gpt-4o-mini")
# Replaces the stand-in's own table: one model is best by far for technical prompts, and for creative ones all
# are weak, so that a candidate can be better.
QUALITY: Mapping[str, Mapping[str, float]] = {
    "technical": {
        "qwen-2.5-72b": 0.74, SLOW: 0.66, "mistral-small-24b": 0.64, DEAR: 0.70, "gpt-4o-mini": 0.70,
    },
    "creative": {
        FAILING: 0.70, "qwen-2.5-72b": 0.68, SLOW: 0.80, "mistral-small-24b": 0.70, DEAR: 0.74,
        "gpt-4o-mini": 0.72,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """A model of config/llama_catalog.yaml. Prices in USD per million tokens; `from_day` of twelve."""

    model: str
    input_price: float
    output_price: float
    quality: Mapping[str, float]
    from_day: int


CANDIDATES = (
    Candidate("llama-4-maverick", 0.20, 0.60, {"technical": 0.62, "creative": 0.97, "general": 0.80}, 5),
    # Better by its benchmark scores only.
    Candidate("llama-3.3-70b-atelier", 0.35, 0.60, {"technical": 0.60, "creative": 0.55, "general": 0.65}, 1),
)


@dataclass(frozen=True)
class Event:
    """A change of one model in some categories, from day `first` to day `last`."""

    model: str
    categories: tuple[str, ...]
    first: int
    last: int
    change: Mapping[str, float]
    text: str


@dataclass(frozen=True)
class Task:
    """One prompt of a day; interactive ones are waited for, the others are a backlog."""

    key: str
    prompt: str
    category: str
    interactive: bool


@dataclass(frozen=True)
class Scenario:
    """`tasks` and `interactive` count a day's prompts; `rate` is a model's calls per second."""

    days: int = 12
    period_seconds: int = 6
    seed: int = 1
    tasks: int = 600
    interactive: int = 90
    rate: int = 14
    trial_prompts: int = 36
    failing_share: float = 0.4
    failing_quality: float = 0.1
    target: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", f"{60 * self.rate}/min")

    def day_of(self, of_twelve: int) -> int:
        """The day that corresponds to a day of the scenario of twelve days."""
        return max(2, round(of_twelve * self.days / 12))

    @property
    def failing_days(self) -> range:
        """Days on which FAILING fails for technical prompts."""
        first = self.day_of(4)
        return range(first, max(first + 2, self.day_of(8)))

    @property
    def events(self) -> tuple[Event, ...]:
        failing, last = self.failing_days, self.days
        broken = {"failing": self.failing_share, "quality": self.failing_quality}
        return (
            Event(FAILING, ("technical",), failing.start, failing.stop - 1, broken,
                  f"{FAILING} starts to fail for technical prompts: {self.failing_share:.0%} of its calls"),
            Event(SLOW, CATEGORIES, self.day_of(3), last, {"latency_factor": 12.0},
                  f"{SLOW} becomes slow: 12 times its latency"),
            Event(DEAR, CATEGORIES, self.day_of(9), last, {"price_factor": 60.0},
                  f"{DEAR} becomes expensive: 60 times its price"),
        )  # fmt: skip

    def conditions(self, day: int) -> list[dict[str, Any]]:
        """The day's simulated conditions, as `PUT /conditions` of the stand-in takes them."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for category, qualities in QUALITY.items():
            for model, quality in qualities.items():
                found.setdefault((model, category), {})["quality"] = quality
        for event in self.events:
            for category in event.categories if event.first <= day <= event.last else ():
                found.setdefault((event.model, category), {}).update(event.change)
        for candidate in CANDIDATES:
            for category, quality in candidate.quality.items():
                found[candidate.model, category] = {"quality": quality}
        missing = [c.model for c in CANDIDATES if c.from_day > 1 and day < self.day_of(c.from_day)]
        return [
            *({"model": model, "category": category, **what} for (model, category), what in found.items()),
            *({"model": model, "served": False} for model in missing),
        ]

    def news(self, day: int) -> list[str]:
        """What changes on the morning of a day."""
        found = [event.text for event in self.events if event.first == day]
        found += [f"{FAILING} has recovered"] * (day == self.failing_days.stop)
        new = [c.model for c in CANDIDATES if c.from_day > 1 and self.day_of(c.from_day) == day]
        return found + [f"{model} can be called from now on" for model in new]

    def day(self, day: int) -> list[Task]:
        """The day's prompts; each is new, and the same for the same seed."""
        random_ = random.Random(f"{self.seed} {day}")
        found = []
        for kind, count in (("task", self.tasks), ("ask", self.interactive)):
            for number in range(count):
                category = CATEGORY_MIX[number * 3 % len(CATEGORY_MIX)]
                key = f"d{day:02}-{kind}-{number:04}"
                prompt = f"{random_.choice(_prompts()[category])} [{key}]"
                found.append(Task(key, prompt, category, kind == "ask"))
        return found

    def config(self) -> RouterConfig:
        """The shipped config with fewer models, on the fast clock."""
        shipped = load_config()
        return RouterConfig(
            models={name: self._model(shipped.models, name) for name in MODELS},
            default_category=shipped.default_category,
            categories=shipped.categories,
            worker=WorkerSettings(
                retry_base_seconds=0.1, retry_cap_seconds=0.5, another_model_seconds=1.0,
                idle_leave_seconds=3600, poll_seconds=0.5,
            ),
            # A busy machine sends late, which is not the subject here.
            traffic=TrafficSettings(
                initial_cooldown_seconds=0.1, max_cooldown_seconds=1.0, minute_send_slack=2.0,
                minute_transit_slack=2.0,
            ),
            answering=AnsweringSettings(default_deadline_seconds=8.0, late_seconds=1.0),
        )  # fmt: skip

    def _model(self, shipped: Mapping[str, ModelSettings], name: str) -> ModelSettings:
        """The shipped model with its ranks counted among MODELS only."""
        model = shipped[name]
        ranks = {
            category: 1 + sum(shipped[other].ranks[category] < rank for other in MODELS)
            for category, rank in model.ranks.items()
        }
        timeout = model.timeout_seconds / TIME_SCALE
        return model.model_copy(update={"target": self.target, "timeout_seconds": timeout, "ranks": ranks})

    def learning(self) -> LearningSettings:
        """The shipped settings on the fast clock.

        A day has a few hundred calls per category instead of thousands: 12 % of them explore instead of 5,
        and fewer are enough to judge a model.
        """
        shipped = load_learning(None, CATEGORIES).model_dump()
        shipped["period_hours"] = self.period_seconds / 3600
        shipped["half_life_periods"] *= PERIODS_PER_DAY
        shipped["memory_periods"] *= PERIODS_PER_DAY
        shipped |= {"enough_calls": 15, "prior_calls": 8}
        shipped["exploration"]["share"] = 0.12
        shipped["utility"]["latency_seconds"] /= TIME_SCALE
        shipped["outage"]["seconds"] = 1
        return LearningSettings.model_validate(shipped)

    def discovery(self) -> DiscoverySettings:
        """The shipped settings with targets and timeouts of the fast clock, and without a judge model."""
        shipped = load_discovery(None, CATEGORIES).model_dump()
        shipped["catalogs"] = [catalog for catalog in shipped["catalogs"] if catalog["kind"] == "file"]
        shipped["trials"] |= {
            "prompts": self.trial_prompts, "target": f"{30 * self.rate}/min", "timeout_seconds": 5.0,
            "max_concurrency": 16, "judged": 0,
        }  # fmt: skip
        shipped["probation"] |= {"target": f"{30 * self.rate}/min", "min_calls": 20, "timeout_seconds": 4.0}
        return DiscoverySettings.model_validate(shipped)

    def backend_arguments(self, folder: Path) -> Sequence[str]:
        """The stand-in's command line; it is given the category of every prompt."""
        references = folder / "prompts.jsonl"
        with references.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in self._known_prompts())
        candidates = [f"{c.model}={c.input_price:g}/{c.output_price:g}" for c in CANDIDATES]
        also = [argument for candidate in candidates for argument in ("--also", candidate)]
        return ["--no-new-models", "--seed", str(self.seed), "--references", str(references), *also]

    def _known_prompts(self) -> Iterator[dict[str, Any]]:
        for day in range(1, self.days + 1):
            yield from ({"prompt": task.prompt, "category": task.category} for task in self.day(day))
        for category in CATEGORIES:
            for prompt in read_trial_prompts(DEFAULT_CONFIG_FOLDER, category):
                yield {**asdict(prompt), "category": category}


@functools.cache
def _prompts() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {category: [] for category in CATEGORIES}
    for line in PROMPTS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found[row["category"]].append(row["prompt"])
    return found
