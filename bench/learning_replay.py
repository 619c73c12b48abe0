"""Replays the router's ranking day by day on a table of real outcomes. See `learning.py`."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from router.learning import Placed
from router.learning.evidence import Evidence, Moments, PeriodStats, decayed
from router.learning.ranking import Candidate, Standing, rank
from router.learning.utility import Prior, category_prior
from router.settings import LearningSettings

FAILING_SUCCESS = 0.2
TOPIC_PRIOR_CALLS = 60.0
NO_COST = float("nan")

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """A category, or a topic of a category."""

    category: str
    topic: str = ""


@dataclass(frozen=True)
class Table:
    """Outcomes by prompt (rows) and model (columns). Cost in USD, NaN if unknown."""

    name: str
    models: tuple[str, ...]
    keys: tuple[Key, ...]  # category and topic
    key_of: Ints  # index into keys, by prompt
    score: Floats
    cost: Floats

    @property
    def categories(self) -> list[str]:
        return sorted({key.category for key in self.keys})


def read_table(outcomes: Path, prompts: Path | None) -> Table:
    """Reads the prompts that every model answered; with `prompts`, only those whose text is in that file."""
    known = None
    if prompts is not None:
        with gzip.open(prompts, "rt", encoding="utf-8") as lines:
            known = {json.loads(line)["prompt_id"] for line in lines}
    cells: dict[str, dict[str, tuple[float, float]]] = {}
    keys: dict[str, Key] = {}
    with gzip.open(outcomes, "rt", encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            if known is None or row["prompt_id"] in known:
                cost = float(row["cost_usd"]) if row["cost_usd"] else NO_COST
                score = min(1.0, max(0.0, float(row["score"])))
                cells.setdefault(row["prompt_id"], {})[row["model"]] = (score, cost)
                keys[row["prompt_id"]] = Key(row["category"], row["subject"])
    models = tuple(sorted({model for answers in cells.values() for model in answers}))
    whole = [prompt for prompt, answers in cells.items() if len(answers) == len(models)]
    distinct = sorted({keys[prompt] for prompt in whole})
    both = np.array([[cells[prompt][model] for model in models] for prompt in whole])
    key_of = np.array([distinct.index(keys[prompt]) for prompt in whole])
    name = outcomes.name.split(".")[0]
    return Table(name, models, tuple(distinct), key_of, both[:, :, 0], both[:, :, 1])


def utilities(table: Table, learning: LearningSettings) -> Floats:
    """prompt x model: utility of the call, by the weights of the ranking; latencies are unknown."""
    result = np.zeros_like(table.score)
    for place, key in enumerate(table.keys):
        utility, of_key = learning.utility_of(key.category), table.key_of == place
        cheap = 1 / (1 + np.nan_to_num(table.cost[of_key], nan=utility.cost_usd) / utility.cost_usd)
        whole = utility.success + utility.score + utility.latency + utility.cost
        parts = (
            utility.success + utility.score * table.score[of_key] + utility.latency / 2 + utility.cost * cheap
        )
        result[of_key] = parts / whole
    return result


@dataclass
class Replay:
    """One replay. By day: the model of each prompt, the answering model (-1: failed), and exploration.

    By review: the first model, and the models below the floor.
    """

    sent: list[Ints] = field(default_factory=list)
    choices: list[Ints] = field(default_factory=list)
    explored: list[NDArray[np.bool_]] = field(default_factory=list)
    first: list[dict[Key, int]] = field(default_factory=list)
    low: list[set[tuple[Key, int]]] = field(default_factory=list)


class RouterReplay:
    """The router on a table, ranking by category or by topic."""

    def __init__(self, table: Table, learning: LearningSettings, *, topics: bool, seed: int) -> None:
        self.table, self.learning, self.topics = table, learning, topics
        self.draw = np.random.default_rng(seed)
        start = self.draw.permutation(len(table.models))
        self.keys = [key if topics else Key(key.category) for key in table.keys]
        self.every = sorted({*self.keys, *(Key(key.category) for key in self.keys)})
        self.orders: dict[Key, list[Placed] | None] = dict.fromkeys(self.every)
        self.places = {key: {int(m): n for n, m in enumerate(start, 1)} for key in self.every}
        self.history: dict[tuple[Key, int], list[PeriodStats]] = {}
        self.replay = Replay()

    def run(self, days: Sequence[Ints], failing: Callable[[int], dict[str, int]]) -> Replay:
        for day, prompts in enumerate(days):
            choice, explored = self._choose(prompts)
            fails = np.zeros(len(prompts), dtype=bool)
            for category, model in failing(day).items():
                of_category = np.array([key.category == category for key in self.table.keys])[
                    self.table.key_of[prompts]
                ]
                fails |= of_category & (choice == model) & (self.draw.random(len(prompts)) > FAILING_SUCCESS)
            self._record(day, prompts, choice, fails)
            self.replay.sent.append(choice)
            self.replay.choices.append(np.where(fails, -1, choice))
            self.replay.explored.append(explored)
            self._review(day)
        return self.replay

    def _choose(self, prompts: Ints) -> tuple[Ints, NDArray[np.bool_]]:
        choice = np.zeros(len(prompts), dtype=np.int64)
        explored = np.zeros(len(prompts), dtype=bool)
        for key in set(self.keys):
            here = np.flatnonzero(np.array([k == key for k in self.keys])[self.table.key_of[prompts]])
            places = self.places[key]
            choice[here] = min(places, key=lambda m: places[m])
            lot, taken = self.draw.random(len(here)), 0.0
            for p in (self.orders[key] or ())[1:]:
                chosen = here[(lot >= taken) & (lot < taken + p.least_share)]
                taken += p.least_share
                choice[chosen], explored[chosen] = self.table.models.index(p.model), True
        return choice, explored

    def _record(self, day: int, prompts: Ints, choice: Ints, fails: NDArray[np.bool_]) -> None:
        at = np.array([hash(self.keys[n]) for n in self.table.key_of[prompts]])
        for key in set(self.keys):
            for model in range(len(self.table.models)):
                mine = (at == hash(key)) & (choice == model)
                if not mine.any():
                    continue
                done = prompts[mine & ~fails]
                stats = PeriodStats(
                    day, int(mine.sum()), len(done), Moments(), _moments(self.table.cost[done, model]),
                    {"reference": _moments(self.table.score[done, model])},
                )  # fmt: skip
                for level in {key, Key(key.category)}:
                    self._add(level, model, stats)

    def _add(self, key: Key, model: int, stats: PeriodStats) -> None:
        history = self.history.setdefault((key, model), [])
        if history and history[-1].period == stats.period:
            last = history.pop()
            scores = {"reference": last.scores["reference"] + stats.scores["reference"]}
            stats = PeriodStats(
                stats.period, last.calls + stats.calls, last.answered + stats.answered, Moments(),
                last.costs + stats.costs, scores,
            )  # fmt: skip
        history.append(stats)

    def _review(self, day: int) -> None:
        known = {
            (key, model): self._evidence(key, model, day)
            for key in self.every
            for model in range(len(self.table.models))
        }
        for key in self.every:  # a category comes before its topics, which start from its order
            above = self.places[Key(key.category)]
            candidates = [
                Candidate(name, above[model], known[key, model])
                for model, name in enumerate(self.table.models)
            ]
            order = rank(key.category, candidates, self.learning, self._priors(key, known))
            self.orders[key] = order
            self.places[key] = {self.table.models.index(p.model): p.place for p in order}
        self.replay.low.append({
            (key, self.table.models.index(p.model))
            for key, order in self.orders.items()
            for p in order or ()
            if p.standing is Standing.BELOW_FLOOR
        })  # fmt: skip
        firsts = {key: self.table.models.index(order[0].model) for key, order in self.orders.items() if order}
        self.replay.first.append({key: firsts[key] for key in self.keys})

    def _evidence(self, key: Key, model: int, day: int) -> Evidence:
        settings = self.learning
        return decayed(
            self.history.get((key, model), []), day, half_life=settings.half_life_periods,
            memory=settings.memory_periods, change_errors=settings.change_errors,
        )  # fmt: skip

    def _priors(self, key: Key, known: dict[tuple[Key, int], Evidence]) -> dict[str, Prior] | None:
        if not key.topic:
            return None
        of_category = [known[Key(key.category), model] for model in range(len(self.table.models))]
        prior = category_prior(of_category, self.learning.utility_of(key.category), self.learning.prior_calls)
        return {
            name: topic_prior(evidence, prior, TOPIC_PRIOR_CALLS)
            for name, evidence in zip(self.table.models, of_category, strict=True)
        }


def topic_prior(evidence: Evidence, prior: Prior, calls: float) -> Prior:
    """The prior of one model in a topic: its means in the category, with the weight of `calls`."""

    def shrunk(moments: Moments, towards: float) -> float:
        return (moments.total + prior.calls * towards) / (moments.count + prior.calls)

    return Prior(
        success=shrunk(evidence.success, prior.success),
        scores={
            source: shrunk(evidence.scores.get(source, Moments()), towards)
            for source, towards in prior.scores.items()
        },
        log_seconds=shrunk(evidence.latencies, prior.log_seconds),
        cost_usd=shrunk(evidence.costs, prior.cost_usd),
        calls=calls,
    )


def _moments(values: Floats) -> Moments:
    values = values[~np.isnan(values)]
    return Moments.of(len(values), float(values.sum()), float((values**2).sum()))
