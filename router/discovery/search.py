"""Searches for better models: reads catalogs, applies criteria, runs trials, and admits winners on probation.

Categories are searched one after the other. The findings of a category are stored in one transaction; then
`discovered.yaml` and the Variables follow (see `publishing`). After a crash, the next search continues with
the first incomplete step.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
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
from router.discovery.publishing import Variables, line_of, publish
from router.discovery.store import Finding
from router.discovery.trials import CandidateTrial, TrialSetup, run_trial
from router.errors import AirflowError, ConfigError, RouterError, unknown
from router.learning import Budget, PricedModel
from router.models import VARIABLE_PREFIX, DirectCaller
from router.settings import Addresses, DiscoverySettings, LearningSettings, RouterConfig

SEARCH_LOCK = 7_205_759_405  # advisory lock; no other part uses this number
MAX_SECONDS = 3600.0  # a nightly search begins no further category after that
NOT_LISTED = "the Models Backend does not list it"


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
    dry_run: bool
    number: int = 0
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, *notes: str) -> None:
        self.notes += [note for note in notes if note not in self.notes]

    def publish(self) -> None:
        self.note(*publish(self.connection, self.folder, self.variables))


def run_search(
    addresses: Addresses, config: RouterConfig, learning: LearningSettings, settings: DiscoverySettings,
    folder: Path, *, categories: Collection[str] | None = None, by: str, dry_run: bool = False,
    today: date | None = None, variables: Variables | None = None, since: datetime | None = None,
) -> SearchReport:  # fmt: skip
    """Searches for better models in `categories` (default: all). Blocks until the trials end, often minutes.

    `folder` contains models.yaml and discovered.yaml. `by` is the author recorded in the history. A dry run
    sends and stores nothing. `today` (default: the database's date) is used for the age of candidates.
    `variables` is the client of Airflow that sets the Variables of admitted models; None sets none. `since`
    is the start of the nightly run, None for any other search: earlier attempts since then count toward the
    budget, categories that they tried are skipped, and after an hour no further category is begun.

    Raises SearchBusy if another search runs; ConfigError, before any trial, if `discovered.yaml` cannot be
    written; CatalogError if no catalog can be read; BackendUnavailable; AirflowError.
    """
    wanted = _wanted(config, categories)
    if not dry_run:
        require_writable(folder)
        if variables is not None:
            variables.variables(VARIABLE_PREFIX)  # fails now if Airflow is unavailable
    busy = SearchBusy("Another search is running on this database. Try again when it has ended.")
    with (
        connect(addresses.database_url, autocommit=True) as connection,
        advisory_lock(connection, SEARCH_LOCK, busy),
    ):
        models, refused, notes = read_catalogs(settings, folder)
        tried, cost = store.tried_since(connection, since) if since else (frozenset[str](), 0.0)
        search = _Search(
            connection, addresses, config, learning, settings, folder, by, variables,
            Budget(settings.trials.budget_usd - cost), dry_run, findings=[*refused], notes=notes,
        )  # fmt: skip
        if not dry_run:
            search.publish()  # completes what a crashed search left
            search.number = store.begin_search(connection, by)
            store.record_findings(connection, search.number, refused)
        plans = _search_categories(
            search, wanted, models, tried, today or store.today(connection), is_nightly=since is not None
        )
        if search.budget.is_empty:
            search.note(f"the budget of {settings.trials.budget_usd:g} USD for trials is used up")
        if not dry_run:
            store.end_search(connection, search.number, search.notes)
        number = None if dry_run else search.number
        return SearchReport(number, tuple(plans), tuple(search.findings), tuple(search.notes))


def _search_categories(
    search: _Search,
    categories: Sequence[str],
    models: Sequence[CatalogModel],
    tried: Collection[str],
    today: date,
    *,
    is_nightly: bool,
) -> list[CategoryPlan]:
    plans = []
    deadline = time.monotonic() + MAX_SECONDS
    for category in categories:
        if category in tried:
            search.note(f"{category}: an earlier attempt of this run has tried its candidates")
            continue
        if is_nightly and time.monotonic() > deadline:
            search.note(f"{category}: not enough time; its candidates are left for the next run")
            continue
        plan = plan_category(
            search.connection, category, models,
            settings=search.settings, folder=search.folder, today=today, search=search.number,
        )  # fmt: skip
        search.note(*plan.notes)
        if search.dry_run:
            search.findings += plan.findings
        else:
            plan = _run_trials(search, plan)
        plans.append(plan)
    return plans


def _wanted(config: RouterConfig, categories: Collection[str] | None) -> list[str]:
    for category in categories or ():
        if category not in config.categories:
            raise unknown(category, config.categories, "category")
    return [category for category in config.categories if not categories or category in categories]


def _run_trials(search: _Search, plan: CategoryPlan) -> CategoryPlan:
    """Tries the candidates, stores the findings, and admits the best winner. Returns the plan as executed."""
    trials, unreachable = asyncio.run(_trials(search, plan)) if plan.candidates else ({}, [])
    results = {
        name: judge_trial(
            trial.candidate, trial.incumbent, search.learning.utility_of(plan.category),
            search.learning.grading.sources, search.settings.trials,
        )
        for name, trial in trials.items()
    }  # fmt: skip
    lines = {name: _line_of(search.variables, name) for name in results}
    plan = replace(plan, new=tuple(model for model in plan.new if model.name in trials))
    with transaction(search.connection):
        findings = [
            *plan.findings,
            *(_finding(plan, model, "unreachable", NOT_LISTED) for model in unreachable),
            *_verdicts(search, plan, trials, results, lines),
        ]
        store.record_findings(search.connection, search.number, findings)
        for trial in trials.values():
            store.record_grades(search.connection, trial.grades)
    search.findings += findings
    search.publish()
    return plan


async def _trials(
    search: _Search, plan: CategoryPlan
) -> tuple[Mapping[str, CandidateTrial], list[CatalogModel]]:
    """Trials of the first `max_candidates` that the backend can call, and the models that it cannot call."""
    assert plan.incumbent is not None
    settings = search.settings
    setup = TrialSetup(
        plan.category, plan.incumbent, plan.judge, plan.prompts, settings.trials, search.budget
    )
    candidates: list[PricedModel] = []
    unreachable = []
    async with DirectCaller(search.addresses, search.config) as caller:
        served = await caller.known_models()
        for model in plan.new:
            endpoint = _served_as(model, served)
            if endpoint is None:
                unreachable.append(model)
            elif len(candidates) < plan.max_candidates:
                candidates.append(store.as_candidate(model, endpoint, settings.probation, search.config))
        return (await run_trial(caller, setup, candidates) if candidates else {}), unreachable


def _served_as(model: CatalogModel, served: Collection[str]) -> str | None:
    """The backend's name for the model: the catalog's, the roster's, or another spelling."""
    spelled = (name for name in sorted(served) if normal_name(name) == normal_name(model.name))
    return next((name for name in (model.endpoint, model.name, *spelled) if name in served), None)


def _line_of(variables: Variables | None, model: str) -> dict[str, str | None]:
    with contextlib.suppress(AirflowError):  # reported when the Variables are published
        return line_of(variables, model)
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
