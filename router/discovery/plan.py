"""Plans a search: reads the catalogs, applies the criteria, and drops known models. Sends nothing.

A category's plan names its candidates, best first by the catalogs, and the incumbent that they have to beat:
the first active model. All other models become findings.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from router.database import Connection
from router.discovery import store
from router.discovery.catalog_entry import CatalogModel, Refusal
from router.discovery.catalogs import open_catalogs
from router.discovery.criteria import passing
from router.discovery.model_names import same_model
from router.discovery.store import Finding
from router.discovery.trial_prompts import TrialPrompt, read_trial_prompts
from router.errors import CatalogError, ConfigError
from router.learning import PricedModel
from router.settings import DiscoverySettings, load_config

MAX_JUDGES = 3  # the models after the incumbent; they take turns


@dataclass(frozen=True, slots=True)
class CategoryPlan:
    """The trials of a category.

    `new` holds the new models, best first. The first `max_candidates` that can be called are tried; that is 0
    without an incumbent or prompts. `findings` cover all other models.
    """

    category: str
    incumbent: PricedModel | None
    judges: tuple[PricedModel, ...]
    prompts: tuple[TrialPrompt, ...]
    passing: tuple[str, ...]
    new: tuple[CatalogModel, ...]
    max_candidates: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def candidates(self) -> tuple[CatalogModel, ...]:
        """The models to try, or those that were tried."""
        return self.new[: self.max_candidates]


def read_catalogs(
    settings: DiscoverySettings, folder: Path
) -> tuple[list[CatalogModel], list[Finding], list[str]]:
    """The models of all catalogs, a finding for each refused entry, and notes on unreadable catalogs.

    Raises CatalogError if none of the catalogs can be read.
    """
    models: list[CatalogModel] = []
    refused: list[Finding] = []
    problems: list[str] = []
    catalogs = open_catalogs(settings, folder)
    for catalog in catalogs:
        try:
            reading = catalog.read()
        except CatalogError as error:  # noqa: PERF203 - the other catalogs are still read
            problems.append(str(error))
        else:
            models += reading.models
            refused += _refused(reading.refusals, None, catalog.name)
    if problems and len(problems) == len(catalogs):
        raise CatalogError(" ".join(problems))
    if not catalogs:
        problems.append("no catalog: name one in config/search.yaml, or set the address of its provider")
    return models, refused, problems


def _refused(refusals: Sequence[Refusal], category: str | None, catalog: str) -> list[Finding]:
    """One finding per model, with all its reasons."""
    reasons: dict[str, list[str]] = {}
    for refusal in refusals:
        of_model = reasons.setdefault(refusal.name, [])
        if refusal.reason not in of_model:
            of_model.append(refusal.reason)
    return [Finding(name, category, catalog, "refused", "; ".join(all_)) for name, all_ in reasons.items()]


def plan_category(
    connection: Connection, category: str, models: Sequence[CatalogModel], *, settings: DiscoverySettings,
    folder: Path, today: date, search: int | None = None,
) -> CategoryPlan:  # fmt: skip
    """Plans the trials of a category.

    Models that `search` itself admitted for another one may be tried, too.
    """
    met, refusals = passing(models, category, settings, today)
    names = known_names(connection, folder, except_search=search)
    tried = store.recently_tried(connection, category, settings.trials.retry_after_days)
    new, known = _new_models(category, met, names, tried)
    active = store.active_models(connection, category)
    prompts, notes = _prompts(folder, category, settings.trials.prompts)
    if new and not active:
        notes.append(f"{category}: no active model to compare with")
    return CategoryPlan(
        category=category,
        incumbent=active[0] if active else None,
        judges=tuple(active[1 : 1 + MAX_JUDGES]),
        prompts=prompts,
        passing=tuple(model.name for model in met),
        new=tuple(new),
        max_candidates=settings.criteria_of(category).candidates if active and prompts else 0,
        findings=(*_with_catalogs(refusals, category, models, met), *known),
        notes=tuple(notes),
    )


def _with_catalogs(
    refusals: Sequence[Refusal],
    category: str,
    models: Sequence[CatalogModel],
    met: Sequence[CatalogModel],
) -> list[Finding]:
    """Refusals as findings with the model's catalog, without models that passed under another entry."""
    catalogs = {
        spelled: model.catalog for model in reversed(models) for spelled in (model.endpoint, model.name)
    }
    passed = {model.name for model in met}
    return [
        replace(finding, catalogue=catalogs.get(finding.model, ""))
        for finding in _refused(refusals, category, "")
        if finding.model not in passed
    ]


def _new_models(
    category: str, met: Sequence[CatalogModel], known: Mapping[str, str], tried: Collection[str]
) -> tuple[list[CatalogModel], list[Finding]]:
    """The models that are neither known nor recently tried, and a finding for each known one."""
    new, findings = [], []
    for model in met:
        known_as = why_known(model, known)
        if known_as is not None:
            findings.append(Finding(model.name, category, model.catalog, "known", known_as))
        elif model.name not in tried:
            new.append(model)
    return new, findings


def known_names(connection: Connection, folder: Path, *, except_search: int | None = None) -> dict[str, str]:
    """Names and endpoints of models.yaml and of the roster -> description.

    Leaves out models that the search `except_search` admitted itself.
    """
    configured = {
        name: f"{model} of config/models.yaml"
        for model, settings in load_config(folder).models.items()
        for name in (model, settings.endpoint or model)
    }
    return {**configured, **store.roster_names(connection, except_search)}


def why_known(model: CatalogModel, known: Mapping[str, str]) -> str | None:
    """The description of a known model with this endpoint or a spelling of this name; None if it is new."""
    if model.endpoint in known:
        return known[model.endpoint]
    return next((known_as for name, known_as in known.items() if same_model(name, model.name)), None)


def _prompts(folder: Path, category: str, limit: int) -> tuple[tuple[TrialPrompt, ...], list[str]]:
    try:
        return read_trial_prompts(folder, category)[:limit], []
    except ConfigError as error:
        return (), [f"{category}: no trials. {error}"]
