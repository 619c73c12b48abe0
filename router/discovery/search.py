"""The search for better models: catalogues -> criteria -> trials -> what won is taken on, on probation.

One category after the other. What was found of its candidates is kept at once, in one transaction; then
`discovered.yaml` and the Variables follow (`publishing`). A search that dies leaves whole steps behind it,
and the next one goes on from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from pathlib import Path

import psycopg2

from router.database import Connection, connect, rows, transaction
from router.discovery import store as kept
from router.discovery.catalog_entry import CatalogModel
from router.discovery.comparison import TrialResult, TrialVerdict, judge_trial
from router.discovery.discovered_file import require_writable
from router.discovery.model_names import normal_name
from router.discovery.plan import CategoryPlan, known_names, plan_category, read_catalogs, why_known
from router.discovery.publishing import Variables, line_of, publish
from router.discovery.store import Finding
from router.discovery.trials import Budget, CandidateTrial, TrialModel, TrialSetup, run_trial
from router.errors import AirflowError, ConfigError, RouterError, unknown
from router.models import VARIABLE_PREFIX, DirectCaller
from router.settings import Addresses, DiscoverySettings, LearningSettings, RouterConfig

SEARCH_LOCK = 7_205_759_405
LONGEST_SECONDS = 3600.0  # after which a night begins no further category
NOT_NAMED = "the Models Backend does not name it among its models"


class SearchBusy(RouterError):  # noqa: N818 - a state of the world, read as one
    """Another search runs on this database."""


@dataclass(frozen=True, slots=True)
class SearchReport:
    """What a search did, or would do: then `search` is None. `findings`: every model that was looked at."""

    search: int | None
    plans: tuple[CategoryPlan, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def taken(self) -> tuple[Finding, ...]:
        """What came to the roster."""
        return tuple(finding for finding in self.findings if finding.verdict == "taken")


@dataclass(slots=True)
class _Search:
    """What the steps of one search share."""

    connection: Connection
    addresses: Addresses
    config: RouterConfig
    learning: LearningSettings
    settings: DiscoverySettings
    folder: Path
    by: str
    variables: Variables | None
    notes: list[str]
    purse: Budget
    number: int = 0
    findings: list[Finding] = field(default_factory=list)

    def note(self, *notes: str) -> None:
        self.notes += [note for note in notes if note not in self.notes]

    def publish(self) -> None:
        self.note(*publish(self.connection, self.folder, self.variables))


def run_search(
    addresses: Addresses, config: RouterConfig, learning: LearningSettings,
    search_settings: DiscoverySettings,
    folder: Path, *, categories: Collection[str] | None = None, by: str, dry_run: bool = False,
    today: date | None = None, variables: Variables | None = None, since: datetime | None = None,
) -> SearchReport:  # fmt: skip
    """The whole search, for `categories` or all; blocks for as long as its trials take, often many minutes.

    With `dry_run` nothing is sent and nothing kept. `since` is when the night began that this try belongs to:
    what earlier ones cost counts, what they tried is not tried again, and after an hour nothing new is begun.

    SearchBusy if another one runs; ConfigError, before anything is tried, if `discovered.yaml` could not be
    written; CatalogError if no catalogue can be read, BackendUnavailable, AirflowError.
    """
    wanted = _wanted(config, categories)
    if not dry_run:
        require_writable(folder)
        if variables is not None:
            variables.variables(VARIABLE_PREFIX)  # says now if Airflow cannot be reached
    with _alone(addresses.database_url) as connection:
        models, refusals, notes = read_catalogs(search_settings, folder)
        tried, cost = kept.tried_since(connection, since) if since else (frozenset[str](), 0.0)
        purse = Budget(search_settings.trials.budget_usd - cost)
        about = _Search(
            connection, addresses, config, learning, search_settings, folder, by, variables, notes, purse
        )
        if not dry_run:
            about.publish()  # what a death left undone
            about.number = kept.begin_search(connection, by)
            kept.keep_findings(connection, about.number, refusals)
        day = today or kept.today(connection)
        about.findings += refusals
        plans = []
        began = time.monotonic()
        for category in wanted:
            if category in tried:
                about.note(f"{category}: its candidates were tried this night already")
                continue
            if since and time.monotonic() - began > LONGEST_SECONDS:
                about.note(f"{category}: time is up, its candidates are for the next night")
                continue
            plan = plan_category(
                connection, category, models,
                settings=search_settings, folder=folder, today=day, search=about.number,
            )  # fmt: skip
            about.note(*plan.notes)
            if dry_run:
                about.findings += plan.findings
            else:
                plan = _carry_out(about, plan)
            plans.append(plan)
        return _ended(about, plans, dry_run=dry_run)


def _ended(about: _Search, plans: Sequence[CategoryPlan], *, dry_run: bool) -> SearchReport:
    if about.purse.is_empty:
        about.note(f"the budget of {about.settings.trials.budget_usd:g} USD for trials is used up")
    if not dry_run:
        kept.end_search(about.connection, about.number, about.notes)
    number = None if dry_run else about.number
    return SearchReport(number, tuple(plans), tuple(about.findings), tuple(about.notes))


@contextmanager
def _alone(url: str) -> Iterator[Connection]:
    with connect(url, autocommit=True) as connection:
        if not rows(connection, "SELECT pg_try_advisory_lock(%s) AS mine", (SEARCH_LOCK,))[0]["mine"]:
            raise SearchBusy("Another search is running on this database. Wait for it to end, and try again.")
        try:
            yield connection
        finally:  # at the connection's end it would be free too, but a moment after
            with contextlib.suppress(psycopg2.Error):
                connection.rollback()
                rows(connection, "SELECT pg_advisory_unlock(%s)", (SEARCH_LOCK,))


def _wanted(config: RouterConfig, categories: Collection[str] | None) -> list[str]:
    for category in categories or ():
        if category not in config.categories:
            raise unknown(category, config.categories, "category")
    return [category for category in config.categories if not categories or category in categories]


def _carry_out(about: _Search, plan: CategoryPlan) -> CategoryPlan:
    """Try the category's candidates, keep what was found, and take on the one that won by most.

    Returns the plan with those who were tried.
    """
    trials, unreachable = asyncio.run(_trials(about, plan)) if plan.candidates else ({}, [])
    results = {
        name: judge_trial(
            trial.candidate, trial.incumbent, about.learning.utility_of(plan.category),
            about.learning.grading.sources, about.settings.trials,
        )
        for name, trial in trials.items()
    }  # fmt: skip
    lines = {name: _line_of(about.variables, name) for name in results}
    listed = {model.name: model for model in (*plan.candidates, *plan.next_ones)}
    plan = replace(plan, candidates=tuple(listed[name] for name in trials))
    with transaction(about.connection):
        findings = [
            *plan.findings,
            *(_finding(plan, model, "unreachable", NOT_NAMED) for model in unreachable),
            *_decided(about, plan, trials, results, lines),
        ]
        kept.keep_findings(about.connection, about.number, findings)
        for trial in trials.values():
            kept.keep_grades(about.connection, trial.grades)
    about.findings += findings
    about.publish()
    return plan


async def _trials(
    about: _Search, plan: CategoryPlan
) -> tuple[Mapping[str, CandidateTrial], list[CatalogModel]]:
    """The trials of as many candidates as there were to be, and those that the backend cannot call."""
    assert plan.incumbent is not None
    settings = about.settings
    bench = TrialSetup(plan.category, plan.incumbent, plan.judge, plan.prompts, settings.trials, about.purse)
    contenders: list[TrialModel] = []
    unreachable = []
    async with DirectCaller(about.addresses, about.config) as caller:
        served = await caller.known_models()
        for model in (*plan.candidates, *plan.next_ones):
            endpoint = _served_as(model, served)
            if endpoint is None:
                unreachable.append(model)
            elif len(contenders) < len(plan.candidates):
                contenders.append(kept.as_contender(model, endpoint, settings.probation, about.config))
        return (await run_trial(caller, bench, contenders) if contenders else {}), unreachable


def _served_as(model: CatalogModel, served: Collection[str]) -> str | None:
    """What the backend calls the model: as the catalogue says, as the roster will, or in another spelling."""
    spelled = (name for name in sorted(served) if normal_name(name) == normal_name(model.name))
    return next((name for name in (model.endpoint, model.name, *spelled) if name in served), None)


def _line_of(variables: Variables | None, model: str) -> dict[str, str | None]:
    with contextlib.suppress(AirflowError):  # said by whoever publishes
        return line_of(variables, model)
    return {}


def _decided(
    about: _Search,
    plan: CategoryPlan,
    trials: Mapping[str, CandidateTrial],
    results: Mapping[str, TrialResult],
    lines: Mapping[str, Mapping[str, str | None]],
) -> Iterator[Finding]:
    """A finding for each candidate that was tried; the best winner is taken on, within the transaction."""
    models = {model.name: model for model in plan.candidates}
    taken: str | None = None
    for name, result in sorted(results.items(), key=lambda item: -item[1].lower):
        model = models[name]
        if result.verdict is TrialVerdict.VOID:
            about.note(f"{plan.category}: {name} was not judged: {result.reason}")
        elif result.verdict is TrialVerdict.UNREACHABLE:
            yield _finding(plan, model, "unreachable", result.reason)
        elif result.verdict is TrialVerdict.LOST:
            yield _finding(plan, model, "lost", result.reason, result)
        elif taken is not None:
            yield _finding(plan, model, "lost", f"{taken} won by more; {result.reason}", result)
        else:
            try:
                finding = _taken(about, plan, model, trials[name].contender, result, lines[name])
            except ConfigError as error:  # what people have written cannot be read: what was paid for is kept
                about.note(f"{plan.category}: {name} won, and is not taken on: {error}")
                continue
            taken = name if finding.verdict == "taken" else None
            yield finding


def _taken(  # noqa: PLR0917 - private: what _decided has at hand
    about: _Search,
    plan: CategoryPlan,
    model: CatalogModel,
    contender: TrialModel,
    result: TrialResult,
    line: Mapping[str, str | None],
) -> Finding:
    """Take the winner on, unless people have written it into models.yaml or the roster meanwhile."""
    known = known_names(about.connection, about.folder, but_of_search=about.number)
    said = why_known(replace(model, endpoint=contender.model.endpoint), known)
    if said is not None:
        return _finding(plan, model, "known", said)
    assert plan.incumbent is not None
    why = f"better than {plan.incumbent.name} for {plan.category}: {result.reason} (by {model.catalog})"
    event = kept.take(
        about.connection, about.number, contender, context_tokens=model.context_tokens,
        category=plan.category, by=about.by, why=why, share=about.learning.exploration.share / 2, known=line,
    )  # fmt: skip
    if event is None:
        return _finding(plan, model, "known", "the roster has had it since a moment ago")
    return _finding(plan, model, "taken", why, result)


def _finding(
    plan: CategoryPlan,
    model: CatalogModel,
    verdict: kept.Verdict,
    reason: str,
    result: TrialResult | None = None,
) -> Finding:
    trial = None if result is None else result.as_json()
    return Finding(model.name, plan.category, model.catalog, verdict, reason, trial)
