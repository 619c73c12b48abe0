"""Selects the catalog models that are worth a trial for a category. Pure.

    score = weighted mean of the category's benchmarks that are known

The score only orders the trials; catalogs decide nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import date

from router.discovery.catalog_entry import CatalogModel, Refusal, merged
from router.discovery.model_names import untuned_name
from router.settings import CriteriaSettings, DiscoverySettings


def passing(
    models: Sequence[CatalogModel], category: str, settings: DiscoverySettings, today: date
) -> tuple[list[CatalogModel], list[Refusal]]:
    """The models that meet the category's criteria, best first, and the refusals with all reasons.

    Each model appears once, under the name of the first catalog that lists it.
    """
    criteria = settings.criteria_of(category)
    unique, refusals = merged(models)
    met: list[CatalogModel] = []
    for model in unique:
        reasons = list(_reasons(model, criteria, today))
        if reasons:
            refusals.append(Refusal(model.name, "; ".join(reasons)))
        else:
            met.append(model)
    best: dict[str, CatalogModel] = {}
    for model in sorted(met, key=lambda model: _order(model, criteria)):
        better = best.setdefault(untuned_name(model.name), model)
        if better is not model:
            refusals.append(Refusal(model.name, f"the same model as {better.name}, which has a better score"))
    return list(best.values()), refusals


def score_of(model: CatalogModel, criteria: CriteriaSettings) -> float | None:
    """The weighted mean of the known benchmarks; None if too few are known."""
    known = {name: weight for name, weight in criteria.benchmarks.items() if name in model.scores}
    weight = sum(known.values())
    if not known or weight < criteria.benchmarks_share * sum(criteria.benchmarks.values()) - 1e-9:
        return None
    return sum(model.scores[name] * of_it for name, of_it in known.items()) / weight


def _order(model: CatalogModel, criteria: CriteriaSettings) -> tuple[float, float, int, str]:
    """Sorts by score, then by price, then by age, newest first."""
    score = score_of(model, criteria)
    price = (model.input_price or 0.0) + (model.output_price or 0.0)
    released = model.released.toordinal() if model.released else 0
    return -(score or 0.0), price, -released, model.name


def _reasons(model: CatalogModel, criteria: CriteriaSettings, today: date) -> Iterator[str]:
    yield from _license(model, criteria)
    yield from _size(model, criteria)
    yield from _price(model, criteria)
    yield from _score(model, criteria)
    yield from _age(model, criteria, today)
    if model.is_merge and not criteria.merges:
        yield "a merge of other models"


def _license(model: CatalogModel, criteria: CriteriaSettings) -> Iterator[str]:
    if criteria.licenses is None:
        return
    if model.license is None:
        if "license" not in criteria.may_be_unknown:
            yield "license unknown"
    elif model.license not in criteria.licenses:
        yield f"license {model.license} not allowed"


def _size(model: CatalogModel, criteria: CriteriaSettings) -> Iterator[str]:
    least, most = criteria.parameters_min, criteria.parameters_max
    if model.parameters is None:
        if "parameters" not in criteria.may_be_unknown and (least > 0 or most is not None):
            yield "number of parameters unknown"
    elif model.parameters < least:
        yield f"{model.parameters:g}B parameters, less than {least:g}B"
    elif most is not None and model.parameters > most:
        yield f"{model.parameters:g}B parameters, more than {most:g}B"
    if model.context_tokens is None:
        if "context" not in criteria.may_be_unknown and criteria.context_min > 1:
            yield "context length unknown"
    elif model.context_tokens < criteria.context_min:
        yield f"context of {model.context_tokens} tokens, less than {criteria.context_min}"


def _price(model: CatalogModel, criteria: CriteriaSettings) -> Iterator[str]:
    for kind, price, most in (
        ("input", model.input_price, criteria.input_price_max),
        ("output", model.output_price, criteria.output_price_max),
    ):
        if most is None:
            continue
        if price is None:
            if "price" not in criteria.may_be_unknown:
                yield f"{kind} price unknown"
        elif price > most:
            yield f"{kind} price of {price:g} USD per million tokens, more than {most:g}"


def _score(model: CatalogModel, criteria: CriteriaSettings) -> Iterator[str]:
    if not criteria.benchmarks:
        return
    score = score_of(model, criteria)
    if score is None:
        if "score" not in criteria.may_be_unknown:
            yield f"too few benchmarks known of {', '.join(sorted(criteria.benchmarks))}"
    elif score < criteria.score_min:
        yield f"score {score:.3f}, less than {criteria.score_min:g}"


def _age(model: CatalogModel, criteria: CriteriaSettings, today: date) -> Iterator[str]:
    if model.released is None:
        if "age" not in criteria.may_be_unknown and criteria.age_days_max is not None:
            yield "release date unknown"
    elif model.released > today:
        yield f"release date {model.released} is in the future"
    elif criteria.age_days_max is not None and (today - model.released).days > criteria.age_days_max:
        yield f"released on {model.released}, more than {criteria.age_days_max} days ago"
