"""What happened: each day's results, the nightly run after it, and what follows from all days."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bench.learning_demo.scenario import FAILING, TODAY, Scenario
from bench.learning_demo.side import SideDay, Solved
from router.database import connect, rows
from router.discovery import SearchReport, review_probation, run_search
from router.discovery.probation_rules import Step
from router.learning import RankChange, run_review
from router.settings import Addresses, RouterConfig

WITH, WITHOUT = "with_learning", "without_learning"
SIDES = {WITH: "with learning", WITHOUT: "without"}
STEPS = {Step.PROMOTE: "promoted", Step.RETIRE: "retired", Step.STAY: "stays on probation"}
_RANKINGS = """
SELECT k.category, k.model, k.place, k.standing
  FROM rankings k JOIN roster o USING (model) WHERE o.state IN ('active', 'probation')"""


class Rank(NamedTuple):
    """A model's rank in a category, 1 is best, and its standing."""

    rank: int
    standing: str


Ranking = Mapping[str, Mapping[str, Rank]]  # category -> model


@dataclass(frozen=True)
class Night:
    """One nightly run: the ranking before and after it, its changes, and a line per discovery step."""

    before: Ranking
    after: Ranking
    changes: tuple[RankChange, ...]
    discovery: tuple[str, ...]
    promoted: tuple[str, ...]
    seconds: float

    def first(self, category: str) -> str:
        """The model that is first after this night."""
        return _first(self.after[category])

    @property
    def new_firsts(self) -> list[tuple[str, str, str]]:
        """(category, former model, present model) where another model became first."""
        pairs = [(c, _first(self.before[c]), self.first(c)) for c in self.after if c in self.before]
        return [pair for pair in pairs if pair[1] != pair[2]]


def run_night(
    addresses: Addresses, config: RouterConfig, scenario: Scenario, folder: Path, shown: set[str]
) -> Night:
    """Review, search and decide on probation, as the nightly DAG does; lines in `shown` are not repeated."""
    started, url, by = time.monotonic(), addresses.database_url, "the demo"
    learning, discovery = scenario.learning(), scenario.discovery()
    before = _ranking(url)
    review = run_review(url, learning, by=by)
    report = run_search(addresses, config, learning, discovery, folder, by=by, today=TODAY)
    decisions = review_probation(url, folder, config, learning, discovery, by=by)
    lines = [*_lines(report), *(f"{one.model} {STEPS[one.step]}: {one.reason}" for one in decisions)]
    lines = [line for line in lines if line not in shown]
    shown.update(lines)
    promoted = tuple(one.model for one in decisions if one.step is Step.PROMOTE)
    return Night(before, _ranking(url), review.ranked, tuple(lines), promoted, time.monotonic() - started)


def _first(ranking: Mapping[str, Rank]) -> str:
    return min(ranking, key=lambda model: (ranking[model].rank, model))


def _ranking(url: str) -> Ranking:
    found: dict[str, dict[str, Rank]] = {}
    with connect(url) as connection:
        for row in rows(connection, _RANKINGS):
            found.setdefault(row["category"], {})[row["model"]] = Rank(row["place"], row["standing"])
    return found


def _lines(report: SearchReport) -> Iterator[str]:
    models = {finding.model for finding in report.findings}
    refused = models - {finding.model for finding in report.findings if finding.verdict != "refused"}
    yield f"{len(models)} models found, {len(refused)} refused for every category"
    for finding in report.findings:
        if finding.trial is not None:
            yield f"{finding.category}: {finding.model} {finding.verdict}: {finding.reason}"
    if missing := {finding.model for finding in report.findings if finding.verdict == "unreachable"}:
        yield f"unreachable, since the Models Backend does not serve them: {len(missing)} models"


@dataclass(frozen=True)
class Day:
    """One day and the night after it; `sides` by name."""

    number: int
    news: tuple[str, ...]
    sides: dict[str, SideDay]
    night: Night


@dataclass
class Story:
    """All days so far."""

    scenario: Scenario
    days: list[Day] = field(default_factory=list)

    def totals(self, side: str) -> dict[str, Any]:
        """One side over all days: shares of good answers and failed calls, median seconds, USD per 1,000."""
        tasks = [task for day in self.days for task in day.sides[side].tasks]
        calls = [row for day in self.days for row in day.sides[side].calls]
        interactive = [task for task in tasks if task.interactive]
        by_category = {c: [t for t in tasks if t.category == c] for c in sorted({t.category for t in tasks})}
        return {
            "tasks": len(tasks),
            "good": share_good(tasks),
            "good_by_category": {category: share_good(its) for category, its in by_category.items()},
            "good_asked": share_good(interactive),
            "seconds": statistics.median(task.seconds for task in interactive if task.seconds is not None),
            "cost": 1000 * sum(row["cost"] for row in calls if row["interactive"]) / len(interactive),
            "failed": 1 - sum(row["answered"] for row in calls) / sum(row["calls"] for row in calls),
        }

    def gain(self, *, interactive_only: bool = False) -> tuple[float, float]:
        """Gain in the share of good answers by learning, and its standard error, prompt by prompt."""
        pairs = [
            int(one.good) - int(other.good)
            for day in self.days
            for one, other in zip(day.sides[WITH].tasks, day.sides[WITHOUT].tasks, strict=True)
            if one.interactive or not interactive_only
        ]
        return statistics.fmean(pairs), statistics.stdev(pairs) / math.sqrt(len(pairs))

    @property
    def failing(self) -> dict[str, Any]:
        """What became of FAILING. Nights are numbered as their days; None: it did not happen.

        `shares` are its calls per task of the category, by day, after the night that took its first rank.
        """
        failing = self.scenario.failing_days
        first = {day.number: day.night.first("technical") for day in self.days}
        off = next((n for n in first if n >= failing.start and first[n] != FAILING), None)
        back = next((n for n in first if n >= failing.stop and first[n] == FAILING), None)
        after = [day for day in self.days if day.number in failing and off and day.number > off]
        shares = {s: [day.sides[s].share_of_calls(FAILING, "technical") for day in after] for s in SIDES}
        return {
            "first_before": first.get(failing.start - 1, ""),
            "off_at": off,
            "back_at": back,
            "reviews_until_off": None if off is None else off - failing.start + 1,
            "reviews_until_back": None if back is None else back - failing.stop + 1,
            "shares": shares[WITH],
            "shares_without": shares[WITHOUT],
        }

    @property
    def new_firsts(self) -> list[tuple[int, str, str, str]]:
        """(night, category, former model, present model) for each change of a first rank."""
        return [(day.number, *change) for day in self.days for change in day.night.new_firsts]

    @property
    def discovery(self) -> list[tuple[int, str]]:
        """(night, line) for each discovery step."""
        return [(day.number, line) for day in self.days for line in day.night.discovery]

    def as_json(self) -> dict[str, Any]:
        """The content of `--json FILE`: shares of 1, seconds of the fast clock, USD."""
        (gain, error), (gain_asked, error_asked) = self.gain(), self.gain(interactive_only=True)
        share = self.scenario.learning().exploration.share
        about = {"model": FAILING, "category": "technical", "exploration_share": share}
        firsts = ("night", "category", "before", "now")
        return {
            "days": self.scenario.days,
            "seed": self.scenario.seed,
            "sides": {side: self.totals(side) for side in SIDES},
            "gain": {"good": gain, "error": error, "good_asked": gain_asked, "error_asked": error_asked},
            "failing": {**self.failing, **about},
            "first_places": [dict(zip(firsts, change, strict=True)) for change in self.new_firsts],
            "searched": [{"night": night, "what": line} for night, line in self.discovery],
            "nights": [_day_as_json(day) for day in self.days],
        }


def _day_as_json(day: Day) -> dict[str, Any]:
    ranks = {c: {model: rank.rank for model, rank in its.items()} for c, its in day.night.after.items()}
    return {
        "day": day.number,
        "news": list(day.news),
        "good": {name: share_good(side.tasks) for name, side in day.sides.items()},
        "places": ranks,
        "moves": [str(change) for change in day.night.changes if change.changed],
        "review_seconds": day.night.seconds,
    }


def share_good(tasks: Sequence[Solved]) -> float:
    """The share of good answers; 0 without tasks."""
    return sum(task.good for task in tasks) / len(tasks) if tasks else 0.0
