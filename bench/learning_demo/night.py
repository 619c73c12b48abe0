"""A night of the demo of learning: the review of the log, the search, and those on probation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bench.learning_demo.script import Script
from router.database import connect, rows
from router.discovery import Decision, SearchReport, review_probation, run_search
from router.discovery.probation_rules import Step
from router.learning import RankChange, run_review
from router.settings import Addresses, RouterConfig

BY = "the demo"
MOST_NAMES = 5
WORDS = {Step.PROMOTE: "promoted", Step.RETIRE: "retired", Step.STAY: "stays on probation"}

_STANDINGS = """
SELECT k.category, k.model, k.place, k.standing, o.state
  FROM rankings k JOIN roster o USING (model) WHERE o.state IN ('active', 'probation')"""


class Stands(NamedTuple):
    """How a model stands in a category."""

    place: int
    standing: str
    state: str


Order = Mapping[str, Mapping[str, Stands]]  # category -> model


@dataclass(frozen=True)
class Night:
    """What a night did. `searched`: what was found, tried, taken, promoted or dropped, a line each."""

    before: Order
    after: Order
    moves: tuple[RankChange, ...]
    notes: tuple[str, ...]
    searched: tuple[str, ...]
    promoted: tuple[str, ...]
    seconds: float

    def first(self, category: str) -> str:
        """The model that is first after this night."""
        stands = self.after[category]
        return min(stands, key=lambda model: (stands[model].place, model))

    @property
    def new_firsts(self) -> list[tuple[str, str, str]]:
        """(category, model before, model now) where another model is first."""
        before = {category: min(stands, key=lambda m: (stands[m].place, m))
                  for category, stands in self.before.items()}  # fmt: skip
        return [
            (category, before[category], self.first(category))
            for category in self.after
            if category in before and before[category] != self.first(category)
        ]


async def spend_night(
    addresses: Addresses, config: RouterConfig, script: Script, folder: Path, said: set[str]
) -> Night:
    """Review, search, and decide on those on probation, as the nightly DAG does.

    `said`: what was said of the search before; it is not said again, and what is said now is added.
    """
    began = time.monotonic()
    url = addresses.database_url
    before = await asyncio.to_thread(_order, url)
    review = await asyncio.to_thread(run_review, url, script.learning(), by=BY)
    searched = await asyncio.to_thread(_search, addresses, config, script, folder)
    decisions = await asyncio.to_thread(_decide, addresses, config, script, folder)
    searched += [f"{one.model} {WORDS[one.step]}: {one.reason}" for one in decisions]
    promoted = tuple(one.model for one in decisions if one.step is Step.PROMOTE)
    searched = [line for line in searched if line not in said]
    said.update(searched)
    after = await asyncio.to_thread(_order, url)
    return Night(
        before, after, review.moves, review.notes, tuple(searched), promoted, time.monotonic() - began
    )


def _search(addresses: Addresses, config: RouterConfig, script: Script, folder: Path) -> list[str]:
    settings = script.search()
    report = run_search(addresses, config, script.learning(), settings, folder, by=BY, today=script.today)
    return [*_counts(report), *_tried(report)]


def _decide(addresses: Addresses, config: RouterConfig, script: Script, folder: Path) -> list[Decision]:
    learning, settings = script.learning(), script.search()
    return review_probation(addresses.database_url, folder, config, learning, settings, by=BY)


def _counts(report: SearchReport) -> Iterator[str]:
    looked_at = {finding.model for finding in report.findings}
    refused = {finding.model for finding in report.findings if finding.verdict == "refused"}
    others = {finding.model for finding in report.findings if finding.verdict != "refused"}
    tried = {finding.model for finding in report.findings if finding.trial is not None}
    refused_by_all = len(refused - others)
    yield f"{len(looked_at)} models found, {refused_by_all} refused for every category, {len(tried)} tried"


def _tried(report: SearchReport) -> Iterator[str]:
    """A line for each candidate that was tried, and one for all that cannot be called."""
    unreachable: set[str] = set()
    for finding in report.findings:
        if finding.trial is not None:
            yield f"{finding.category}: {finding.model} {finding.verdict}: {finding.reason}"
        elif finding.verdict == "unreachable":
            unreachable.add(finding.model)
    if unreachable:
        names = ", ".join(sorted(unreachable)[:MOST_NAMES])
        more = f" and {len(unreachable) - MOST_NAMES} more" if len(unreachable) > MOST_NAMES else ""
        yield f"unreachable, since the Models Backend does not name them: {names}{more}"


def _order(url: str) -> Order:
    found: dict[str, dict[str, Stands]] = {}
    with connect(url) as connection:
        for row in rows(connection, _STANDINGS):
            stands = Stands(row["place"], row["standing"], row["state"])
            found.setdefault(row["category"], {})[row["model"]] = stands
    return found
