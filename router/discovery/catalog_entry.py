"""What a catalogue says of one model, read as lies until it holds together. Pure.

A file's entries and a provider's list come here as plain mappings, whose values may be numbers or their
texts. What cannot be is a reason to refuse the one entry; what is not said is None.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from router.discovery.catalog_fields import (
    benchmark_name,
    count,
    day,
    number,
    plain_license,
    said,
    score,
    text,
    truth,
    words,
)
from router.discovery.model_names import normal_name, roster_name
from router.errors import InputError

LARGEST_PARAMETERS = 20_000.0  # thousand millions
LARGEST_CONTEXT = 100_000_000
HIGHEST_PRICE = 1000.0  # USD a million tokens
MOST_SCORES = 200
_OTHER_KINDS = frozenset({"embedding", "image", "audio", "rerank", "moderation", "video", "transcribe"})
_MERGED_WORDS = frozenset({"merge", "merged", "slerp", "ties", "frankenmerge", "lorablated", "moerge"})


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """A model as a catalogue describes it; None is what the catalogue does not say."""

    name: str  # for the roster
    endpoint: str  # what the Models Backend calls it
    license: str | None  # in its normal form, e.g. llama-3.3, apache-2.0
    parameters: float | None  # thousand millions
    context_tokens: int | None
    input_price: float | None  # USD a million tokens
    output_price: float | None
    scores: Mapping[str, float]  # benchmark in its normal form -> 0..1
    released: date | None
    is_merge: bool
    catalogue: str  # which catalogue names it


@dataclass(frozen=True, slots=True)
class Refusal:
    """What was not taken, and why, in words."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Reading:
    """What a catalogue holds that can be believed, and what not; duplicates are still in it."""

    models: tuple[CatalogModel, ...]
    refusals: tuple[Refusal, ...]


def read_entries(entries: Iterable[Any], catalogue: str) -> Reading:
    """Each entry as a model, or refused with its reason."""
    models, refusals = [], []
    for place, entry in enumerate(entries, start=1):
        try:
            models.append(entry_of(entry, catalogue))
        except InputError as error:  # noqa: PERF203 - one bad entry must not end the reading
            refusals.append(Refusal(_shown_name(entry, place), str(error)))
    return Reading(tuple(models), tuple(refusals))


def entry_of(entry: Any, catalogue: str) -> CatalogModel:
    """The model that one entry describes; InputError says what cannot be."""
    if isinstance(entry, Duplicated):
        raise InputError(f"the key {entry.key} stands twice in it")
    if not isinstance(entry, Mapping):
        raise InputError("it is no entry with keys and values")
    if truth(said(entry, "available", "active"), "available") is False:
        raise InputError("the catalogue says itself that it is not available")
    _refuse_other_kinds(entry)
    model_id = text(said(entry, "id", "name"), "name") or ""
    name = roster_name(model_id)
    input_price, output_price = _prices(entry)
    return CatalogModel(
        name=name,
        endpoint=text(said(entry, "endpoint"), "endpoint") or model_id,
        license=plain_license(text(said(entry, "license", "licence"), "license")),
        parameters=_parameters(entry),
        context_tokens=_context(entry),
        input_price=input_price,
        output_price=output_price,
        scores=_scores(entry),
        # Not a provider's `created`: that is when the provider set the model up.
        released=day(said(entry, "released", "release_date"), "released"),
        is_merge=_is_merge(entry, name),
        catalogue=catalogue,
    )


@dataclass(frozen=True, slots=True)
class Duplicated:
    """A mapping that had a key twice, so that nobody knows what it says."""

    key: str


def merged(models: Sequence[CatalogModel]) -> tuple[list[CatalogModel], list[Refusal]]:
    """Each model once, in the order given, and a refusal for each further spelling of one.

    The first that names a model gives name, endpoint and facts; what it does not say is taken from the rest.
    """
    firsts: dict[str, CatalogModel] = {}
    refusals = []
    for model in models:
        key = normal_name(model.name)
        first = firsts.get(key)
        if first is None:
            firsts[key] = model
            continue
        firsts[key] = _completed(first, model)
        place = "the same catalogue" if first.catalogue == model.catalogue else f"catalogue {first.catalogue}"
        refusals.append(Refusal(model.endpoint, f"the same model as {first.name} of {place}"))
    return list(firsts.values()), refusals


def _completed(model: CatalogModel, other: CatalogModel) -> CatalogModel:
    """The model with what it does not say itself from another entry of the same model."""
    has_price = model.input_price is not None and model.output_price is not None
    priced = model if has_price else other
    return replace(
        model,
        license=model.license or other.license,
        parameters=model.parameters if model.parameters is not None else other.parameters,
        context_tokens=model.context_tokens if model.context_tokens is not None else other.context_tokens,
        input_price=priced.input_price if priced.input_price is not None else model.input_price,
        output_price=priced.output_price if priced.output_price is not None else model.output_price,
        scores={**other.scores, **model.scores},
        released=model.released or other.released,
        is_merge=model.is_merge or other.is_merge,
    )


def _shown_name(entry: Any, place: int) -> str:
    name = said(entry, "id", "name") if isinstance(entry, Mapping) else None
    return words(name, 100) if isinstance(name, str) and name.strip() else f"entry {place}"


def _refuse_other_kinds(entry: Mapping[str, Any]) -> None:
    kind = said(entry, "type")
    if isinstance(kind, str) and kind.lower() in _OTHER_KINDS:
        raise InputError(f"it is no model that answers prompts but of the kind {kind.lower()}")


def _parameters(entry: Mapping[str, Any]) -> float | None:
    parameters = number(said(entry, "parameters", "params_b"), "parameters", units="parameters")
    if parameters is not None and not 0 < parameters <= LARGEST_PARAMETERS:
        raise InputError(f"{parameters:g} thousand million parameters cannot be")
    return parameters


def _context(entry: Mapping[str, Any]) -> int | None:
    keys = ("context_tokens", "context", "context_length", "context_window", "max_model_len")
    context = count(said(entry, *keys), "context_tokens")
    if context is not None and not 0 < context <= LARGEST_CONTEXT:
        raise InputError(f"a context of {context} tokens cannot be")
    return context


def _prices(entry: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Input and output price. Of several hosts' prices the middle one, which a slip of one does not move."""
    hosts = entry.get("price_usd_per_mtok")
    if isinstance(hosts, Sequence) and not isinstance(hosts, str) and hosts:
        pairs = [_pair(host) for host in itertools.islice(hosts, 100)]
        return sorted(pairs, key=sum)[(len(pairs) - 1) // 2]
    pricing = entry.get("pricing")
    scale = 1.0
    if isinstance(pricing, Mapping):
        scale = 1e6 if "prompt" in pricing else 1.0  # said for one token, else for a million
        input_price, output_price = said(pricing, "prompt", "input"), said(pricing, "completion", "output")
    else:
        input_price, output_price = entry.get("input_price"), entry.get("output_price")
    return _price(input_price, "input_price", scale), _price(output_price, "output_price", scale)


def _pair(host: Any) -> tuple[float, float]:
    if not isinstance(host, Sequence) or isinstance(host, str) or len(host) < 3:  # noqa: PLR2004 - see below
        raise InputError("price_usd_per_mtok must hold [host, input price, output price]")
    prices = _price(host[1], "input_price"), _price(host[2], "output_price")
    return prices[0] or 0.0, prices[1] or 0.0


def _price(value: Any, key: str, scale: float = 1.0) -> float | None:
    price = number(value, key, units="price")
    if price is None:
        return None
    price = round(price * scale, 9)
    if price < 0:
        raise InputError(f"{key}: a price of {price:g} USD is below 0")
    if price > HIGHEST_PRICE:
        raise InputError(f"{key}: {price:g} USD a million tokens is absurd (above {HIGHEST_PRICE:g})")
    return price


def _scores(entry: Mapping[str, Any]) -> dict[str, float]:
    scores = entry.get("scores")
    if scores is None or scores == "":
        return {}
    if not isinstance(scores, Mapping):
        raise InputError("scores: must hold benchmarks and their scores")
    if len(scores) > MOST_SCORES:
        raise InputError(f"scores: more than {MOST_SCORES} benchmarks")
    kind = entry.get("score_kind")
    percent = isinstance(kind, str) and "%" in kind
    read: dict[str, float] = {}
    for benchmark, value in scores.items():
        found = score(value, f"scores.{words(benchmark, 60)}", percent=percent)
        if found is not None:
            read.setdefault(benchmark_name(benchmark), found)
    return read


def _is_merge(entry: Mapping[str, Any], name: str) -> bool:
    flags = entry.get("flags")
    if truth(said(entry, "merge", "merged"), "merge") or (isinstance(flags, Sequence) and "merged" in flags):
        return True
    base = entry.get("base_model")
    if isinstance(base, str) and base.endswith("(Merge)"):
        return True
    return not _MERGED_WORDS.isdisjoint(name.replace("_", "-").split("-"))
