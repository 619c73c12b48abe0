"""Searches for better models: reads catalogs, applies criteria, runs trials, and admits winners on probation.

The trials of all categories run at the same time. The findings of a category are stored in one transaction;
then `discovered.yaml` and the Variables follow (see `publishing`). A search that crashed before has changed
nothing; after a crash later, the next search continues with the first incomplete step.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from pathlib import Path

from router.database import Connection, advisory_lock, connect, transaction
from router.discovery import store
from router.discovery.catalog_entry import CatalogModel
from router.discovery.comparison import TrialResult, TrialVerdict, judge_trial
from router.discovery.discovered_file import require_writable
from router.discovery.model_names import normal_name
from router.discovery.plan import CategoryPlan, known_names, plan_category, read_catalogs, why_known
from router.discovery.progress import SearchProgress, stored
from router.discovery.publishing import Variables, line_of, publish
from router.discovery.store import Finding
from router.discovery.trials import CandidateTrial, TrialSetup, run_trials
from router.errors import (
    AirflowError,
    BackendUnavailable,
    ConfigError,
    DatabaseError,
    RouterError,
    first_line,
    unknown,
)
from router.learning import Budget, PricedModel
from router.models import VARIABLE_PREFIX, DirectCaller, ModelsBackend
from router.settings import Addresses, DiscoverySettings, LearningSettings, RouterConfig

SEARCH_LOCK = 7_205_759_405  # advisory lock; no other part uses this number
NOT_LISTED = "the Models Backend does not list it"
LABELS = {"taken": "admitted", "lost": "not admitted", "unreachable": "unreachable"}  # of verdicts


class SearchBusy(RouterError):  # noqa: N818 - a state, not a failure
    """Another search is running on this database."""


@dataclass(frozen=True, slots=True)
class SearchReport:
    """Result of a search; `search` is its number, None for a dry run. `findings` cover every model."""

    search: int | None
    plans: tuple[CategoryPlan, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def admitted(self) -> tuple[Finding, ...]:
        """The models that were admitted."""
        return tuple(finding for finding in self.findings if finding.verdict == "taken")

    @property
    def unserved(self) -> tuple[Finding, ...]:
        """The models that meet the criteria, but that the Models Backend does not serve."""
        return tuple(finding for finding in self.findings if is_unserved(finding))


@dataclass(slots=True)
class _Search:
    """State that the steps of one search share."""

    connection: Connection
    addresses: Addresses
    config: RouterConfig
    learning: LearningSettings
    settings: DiscoverySettings
    folder: Path
    by: str
    variables: Variables | None
    budget: Budget
    progress: SearchProgress
    dry_run: bool
    number: int = 0
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, *notes: str) -> None:
        for note in notes:
            if note not in self.notes:
                self.notes.append(note)
                self.progress.log(note)

    def publish(self) -> None:
        self.note(*publish(self.connection, self.folder, self.variables))


def is_unserved(finding: Finding) -> bool:
    """Whether the model meets the criteria, but the Models Backend does not serve it."""
    return finding.verdict == "unreachable" and finding.reason == NOT_LISTED


def run_search(
    addresses: Addresses, config: RouterConfig, learning: LearningSettings, settings: DiscoverySettings,
    folder: Path, *, categories: Collection[str] | None = None, by: str, dry_run: bool = False,
    today: date | None = None, variables: Variables | None = None, since: datetime | None = None,
    progress: SearchProgress | None = None,
) -> SearchReport:  # fmt: skip
    """Searches for better models in `categories` (default: all). Blocks until the trials end.

    This takes a minute or more.
    `folder` contains models.yaml and discovered.yaml. `by` is the author recorded in the history. A dry run
    sends no prompt and stores nothing. `today` (default: the database's date) is used for the age of
    candidates. `variables` is the client of Airflow that sets the Variables of admitted models; None sets
    none. `since` is the start of the nightly run, None for any other search: earlier attempts since then
    count toward the budget, and categories that they tried are skipped. `progress` is updated meanwhile.

    Raises SearchBusy if another search runs; ConfigError, before any trial, if `discovered.yaml` cannot be
    written; CatalogError if no catalog can be read; BackendUnavailable; AirflowError.
    """
    wanted = _wanted(config, categories)
    progress = progress or SearchProgress()
    if not dry_run:
        require_writable(folder)
        if variables is not None:
            variables.variables(VARIABLE_PREFIX)  # fails now if Airflow is unavailable
    with connect(addresses.database_url, autocommit=True) as connection:
        busy = SearchBusy(f"{_running(connection)} Try again when it has ended.")
        with advisory_lock(connection, SEARCH_LOCK, busy):
            models, refused, notes = read_catalogs(settings, folder)
            tried, cost = store.tried_since(connection, since) if since else (frozenset[str](), 0.0)
            search = _Search(
                connection, addresses, config, learning, settings, folder, by, variables,
                Budget(settings.trials.budget_usd - cost), progress, dry_run, findings=[*refused],
            )  # fmt: skip
            search.note(*notes)
            progress.log(f"{len(models)} models in the catalogs, {len(refused)} invalid entries")
            return _recorded(search, wanted, models, tried, today or store.today(connection))


def _running(connection: Connection) -> str:
    """The search that runs now, for the error of another one."""
    running = store.running_search(connection)
    if running is None:
        return "Another search is running on this database."
    progress = running["progress"] or {}
    calls = f", {progress['calls']} of {progress['of']} calls" if progress.get("of") else ""
    return (
        f"Search {running['search']}, started {running['seconds']:.0f} s ago by {running['by']}, is still"
        f" running ({progress.get('stage', 'starting')}{calls})."
    )


def _recorded(
    search: _Search,
    categories: Sequence[str],
    models: Sequence[CatalogModel],
    tried: Collection[str],
    today: date,
) -> SearchReport:
    """Runs the search and records its start and its end, also that of a search that fails."""
    if search.dry_run:
        plans = _served_plans(search, _planned(search, categories, models, tried, today))
        search.findings += [finding for plan in plans for finding in plan.findings]
        return SearchReport(None, tuple(plans), tuple(search.findings), tuple(search.notes))
    search.publish()  # completes what a crashed search left
    search.number = search.progress.search = store.begin_search(search.connection, search.by)
    search.progress.log(f"search {search.number} by {search.by}")
    try:
        store.record_findings(search.connection, search.number, search.findings)
        plans = _run_trials(search, _planned(search, categories, models, tried, today))
        if search.budget.is_empty:
            search.note(f"the budget of {search.settings.trials.budget_usd:g} USD for trials is used up")
    except BaseException as error:
        reason = first_line(str(error)) or "stopped"
        with contextlib.suppress(DatabaseError):
            store.end_search(search.connection, search.number, [*search.notes, f"ended early: {reason}"])
        raise
    store.end_search(search.connection, search.number, search.notes)
    return SearchReport(search.number, tuple(plans), tuple(search.findings), tuple(search.notes))


def _served_plans(search: _Search, plans: Sequence[CategoryPlan]) -> list[CategoryPlan]:
    """The plans without models that the backend does not serve, which become findings."""
    try:
        served = asyncio.run(_served(search))
    except BackendUnavailable as error:
        search.note(f"{error} So it is unknown which of the models it serves.")
        return list(plans)
    found = []
    for plan in plans:
        unserved = [model for model in plan.new if _served_as(model, served) is None]
        new = tuple(model for model in plan.new if model not in unserved)
        not_listed = (_finding(plan, model, "unreachable", NOT_LISTED) for model in unserved)
        found.append(replace(plan, new=new, findings=(*plan.findings, *not_listed)))
    return found


async def _served(search: _Search) -> frozenset[str]:
    addresses = search.addresses
    async with ModelsBackend(
        addresses.backend_url, search.config.backend, token=addresses.backend_token
    ) as backend:
        return frozenset(await backend.models())


def _planned(
    search: _Search,
    categories: Sequence[str],
    models: Sequence[CatalogModel],
    tried: Collection[str],
    today: date,
) -> list[CategoryPlan]:
    plans = []
    for category in categories:
        if category in tried:
            search.note(f"{category}: an earlier attempt of this run has tried its candidates")
            continue
        plan = plan_category(
            search.connection, category, models,
            settings=search.settings, folder=search.folder, today=today, search=search.number,
        )  # fmt: skip
        search.note(*plan.notes)
        plans.append(plan)
    return plans


def _wanted(config: RouterConfig, categories: Collection[str] | None) -> list[str]:
    for category in categories or ():
        if category not in config.categories:
            raise unknown(category, config.categories, "category")
    return [category for category in config.categories if not categories or category in categories]


def _run_trials(search: _Search, plans: Sequence[CategoryPlan]) -> list[CategoryPlan]:
    """Tries all candidates, stores the findings, and admits the winners. Returns the plans as executed."""
    trials, unserved = asyncio.run(_trials(search, plans)) if any(p.candidates for p in plans) else ({}, {})
    return [
        _decide(search, plan, trials.get(plan.category, {}), unserved.get(plan.category, ()))
        for plan in plans
    ]


def _decide(
    search: _Search,
    plan: CategoryPlan,
    trials: Mapping[str, CandidateTrial],
    unserved: Sequence[CatalogModel],
) -> CategoryPlan:
    """Stores the findings of a category, and admits the best winner."""
    results = {
        name: judge_trial(
            trial.candidate, trial.incumbent, search.learning.utility_of(plan.category),
            search.learning.grading.sources, search.settings.trials, elsewhere=trial.elsewhere,
        )
        for name, trial in trials.items()
    }  # fmt: skip
    lines = {name: _line_of(search, name) for name in results}
    plan = replace(plan, new=tuple(model for model in plan.new if model.name in trials))
    with transaction(search.connection):
        verdicts = list(_verdicts(search, plan, trials, results, lines))
        not_listed = [_finding(plan, model, "unreachable", NOT_LISTED) for model in unserved]
        findings = [*plan.findings, *not_listed, *verdicts]
        store.record_findings(search.connection, search.number, findings)
        for trial in trials.values():
            store.record_grades(search.connection, trial.grades)
    for verdict in verdicts:
        label = LABELS.get(verdict.verdict, verdict.verdict)
        search.progress.decided(plan.category, verdict.model, label, verdict.reason)
    search.findings += findings
    search.publish()
    return plan


async def _trials(
    search: _Search, plans: Sequence[CategoryPlan]
) -> tuple[Mapping[str, Mapping[str, CandidateTrial]], Mapping[str, list[CatalogModel]]]:
    """By category: the trials of the first `max_candidates` that are served, and the unserved models."""
    async with DirectCaller(search.addresses, search.config) as caller, stored(search.progress, caller.pool):
        served = await caller.known_models()
        setups, unserved = [], {}
        for plan in plans:
            setup, unserved[plan.category] = _set_up(search, plan, served)
            if setup is not None:
                setups.append(setup)
        if not setups:
            return {}, unserved
        settings = search.settings.trials
        trials = await run_trials(
            caller, setups, settings=settings, learning=search.learning, budget=search.budget,
            progress=search.progress,
        )  # fmt: skip  # fmt: skip
        return trials, unserved


def _set_up(
    search: _Search, plan: CategoryPlan, served: Collection[str]
) -> tuple[TrialSetup | None, list[CatalogModel]]:
    """The trials of a category, None without a candidate; and the new models that are not served."""
    candidates: list[PricedModel] = []
    unserved = []
    for model in plan.new:
        endpoint = _served_as(model, served)
        if endpoint is None:
            unserved.append(model)
        elif len(candidates) < plan.max_candidates:
            probation = search.settings.probation
            candidates.append(store.as_candidate(model, endpoint, probation, search.config))
    names = ", ".join(candidate.name for candidate in candidates) or "none"
    known = sum(finding.verdict == "known" for finding in plan.findings)
    search.progress.log(
        f"{plan.category}: {len(plan.passing)} models meet the criteria, {known} of them known,"
        f" {len(unserved)} not served; to try: {names}"
    )
    if not candidates or plan.incumbent is None:
        return None, unserved
    search.progress.log(f"{plan.category}: they are compared with {plan.incumbent.name}")
    return TrialSetup(plan.category, plan.incumbent, plan.judges, plan.prompts, tuple(candidates)), unserved


def _served_as(model: CatalogModel, served: Collection[str]) -> str | None:
    """The backend's name for the model: the catalog's, the roster's, or another spelling."""
    spelled = (name for name in sorted(served) if normal_name(name) == normal_name(model.name))
    return next((name for name in (model.endpoint, model.name, *spelled) if name in served), None)


def _line_of(search: _Search, model: str) -> dict[str, str | None]:
    with contextlib.suppress(AirflowError):  # reported when the Variables are published
        return line_of(search.connection, search.variables, model)
    return {}


def _verdicts(
    search: _Search,
    plan: CategoryPlan,
    trials: Mapping[str, CandidateTrial],
    results: Mapping[str, TrialResult],
    lines: Mapping[str, Mapping[str, str | None]],
) -> Iterator[Finding]:
    """A finding for each tried candidate, best first. Admits the best winner, within the transaction."""
    models = {model.name: model for model in plan.candidates}
    admitted: str | None = None
    for name, result in sorted(results.items(), key=lambda item: -item[1].lower):
        model = models[name]
        if result.verdict is TrialVerdict.VOID:
            search.note(f"{plan.category}: the trial of {name} is void: {result.reason}")
        elif result.verdict is TrialVerdict.UNREACHABLE:
            yield _finding(plan, model, "unreachable", result.reason)
        elif result.verdict is TrialVerdict.LOST:
            yield _finding(plan, model, "lost", result.reason, result)
        elif admitted is not None:
            yield _finding(plan, model, "lost", f"{admitted} won by more; {result.reason}", result)
        else:
            try:
                finding = _admit(search, plan, model, trials[name].model, result, lines[name])
            except ConfigError as error:  # models.yaml became unreadable; the paid trials are still stored
                search.note(f"{plan.category}: {name} won but was not admitted: {error}")
                continue
            admitted = name if finding.verdict == "taken" else None
            yield finding


def _admit(  # noqa: PLR0917 - private: values of _verdicts
    search: _Search,
    plan: CategoryPlan,
    model: CatalogModel,
    candidate: PricedModel,
    result: TrialResult,
    line: Mapping[str, str | None],
) -> Finding:
    """Admits the winner, unless models.yaml or the roster contain it by now."""
    known = known_names(search.connection, search.folder, except_search=search.number)
    known_as = why_known(replace(model, endpoint=candidate.model.endpoint), known)
    if known_as is not None:
        return _finding(plan, model, "known", known_as)
    assert plan.incumbent is not None
    why = f"better than {plan.incumbent.name} for {plan.category}: {result.reason} (catalog {model.catalog})"
    event = store.admit(
        search.connection, search.number, candidate, context_tokens=model.context_tokens,
        category=plan.category, by=search.by, why=why, share=search.learning.exploration.share / 2,
        known=line,
    )  # fmt: skip
    if event is None:
        return _finding(plan, model, "known", "added to the roster during the trial")
    return _finding(plan, model, "taken", why, result)


def _finding(
    plan: CategoryPlan,
    model: CatalogModel,
    verdict: store.Verdict,
    reason: str,
    result: TrialResult | None = None,
) -> Finding:
    trial = None if result is None else result.as_json()
    return Finding(model.name, plan.category, model.catalog, verdict, reason, trial)
