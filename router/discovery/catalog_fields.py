"""The words of catalogues as values: numbers with units, days, licenses, benchmarks. Pure.

Each returns None for what is not said (nothing, `null`, `n/a`, `unknown`), and raises InputError, which names
the key, for what says nothing that can be understood. Texts that are shown are cut and made printable.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import date
from typing import Any, Literal

from router.errors import InputError

LONGEST_TEXT = 200
_NOTHING = frozenset({"", "~", "null", "none", "n/a", "na", "-", "?", "unknown", "tbd", "tba"})
_NUMBER = re.compile(r"([-+]?(?:\d[\d,]{0,30}(?:\.\d{0,30})?|\.\d{1,30})(?:e[-+]?\d{1,3})?)\s*([a-z%$/ ]*)")
_UNITS: Mapping[str, Mapping[str, float]] = {
    "count": {"": 1, "k": 1e3, "m": 1e6, "tokens": 1, "k tokens": 1e3, "m tokens": 1e6},
    "parameters": {"": 1, "b": 1, "m": 1e-3, "t": 1e3, "billion": 1, "million": 1e-3, "trillion": 1e3},
    "price": {"": 1, "$": 1, "usd": 1},
    "score": {"": 1, "%": 0.01},
}
_FIRST_DAY = date(2015, 1, 1)  # an earlier one, such as 1970, is a machine's way of saying nothing
_SPELLED_LICENCE = (
    (re.compile(r"^(?:meta[ -]?)?llama[ -]?(\d(?:\.\d)?)(?:[ -].*)?$"), r"llama-\1"),
    (re.compile(r"^apache.*2(?:\.0)?$"), "apache-2.0"),
    (re.compile(r"^(?:the )?mit(?: licen[cs]e)?$"), "mit"),
    (re.compile(r"^gemma.*$"), "gemma"),
)
_NO_LICENCE = frozenset({"other", "custom", "proprietary?", "unlicensed", "see card"})


def words(value: Any, longest: int = LONGEST_TEXT) -> str:
    """A value of a catalogue as it may be shown: printable, and cut."""
    if not isinstance(value, (str, int, float, bool)):
        return f"a {type(value).__name__}"
    shown = "".join(mark if mark.isprintable() else "?" for mark in str(value)[: longest + 1])
    return shown if len(shown) <= longest else f"{shown[:longest]}..."


def said(entry: Mapping[str, Any], *keys: str) -> Any:
    """The value of the first of the keys that says something."""
    for key in keys:
        value = entry.get(key)
        if value is not None and not (isinstance(value, str) and value.strip().lower() in _NOTHING):
            return value
    return None


def text(value: Any, key: str) -> str | None:
    """A short line of text."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise InputError(f"{key}: {words(value, 60)} is no text")
    line = value.strip()
    if len(line) > LONGEST_TEXT or not line.isprintable():
        raise InputError(f"{key}: longer than {LONGEST_TEXT} characters, or not printable")
    return line or None


def truth(value: Any, key: str) -> bool | None:
    """Yes or no."""
    if value is None or isinstance(value, bool):
        return value
    found = {"true": True, "yes": True, "false": False, "no": False}.get(str(value)[:10].strip().lower())
    if found is None:
        raise InputError(f"{key}: {words(value, 60)} is neither true nor false")
    return found


def number(value: Any, key: str, *, units: Literal["count", "parameters", "price", "score"]) -> float | None:
    """A finite number, also as text with a unit: `128k`, `8B`, `$0.59`, `73.3%`."""
    if value is None or (isinstance(value, str) and value.strip().lower() in _NOTHING):
        return None
    found: float | None = None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        found = float(value) if abs(value) < 1e300 else math.inf  # noqa: PLR2004 - an int may be larger
    elif isinstance(value, str) and len(value) <= LONGEST_TEXT:
        found = _number_in(value.strip().lower(), _UNITS[units])
    if found is None or not math.isfinite(found):
        raise InputError(f"{key}: {words(value, 60)} is no number")
    return found


def count(value: Any, key: str) -> int | None:
    """A whole number."""
    found = number(value, key, units="count")
    return None if found is None else math.floor(found)


def score(value: Any, key: str, *, percent: bool) -> float | None:
    """A score between 0 and 1; `percent` says that bare numbers are percentages."""
    found = number(value, key, units="score")
    if found is None:
        return None
    found = found / 100 if percent and not (isinstance(value, str) and "%" in value) else found
    if not 0 <= found <= 1:
        raise InputError(f"{key}: {found:g} is not between 0 and 1; a percentage is written with its %")
    return found


def day(value: Any, key: str) -> date | None:
    """A day from `2024-07-23` (also with a time after it), or `2024-07`: its first day."""
    if value is None:
        return None
    try:
        found = _day_in(value)
    except ValueError as error:
        raise InputError(f"{key}: {words(value, 60)} is no day like 2024-07-23") from error
    return found if found >= _FIRST_DAY else None


def plain_license(written: str | None) -> str | None:
    """A license in its normal form: `Llama 3.1 Community License` and `llama3.1` are `llama-3.1`."""
    name = (written or "").strip().lower()
    if name in _NOTHING or name in _NO_LICENCE:
        return None
    for spelling, plain in _SPELLED_LICENCE:
        if spelling.match(name):
            return spelling.sub(plain, name)
    return re.sub(r"[\s_]+", "-", name)


def benchmark_name(benchmark: Any) -> str:
    """A benchmark in its normal form: `MMLU-Pro`, `mmlu_pro` and `MMLU Pro (CoT)` are `mmlu-pro`."""
    bare = re.sub(r"\([^)]*\)", "", words(benchmark, 100).lower())
    return re.sub(r"[\s_-]+", "-", bare).strip("-")


def _number_in(line: str, units: Mapping[str, float]) -> float | None:
    found = _NUMBER.fullmatch(line.removeprefix("$").strip())
    if found is None or (unit := found.group(2).strip()) not in units:
        return None
    return float(found.group(1).replace(",", "")) * units[unit]


def _day_in(value: Any) -> date:
    line = str(value)[:LONGEST_TEXT].strip()
    found = re.match(r"(\d{4})-(\d{2})(?:-(\d{2})(?!\d))?(?=$|[T ])", line, re.ASCII)
    if found is None:
        raise ValueError(line)
    return date(int(found[1]), int(found[2]), int(found[3] or 1))
