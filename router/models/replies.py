"""Table of the Models Backend's replies: the outcome of each status, and the time to retry. No I/O.

What an outcome means for the task and for the ranking is in `router.task`, for the model in
`router.limiter.breaker`. A test compares all of it with the table in docs/architecture.md.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus

from router.task import Outcome

MAX_RETRY_AFTER_SECONDS = 3600.0
DAY_SECONDS = 86_400.0  # a longer time to retry is an error of the sender
EPOCH_SECONDS = 1e9  # a larger number is a point in time, not a duration
EPOCH_MILLISECONDS = 1e12


@dataclass(frozen=True, slots=True)
class Rule:
    """Replies with one of these statuses have this outcome; `text` describes them in the documents.

    Without a reply the backend may go on working, so that the call keeps its concurrency slot.
    """

    text: str
    statuses: frozenset[int]
    outcome: Outcome
    no_reply: bool = False


def _rule(text: str, outcome: Outcome, *statuses: int | Iterable[int], no_reply: bool = False) -> Rule:
    numbers = {n for each in statuses for n in ([each] if isinstance(each, int) else each)}
    return Rule(text, frozenset(numbers), outcome, no_reply)


# The first rule that applies decides.
STATUS_RULES = (
    _rule("400, 413, 422, 429 that say that the prompt is too long; any other 413", Outcome.TOO_LONG, 413),
    _rule("429", Outcome.RATE_LIMITED, 429),
    _rule("404, 410", Outcome.UNKNOWN_MODEL, 404, 410),
    _rule(
        "3xx, 401, 402, 403, 405 to 407, 411, 415, 417, 421, 426, 431, 498, 501, 505, 511", Outcome.DENIED,
        range(300, 400), (401, 402, 403), range(405, 408), (411, 415, 417, 421, 426, 431, 498, 501, 505, 511),
    ),
    _rule("503 with a time to retry", Outcome.OVERLOADED),
    _rule(
        "408, 425, 499, 502, 503, 504, 520 to 530, 598, 599", Outcome.UNAVAILABLE,
        (408, 425, 499, 502, 503, 504), range(520, 531), (598, 599),
    ),
    _rule("other 4xx but 409, 423 and 424", Outcome.REJECTED, set(range(400, 500)) - {409, 423, 424}),
    _rule("409, 423, 424, other 5xx, any other status", Outcome.ERROR),
)  # fmt: skip
# Replies that are not told apart by their status.
OTHER_RULES = (
    _rule("2xx with an answer", Outcome.ANSWERED),
    _rule("2xx with a web page", Outcome.UNAVAILABLE),
    _rule("2xx without an answer: not JSON, cut off, empty, wrong type, too large", Outcome.GARBAGE),
    _rule("connection broken after the request was sent", Outcome.UNAVAILABLE, no_reply=True),
    _rule("no reply in time", Outcome.TIMEOUT, no_reply=True),
    _rule("no connection", Outcome.UNSENT),
    _rule("none: call canceled", Outcome.ABANDONED, no_reply=True),
    _rule("none: lease expired", Outcome.LOST, no_reply=True),
)
MAY_RETRY_LATER = frozenset({Outcome.RATE_LIMITED, Outcome.OVERLOADED, Outcome.UNAVAILABLE})

_TOO_LONG_STATUSES = frozenset({400, 413, 422, 429})
_TOO_LONG = re.compile(
    r"(?i)context_length_exceeded|exceed_context_size|too_long|(?:prompt|input|request|message) is too long"
    r"|context (?:length|window|size)|request too large|too many (?:input |prompt )?tokens"
    r"|exceeds? the (?:maximum|max|limit)[\w ]* tokens|reduce the length of"
)
_DURATION = re.compile(
    r"(?:({0})h)?(?:({0})m(?!s))?(?:({0})s)?(?:({0})ms)?".format(r"\d{1,15}(?:\.\d{1,15})?")
)
_RETRY_HEADERS = (
    *(("retry-after-ms", 0.001), ("x-ms-retry-after-ms", 0.001)),
    *(("retry-after", 1.0), ("x-ms-retry-after", 1.0)),
)
_UNIT_SECONDS = (3600.0, 60.0, 1.0, 0.001)


def outcome_of(status: int, text: str, retry_after_seconds: float | None) -> Outcome:
    """Returns the outcome of a reply that is not 2xx; `text` is its body."""
    if status in _TOO_LONG_STATUSES and _TOO_LONG.search(text):
        return Outcome.TOO_LONG
    if status == HTTPStatus.SERVICE_UNAVAILABLE and retry_after_seconds:
        return Outcome.OVERLOADED
    return next((rule.outcome for rule in STATUS_RULES if status in rule.statuses), Outcome.ERROR)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Returns the seconds to wait, at most MAX_RETRY_AFTER_SECONDS; None if the reply does not say.

    Reads `Retry-After` (seconds, a date, a point in time), its variants in milliseconds, and the reset of an
    exhausted limit in OpenAI's `x-ratelimit-` headers. Points in time are read against the backend's own
    clock. More than a day is ignored.
    """
    now = _backend_time(headers)
    for name, unit in _RETRY_HEADERS:
        seconds = _seconds(headers.get(name, "").strip(), unit, now)
        if seconds is not None:
            return seconds
    resets = [
        _seconds(headers.get(f"x-ratelimit-reset-{kind}", "").strip(), 1.0, now)
        for kind in ("requests", "tokens")
        if headers.get(f"x-ratelimit-remaining-{kind}", "").strip() == "0"
    ]
    return max((seconds for seconds in resets if seconds is not None), default=None)


def _backend_time(headers: Mapping[str, str]) -> float:
    try:
        return parsedate_to_datetime(headers["Date"]).timestamp()
    except (KeyError, TypeError, ValueError, OverflowError):
        return time.time()


def _seconds(value: str, unit: float, now: float) -> float | None:
    seconds = _duration(value, unit, now)
    if seconds is None or not math.isfinite(seconds) or seconds > DAY_SECONDS:
        return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS)


def _duration(value: str, unit: float, now: float) -> float | None:
    try:
        number = float(value)
    except ValueError:
        parts = _DURATION.fullmatch(value)
        if parts is not None and any(parts.groups()):
            return sum(float(n) * s for n, s in zip(parts.groups(), _UNIT_SECONDS, strict=True) if n)
        try:
            return parsedate_to_datetime(value).timestamp() - now
        except (TypeError, ValueError, OverflowError, IndexError):
            return None
    if number >= EPOCH_MILLISECONDS:
        return number / 1000 - now
    return number - now if number >= EPOCH_SECONDS else number * unit
