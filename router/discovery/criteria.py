"""Which models of the catalogues are worth a trial for a category, by what the catalogues say. Pure.

    score = the weighed mean of the benchmarks that count for the category, over those that are known

Nobody is believed further than to a trial: the score only orders who is tried first.
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
    """The models that meet the category's criteria, best first, and why the others do not.

    Each model comes once, under the name of the first catalogue that lists it.
    """
    criteria = settings.criteria_of(category)
    once, refusals = merged(models)
    met: list[CatalogModel] = []
    for model in once:
        reasons = list(_reasons(model, criteria, today))
        if reasons:
            refusals.append(Refusal(model.name, "; ".join(reasons)))
        else:
            met.append(model)
    best: dict[str, CatalogModel] = {}
    for model in sorted(met, key=lambda model: _order(model, criteria)):
        better = best.setdefault(untuned_name(model.name), model)
        if better is not model:
            refusals.append(Refusal(model.name, f"{better.name} is the same model, and better by its scores"))
    return list(best.values()), refusals


def score_of(model: CatalogModel, criteria: CriteriaSettings) -> float | None:
    """The weighed mean of the benchmarks that count; None if too few of them are known."""
    known = {name: weight for name, weight in criteria.benchmarks.items() if name in model.scores}
    weight = sum(known.values())
    if not known or weight < criteria.benchmarks_share * sum(criteria.benchmarks.values()) - 1e-9:
        return None
    return sum(model.scores[name] * of_it for name, of_it in known.items()) / weight


def _order(model: CatalogModel, criteria: CriteriaSettings) -> tuple[float, float, int, str]:
    """Best first: the score, then the price, then the younger."""
    score = score_of(model, criteria)
    price = (model.input_price or 0.0) + (model.output_price or 0.0)
    born = model.released.toordinal() if model.released else 0
    return -(score or 0.0), price, -born, model.name


def _reasons(model: CatalogModel, criteria: CriteriaSettings, today: date) -> Iterator[str]:
    yield from _license(model, criteria)
    yield from _size(model, criteria)
    yield from _price(model, criteria)
    yield from _score(model, criteria)
    yield from _age(model, criteria, today)
    if model.is_merge and not criteria.merges:
        yield "it is a merge of other models"


def _license(model: CatalogModel, criteria: CriteriaSettings) -> Iterator[str]:
    if criteria.licenses is None:
        return
    if model.license is None:
        if "license" not in criteria.may_be_unknown:
            yield "no catalogue says its license"
    elif model.license not in criteria.licenses:
        yield f"the license {model.license} is not among those allowed"


def _size(model: CatalogModel, criteria: CriteriaSettings) -> Iterator[str]:
    least, most = criteria.parameters_min, criteria.parameters_max
    if model.parameters is None:
        if "parameters" not in criteria.may_be_unknown and (least > 0 or most is not None):
            yield "no catalogue says how many parameters it has"
    elif model.parameters < least:
        yield f"{model.parameters:g} thousand million parameters are fewer than {least:g}"
    elif most is not None and model.parameters > most:
        yield f"{model.parameters:g} thousand million parameters are more than {most:g}"
    if model.context_tokens is None:
        if "context" not in criteria.may_be_unknown and criteria.context_min > 1:
            yield "no catalogue says its context"
    elif model.context_tokens < criteria.context_min:
        yield f"a context of {model.context_tokens} tokens is less than {criteria.context_min}"


def _price(model: CatalogModel, criteria: CriteriaSettings) -> Iterator[str]:
    for kind, price, most in (
        ("input", model.input_price, criteria.input_price_max),
        ("output", model.output_price, criteria.output_price_max),
    ):
        if most is None:
            continue
        if price is None:
            if "price" not in criteria.may_be_unknown:
                yield f"no catalogue says its {kind} price"
        elif price > most:
            yield f"its {kind} price of {price:g} USD a million tokens is above {most:g}"


def _score(model: CatalogModel, criteria: CriteriaSettings) -> Iterator[str]:
    if not criteria.benchmarks:
        return
    score = score_of(model, criteria)
    if score is None:
        if "score" not in criteria.may_be_unknown:
            yield f"too few of the benchmarks that count are known: {', '.join(sorted(criteria.benchmarks))}"
    elif score < criteria.score_min:
        yield f"its score of {score:.3f} is below {criteria.score_min:g}"


def _age(model: CatalogModel, criteria: CriteriaSettings, today: date) -> Iterator[str]:
    if model.released is None:
        if "age" not in criteria.may_be_unknown and criteria.age_days_max is not None:
            yield "no catalogue says when it was released"
    elif model.released > today:
        yield f"it is said to be released on {model.released}, which is yet to come"
    elif criteria.age_days_max is not None and (today - model.released).days > criteria.age_days_max:
        yield f"released on {model.released}, it is older than {criteria.age_days_max} days"
