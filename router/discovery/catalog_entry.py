"""Validates catalog entries. Catalog data is untrusted: a bad entry is refused, the others are still read.

Values may be numbers or text with a unit: `128k`, `8B`, `$0.59`, `73.3%`. A missing value, `null`, `n/a`,
`unknown` and the like mean "not known", which is None and never zero.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Annotated, Any, NamedTuple

from pydantic import (
    AfterValidator,
    AliasChoices,
    AliasPath,
    BaseModel,
    BeforeValidator,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from router.discovery.model_names import normal_name, roster_name
from router.errors import printable

MAX_TEXT = 200  # characters
MAX_PARAMETERS = 20_000.0  # B
MAX_CONTEXT = 100_000_000  # tokens
MAX_PRICE = 1000.0  # USD per million tokens
MAX_HOSTS = 100
MAX_SCORES = 200

_UNKNOWN = frozenset({"", "~", "null", "none", "n/a", "na", "-", "?", "unknown", "tbd", "tba"})
_NUMBER = re.compile(r"([-+]?(?:\d[\d,]{0,30}(?:\.\d{0,30})?|\.\d{1,30})(?:e[-+]?\d{1,3})?)\s*([a-z%$/ ]*)")
_DAY = re.compile(r"(\d{4})-(\d{2})(?:-(\d{2})(?!\d))?(?=$|[T ])", re.ASCII)
_FIRST_DAY = date(2015, 1, 1)  # an earlier date, such as 1970-01-01, is a placeholder
_LICENSES = (
    (re.compile(r"^(?:meta[ -]?)?llama[ -]?(\d(?:\.\d)?)(?:[ -].*)?$"), r"llama-\1"),
    (re.compile(r"^apache.*2(?:\.0)?$"), "apache-2.0"),
    (re.compile(r"^(?:the )?mit(?: licen[cs]e)?$"), "mit"),
    (re.compile(r"^gemma.*$"), "gemma"),
)
_NO_LICENSE = frozenset({"other", "custom", "proprietary?", "unlicensed", "see card"})
_OTHER_KINDS = frozenset({"embedding", "image", "audio", "rerank", "moderation", "video", "transcribe"})
_MERGE_WORDS = frozenset({"merge", "merged", "slerp", "ties", "frankenmerge", "lorablated", "moerge"})


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """A model as a catalog describes it. None: the catalog does not say.

    Parameters in B, prices in USD per million tokens, scores from 0 to 1 by normalized benchmark name.
    """

    name: str  # on the roster
    endpoint: str  # at the Models Backend
    license: str | None  # normalized, e.g. llama-3.3, apache-2.0
    parameters: float | None
    context_tokens: int | None
    input_price: float | None
    output_price: float | None
    scores: Mapping[str, float]
    released: date | None
    is_merge: bool
    catalog: str  # name of the catalog that lists it


@dataclass(frozen=True, slots=True)
class Refusal:
    """An entry or model that was not accepted, with the reason."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Reading:
    """The valid models of one catalog, including duplicates, and its refused entries."""

    models: tuple[CatalogModel, ...]
    refusals: tuple[Refusal, ...]


def read_entries(entries: Iterable[Any], catalog: str) -> Reading:
    """Validates each entry on its own."""
    models, refusals = [], []
    for number, entry in enumerate(entries, start=1):
        if isinstance(entry, dict):
            try:
                models.append(_Entry.model_validate(entry).as_model(catalog))
            except ValidationError as error:
                refusals.append(Refusal(_display_name(entry, number), _reason(error)))
        else:
            reason = f"an entry should be a mapping of keys to values, got {shown_value(entry, 60)}"
            refusals.append(Refusal(f"entry {number}", reason))
    return Reading(tuple(models), tuple(refusals))


def merged(models: Sequence[CatalogModel]) -> tuple[list[CatalogModel], list[Refusal]]:
    """Merges entries of the same model, keeping the order; each further spelling becomes a refusal.

    The first entry gives name, endpoint and facts. Facts it lacks are taken from the later ones.
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
        where = "the same catalog" if first.catalog == model.catalog else f"catalog {first.catalog}"
        refusals.append(Refusal(model.endpoint, f"the same model as {first.name} of {where}"))
    return list(firsts.values()), refusals


def _completed(model: CatalogModel, other: CatalogModel) -> CatalogModel:
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


def shown_value(value: Any, limit: int = MAX_TEXT) -> str:
    """Shows a catalog's value in messages: one printable line, cut to `limit`."""
    if not isinstance(value, (str, int, float, bool)):
        return f"a {type(value).__name__}"
    return printable(value, limit, one_line=True)


def _is_unknown(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.strip().lower() in _UNKNOWN)


def _number(value: Any, units: Mapping[str, float]) -> float | None:
    if _is_unknown(value):
        return None
    found = math.nan
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        found = float(value)
    elif isinstance(value, str) and len(value) <= MAX_TEXT:
        match = _NUMBER.fullmatch(value.strip().lower().removeprefix("$").strip())
        if match is not None and (unit := match[2].strip()) in units:
            found = float(match[1].replace(",", "")) * units[unit]
    if not math.isfinite(found):
        raise ValueError("input should be a number, with a known unit or none")
    return found


def _in(**units: float) -> BeforeValidator:
    named = {name.replace("_", " "): factor for name, factor in units.items()}
    return BeforeValidator(lambda value: _number(value, {"": 1, **named}))


def _price(value: Any) -> float | None:
    return _number(value, {"": 1, "$": 1, "usd": 1})


def _per_million(value: Any) -> float | None:
    price = _price(value)
    return None if price is None else round(price * 1e6, 9)


def _score(value: Any) -> float | None:
    score = _number(value, {"": 1, "%": 0.01})
    if score is not None and not 0 <= score <= 1:
        raise ValueError("input should be between 0 and 1, or a percentage with its %")
    return score


def _day(value: Any) -> date | None:
    match = _DAY.match(str(value)[:MAX_TEXT].strip())
    try:
        found = date(int(match[1]), int(match[2]), int(match[3] or 1)) if match else None
    except ValueError:
        found = None
    if found is None:
        raise ValueError("input should be a date like 2024-07-23")
    return found if found >= _FIRST_DAY else None


def _license(written: str) -> str | None:
    """Normalizes a license: `Llama 3.1 Community License` and `llama3.1` become `llama-3.1`."""
    name = written.lower()
    if name in _NO_LICENSE:
        return None
    for spelling, plain in _LICENSES:
        if spelling.match(name):
            return spelling.sub(plain, name)
    return re.sub(r"[\s_]+", "-", name)


def benchmark_name(benchmark: str) -> str:
    """Normalizes a benchmark: `MMLU-Pro`, `mmlu_pro` and `MMLU Pro (CoT)` become `mmlu-pro`."""
    bare = re.sub(r"\([^)]*\)", "", shown_value(benchmark, 100).lower())
    return re.sub(r"[\s_-]+", "-", bare).strip("-")


def _is_printable(line: str) -> str:
    if not line.isprintable():
        raise ValueError("input should contain only printable characters")
    return line


def _is_model_id(model_id: str) -> str:
    roster_name(model_id)
    return model_id


def _is_available(available: bool) -> bool:  # noqa: FBT001 - a validator
    if not available:
        raise ValueError("the catalog lists the model as unavailable")
    return available


def _answers_prompts(kind: Any) -> Any:
    if isinstance(kind, str) and kind.lower() in _OTHER_KINDS:
        raise ValueError("a model of this kind does not answer prompts")
    return kind


def _key(*names: str | AliasPath, default: Any = None) -> Any:
    return Field(default=default, validation_alias=AliasChoices(*names))


_Text = Annotated[
    str, StringConstraints(strip_whitespace=True, max_length=MAX_TEXT), AfterValidator(_is_printable)
]
_Parameters = Annotated[
    float, _in(b=1, m=1e-3, t=1e3, billion=1, million=1e-3, trillion=1e3), Field(gt=0, le=MAX_PARAMETERS)
]
_Tokens = Annotated[
    float, _in(k=1e3, m=1e6, tokens=1, k_tokens=1e3, m_tokens=1e6), Field(ge=1, le=MAX_CONTEXT)
]
_Price = Annotated[float | None, BeforeValidator(_price), Field(ge=0, le=MAX_PRICE)]
_TokenPrice = Annotated[_Price, BeforeValidator(_per_million)]
_Score = Annotated[float | None, BeforeValidator(_score)]


class _HostPrice(NamedTuple):
    host: Any
    input_price: _Price
    output_price: _Price


class _Entry(BaseModel):
    """One entry. Unknown keys are ignored; fields are validated in this order, and the first error counts."""

    available: Annotated[bool, AfterValidator(_is_available)] = _key("available", "active", default=True)
    type: Annotated[Any, AfterValidator(_answers_prompts)] = None
    model_id: Annotated[_Text, AfterValidator(_is_model_id)] = _key("id", "name", default=...)
    endpoint: _Text | None = None
    license: Annotated[_Text, AfterValidator(_license)] | None = _key("license", "licence")
    parameters: _Parameters | None = _key("parameters", "params_b")
    context: _Tokens | None = _key(
        "context_tokens", "context", "context_length", "context_window", "max_model_len"
    )
    hosts: tuple[_HostPrice, ...] = _key("price_usd_per_mtok", default=())
    input_price: _Price = _key(AliasPath("pricing", "input"), "input_price")
    output_price: _Price = _key(AliasPath("pricing", "output"), "output_price")
    prompt_price: _TokenPrice = _key(AliasPath("pricing", "prompt"))
    completion_price: _TokenPrice = _key(AliasPath("pricing", "completion"))
    score_kind: Any = None
    scores: dict[str, _Score] = Field({}, max_length=MAX_SCORES)
    # A provider's `created` is not read: it is the day on which the provider set the model up.
    released: Annotated[date | None, BeforeValidator(_day)] = _key("released", "release_date")
    merge: bool = _key("merge", "merged", default=False)
    flags: Any = None
    base_model: Any = None

    @model_validator(mode="before")
    @classmethod
    def _drop_unknown(cls, entry: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in entry.items() if not _is_unknown(value)}

    @field_validator("hosts", mode="before")
    @classmethod
    def _without_details(cls, hosts: Any) -> Any:
        """Cuts `[host, input price, output price, ...]` to the first three."""
        if not isinstance(hosts, list):
            return hosts
        return [host[:3] if isinstance(host, list) else host for host in hosts[:MAX_HOSTS]]

    @field_validator("scores", mode="before")
    @classmethod
    def _as_percent(cls, scores: Any, info: Any) -> Any:
        """A `score_kind` that names % makes bare numbers percentages."""
        if not isinstance(scores, dict) or "%" not in str(info.data.get("score_kind")):
            return scores
        return {
            name: value if _is_unknown(value) or "%" in str(value) else f"{value}%"
            for name, value in scores.items()
        }

    def as_model(self, catalog: str) -> CatalogModel:
        """The model that the entry describes."""
        input_price, output_price = self._prices()
        name = roster_name(self.model_id)
        scores: dict[str, float] = {}
        for benchmark, score in self.scores.items():
            if score is not None:
                scores.setdefault(benchmark_name(benchmark), score)
        return CatalogModel(
            name=name,
            endpoint=self.endpoint or self.model_id,
            license=self.license,
            parameters=self.parameters,
            context_tokens=None if self.context is None else math.floor(self.context),
            input_price=input_price,
            output_price=output_price,
            scores=scores,
            released=self.released,
            is_merge=self._is_merge(name),
            catalog=catalog,
        )

    def _prices(self) -> tuple[float | None, float | None]:
        """The median of the hosts' prices, which one typo does not move, else the entry's own price."""
        if self.hosts:
            pairs = [(host.input_price or 0.0, host.output_price or 0.0) for host in self.hosts]
            return sorted(pairs, key=sum)[(len(pairs) - 1) // 2]
        return (
            self.input_price if self.prompt_price is None else self.prompt_price,
            self.output_price if self.completion_price is None else self.completion_price,
        )

    def _is_merge(self, name: str) -> bool:
        return (
            self.merge
            or (isinstance(self.flags, Sequence) and "merged" in self.flags)
            or (isinstance(self.base_model, str) and self.base_model.endswith("(Merge)"))
            or not _MERGE_WORDS.isdisjoint(name.replace("_", "-").split("-"))
        )


def _display_name(entry: Mapping[str, Any], number: int) -> str:
    name = next((entry[key] for key in ("id", "name") if not _is_unknown(entry.get(key))), None)
    return shown_value(name, 100) if isinstance(name, str) else f"entry {number}"


def _reason(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    if first["type"] == "missing":
        return "the entry has no name"
    where = ".".join(shown_value(part, 60) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message[0].lower()}{message[1:]}, got {shown_value(first['input'], 60)}"
