"""What a search would try: catalogues -> criteria -> what is not known yet. Sends nothing.

For each category the candidates, best first by what the catalogues say, and the incumbent that they have to
beat: the active model that is first there. What becomes of all other models is said, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from router.database import Connection
from router.discovery import store as kept
from router.discovery.catalog_entry import CatalogModel, Refusal
from router.discovery.catalogs import open_catalogs
from router.discovery.criteria import passing
from router.discovery.model_names import same_model
from router.discovery.store import Finding
from router.discovery.trial_prompts import TrialPrompt, read_trial_prompts
from router.discovery.trials import TrialModel
from router.errors import CatalogError, ConfigError
from router.settings import DiscoverySettings, load_config


@dataclass(frozen=True, slots=True)
class CategoryPlan:
    """What is to be tried for a category: the candidates against the incumbent, best first by the catalogues.

    `next_ones` come in for candidates that cannot be called; `findings` are of all others. Without an
    incumbent, or without prompts, nobody is tried.
    """

    category: str
    incumbent: TrialModel | None
    judge: TrialModel | None
    prompts: tuple[TrialPrompt, ...]
    passing: tuple[str, ...]
    candidates: tuple[CatalogModel, ...]
    next_ones: tuple[CatalogModel, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]


def read_catalogs(
    settings: DiscoverySettings, folder: Path
) -> tuple[list[CatalogModel], list[Finding], list[str]]:
    """What all catalogues list, what of it cannot be believed, and what else there is to say.

    CatalogError if there are catalogues, and none of them can be read.
    """
    models: list[CatalogModel] = []
    refusals: list[Finding] = []
    troubles: list[str] = []
    catalogues = open_catalogs(settings, folder)
    for catalogue in catalogues:
        try:
            reading = catalogue.read()
        except CatalogError as error:  # noqa: PERF203 - one catalogue must not keep the others from being read
            troubles.append(str(error))
        else:
            models += reading.models
            refusals += _refused(reading.refusals, None, catalogue.name)
    if troubles and len(troubles) == len(catalogues):
        raise CatalogError(" ".join(troubles))
    if not catalogues:
        troubles.append("no catalogue: name one in config/search.yaml, or set the address of its provider")
    return models, refusals, troubles


def _refused(refusals: Sequence[Refusal], category: str | None, catalogue: str) -> list[Finding]:
    """One finding a model, with all that was said of it."""
    reasons: dict[str, list[str]] = {}
    for refusal in refusals:
        said = reasons.setdefault(refusal.name, [])
        if refusal.reason not in said:
            said.append(refusal.reason)
    return [Finding(name, category, catalogue, "refused", "; ".join(said)) for name, said in reasons.items()]


def plan_category(
    connection: Connection, category: str, models: Sequence[CatalogModel], *, settings: DiscoverySettings,
    folder: Path, today: date, search: int | None = None,
) -> CategoryPlan:  # fmt: skip
    """Who is to be tried for the category, by what the catalogues say and the roster has now.

    What `search` itself took on for another category may be tried, too.
    """
    met, refusals = passing(models, category, settings, today)
    names = known_names(connection, folder, but_of_search=search)
    rest = kept.resting(connection, category, settings.trials.retry_after_days)
    fresh, known = _fresh(category, met, names, rest)
    incumbent, judge = _incumbent_and_judge(connection, category)
    prompts, notes = _prompts(folder, category, settings.trials.prompts)
    if fresh and incumbent is None:
        notes.append(f"{category}: no model is active there, so that there is nothing to compare with")
    can_be_tried = incumbent is not None and prompts
    most = settings.criteria_of(category).candidates if can_be_tried else 0
    next_ones = fresh[most:] if most else []
    return CategoryPlan(
        category=category,
        incumbent=incumbent,
        judge=judge,
        prompts=prompts,
        passing=tuple(model.name for model in met),
        candidates=tuple(fresh[:most]),
        next_ones=tuple(next_ones),
        findings=(*_with_catalogs(refusals, category, models, met), *known),
        notes=tuple(notes),
    )


def _with_catalogs(
    refusals: Sequence[Refusal],
    category: str,
    models: Sequence[CatalogModel],
    met: Sequence[CatalogModel],
) -> list[Finding]:
    """The refusals with the catalogue that names the model; not of one that passed under another entry."""
    catalogues = {
        spelled: model.catalog for model in reversed(models) for spelled in (model.endpoint, model.name)
    }
    passed = {model.name for model in met}
    return [
        replace(finding, catalogue=catalogues.get(finding.model, ""))
        for finding in _refused(refusals, category, "")
        if finding.model not in passed
    ]


def _fresh(
    category: str, met: Sequence[CatalogModel], known: Mapping[str, str], rest: Mapping[str, str]
) -> tuple[list[CatalogModel], list[Finding]]:
    """The models that are neither known nor left in peace after a trial; and a finding for each known one."""
    fresh, findings = [], []
    for model in met:
        said = why_known(model, known)
        if said is not None:
            findings.append(Finding(model.name, category, model.catalog, "known", said))
        elif model.name not in rest:
            fresh.append(model)
    return fresh, findings


def known_names(connection: Connection, folder: Path, *, but_of_search: int | None = None) -> dict[str, str]:
    """Names and endpoints that are not free -> why: the roster's, and what people have written meanwhile.

    What the search `but_of_search` took on itself it may take on for another category, too.
    """
    people = {
        name: f"it is {model} of config/models.yaml"
        for model, about in load_config(folder).models.items()
        for name in (model, about.endpoint or model)
    }
    return {**people, **kept.roster_names(connection, but_of_search)}


def why_known(model: CatalogModel, known: Mapping[str, str]) -> str | None:
    """Why the model is not new, by its endpoint or by any spelling of its name; None if it is."""
    if model.endpoint in known:
        return known[model.endpoint]
    return next((said for name, said in known.items() if same_model(name, model.name)), None)


def _incumbent_and_judge(
    connection: Connection, category: str
) -> tuple[TrialModel | None, TrialModel | None]:
    """The active model that is first in the category, and the next one, which compares answers."""
    ranked = [
        one.contender
        for one in kept.placed(connection, category)
        if one.state == "active" and one.standing != "low"
    ]
    return ranked[0] if ranked else None, ranked[1] if len(ranked) > 1 else None


def _prompts(folder: Path, category: str, most: int) -> tuple[tuple[TrialPrompt, ...], list[str]]:
    try:
        return read_trial_prompts(folder, category)[:most], []
    except ConfigError as error:
        return (), [f"{category}: nobody can be tried. {error}"]
