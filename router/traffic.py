"""Traffic target: the rate limits of a model, written as one line. No I/O.

A `TrafficTarget` is parsed from a line and printed as its canonical line. It derives the sustained rate and
the gap between paced sends; the limiter enforces it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from router.errors import TrafficTargetError, echoed

GRAMMAR = """\
One line of limits, separated by commas; all apply together:
  120/min               requests in any minute; units s, min, h, d; or 100/10s
  90k tokens/min        tokens in any minute; k is 1,000 and M is 1,000,000
  $20/day               US dollars in any 24 hours; the smallest amount is $0.000001
  $20/calendar day      US dollars from midnight to midnight UTC; or /calendar month
  20 at once            calls in flight at any time
  burst                 allow bursts: do not pace calls
  0                     stops the model
Example: 120/min, 4/s, 90k tokens/min, $20/day, 20 at once"""

MAX_LINE_CHARACTERS = 500
MAX_COUNT = 1_000_000_000
MAX_WINDOW_SECONDS = 31 * 86_400
MICRO_USD = 1_000_000  # money is counted in millionths of a US dollar
MAX_CALL_COST = 2**32 - 1  # of one call; what is beyond counts as this
CALENDAR_SECONDS = {"day": 86_400, "month": 31 * 86_400}  # the longest period of each kind
PACE = 0.9  # share of the window that paced sends fill; the rest makes up for late sends

_UNIT_SECONDS = {
    "s": 1, "sec": 1, "secs": 1, "second": 1, "seconds": 1,
    "min": 60, "mins": 60, "minute": 60, "minutes": 60,
    "h": 3600, "hr": 3600, "hour": 3600, "hours": 3600,
    "d": 86_400, "day": 86_400, "days": 86_400,
}  # fmt: skip
_CANONICAL_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))
_SUFFIXES = {"": 1, "k": 1000, "K": 1000, "M": 1_000_000}

_NUMBER = re.compile(r"(?P<whole>[0-9]+)(?:\.(?P<fraction>[0-9]+))?(?P<suffix>[A-Za-z]*)", re.ASCII)
_RATE = re.compile(
    r"(?P<what>[A-Za-z]{0,99})\s{0,99}/\s{0,99}(?P<multiple>[0-9]*)\s{0,99}(?P<unit>[^\s0-9/][^\s/]*)?",
    re.ASCII,
)
_PER = re.compile(r"^per\s+", re.ASCII)
_CALENDAR = re.compile(r"/\s{0,99}calendar\s{1,99}(?P<period>\S+)", re.ASCII | re.IGNORECASE)
_AT_ONCE = re.compile(r"at\s+once", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Limit:
    """At most `count` of something in any window of `window_seconds`."""

    count: int
    window_seconds: int

    @property
    def per_second(self) -> float:
        return self.count / self.window_seconds


class RequestLimit(_Limit):
    """At most `count` requests in any window of `window_seconds`."""

    __slots__ = ()

    def __str__(self) -> str:
        return f"{self.count}/{_window_text(self.window_seconds)}"


class TokenLimit(_Limit):
    """At most `count` tokens in any window of `window_seconds`."""

    __slots__ = ()

    def __str__(self) -> str:
        return f"{_count_text(self.count)} tokens/{_window_text(self.window_seconds)}"


@dataclass(frozen=True, slots=True)
class MoneyLimit(_Limit):
    """At most `count` millionths of a US dollar in any window, or in each calendar period in UTC.

    The window of a calendar period is its longest length: 31 days for a month.
    """

    calendar: str | None = None

    def __str__(self) -> str:
        period = f"calendar {self.calendar}" if self.calendar else _window_text(self.window_seconds)
        return f"{usd_text(self.count)}/{period}"


@dataclass(frozen=True, slots=True)
class TrafficTarget:
    """Limits of one model. All apply together, in every rolling window."""

    requests: tuple[RequestLimit, ...] = ()
    tokens: tuple[TokenLimit, ...] = ()
    at_once: int | None = None
    burst: bool = False
    money: tuple[MoneyLimit, ...] = ()

    @classmethod
    def parse(cls, line: str) -> TrafficTarget:
        """Parses a line. Raises TrafficTargetError, which names the column and shows the grammar."""
        if len(line) > MAX_LINE_CHARACTERS:
            raise _error(
                f"The line has {len(line)} characters; at most {MAX_LINE_CHARACTERS} are allowed", line, 1
            )
        target = _Parser(line).target()
        if len(str(target)) > MAX_LINE_CHARACTERS:  # a stored target must parse again
            raise _error(
                f"The canonical line has {len(str(target))} characters; at most {MAX_LINE_CHARACTERS} "
                "are allowed", line, 1,
            )  # fmt: skip
        return target

    @property
    def stopped(self) -> bool:
        """True if nothing may be sent."""
        return self.at_once == 0 or any(limit.count == 0 for limit in self.windows)

    @property
    def windows(self) -> tuple[RequestLimit | TokenLimit | MoneyLimit, ...]:
        """All limits of a period: requests, then tokens, then money."""
        return (*self.requests, *self.tokens, *self.money)

    def requests_per_second(self) -> float | None:
        """Sustained rate of the tightest request limit; None if requests are not limited."""
        if self.stopped:
            return 0.0
        return min((limit.per_second for limit in self.requests), default=None)

    @property
    def gap_seconds(self) -> float:
        """Minimum time between two paced sends: PACE / `requests_per_second`; 0 for `burst`."""
        rate = self.requests_per_second()
        return 0.0 if self.burst or not rate else PACE / rate

    @property
    def longest_window_seconds(self) -> int:
        """Longest window of all limits; 0 if there is none."""
        return max((limit.window_seconds for limit in self.windows), default=0)

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence for each limit that can never bind because another one is always tighter."""
        return tuple(
            warning
            for limits in (self.requests, self.tokens, self.money)
            for warning in _never_binding(limits)
        )

    def __str__(self) -> str:
        if self.stopped:
            return "0"
        parts = [str(limit) for limit in self.windows]
        if self.at_once is not None:
            parts.append(f"{self.at_once} at once")
        if self.burst:
            parts.append("burst")
        return ", ".join(parts)


class _Parser:
    """Parses a line part by part and tracks the column of each part for error messages."""

    def __init__(self, line: str) -> None:
        self.line = line
        self.requests: dict[int, RequestLimit] = {}
        self.tokens: dict[int, TokenLimit] = {}
        self.money: dict[tuple[int, str], MoneyLimit] = {}
        self.at_once: int | None = None
        self.burst = False
        self.stop = False

    def target(self) -> TrafficTarget:
        for column, part in _parts(self.line):
            self._read(part, column)
        if self.stop:
            return TrafficTarget(at_once=0)
        if not (self.requests or self.tokens or self.money) and self.at_once is None:
            raise _error("The line contains no limit", self.line, 1)
        return TrafficTarget(
            requests=tuple(self.requests[window] for window in sorted(self.requests, reverse=True)),
            tokens=tuple(self.tokens[window] for window in sorted(self.tokens, reverse=True)),
            at_once=self.at_once,
            burst=self.burst,
            money=tuple(self.money[period] for period in sorted(self.money, reverse=True)),
        )

    def _read(self, part: str, column: int) -> None:
        if not part:
            raise _error("A limit is missing here", self.line, column)
        if part.lower() == "burst":
            if self.burst:
                raise _error("'burst' is given twice", self.line, column)
            self.burst = True
            return
        if part.startswith("$"):
            self._budget(part, column)
            return
        count, rest, rest_column = self._count(part, column)
        self.stop = self.stop or count == 0
        if not rest:
            if count != 0:
                why = "lacks a unit such as /min. Only 0 is valid alone; a comma separates limits"
                raise _error(f"{_shown(part)} {why}", self.line, column)
        elif _AT_ONCE.fullmatch(rest):
            if self.at_once is not None:
                raise _error("'at once' is given twice", self.line, column)
            self.at_once = count
        else:
            self._rate(count, rest, column, rest_column)

    def _budget(self, part: str, column: int) -> None:
        count, rest, rest_column = self._count(part[1:].lstrip(), column + 1, MICRO_USD)
        self.stop = self.stop or count == 0
        if not rest:
            raise _error(f"{_shown(part)} lacks a period such as /day", self.line, column)
        calendar = _CALENDAR.fullmatch(rest)
        if calendar is not None:
            limit = MoneyLimit(count, *self._calendar(calendar, rest_column))
        else:
            found = self._period(rest, rest_column)
            if found["what"]:
                raise _error(f"Cannot parse {_shown(rest)}", self.line, rest_column)
            limit = MoneyLimit(count, self._window(found, rest_column))
        period = limit.window_seconds, limit.calendar or ""
        if period in self.money:
            raise _error(f"/{str(limit).partition('/')[2]} is given twice for money", self.line, column)
        self.money[period] = limit

    def _calendar(self, found: re.Match[str], column: int) -> tuple[int, str]:
        period = found["period"].lower().removesuffix("s")
        if period not in CALENDAR_SECONDS:
            why = f"{_shown(period)} is not a calendar period: only day and month are"
            raise _error(why, self.line, column + found.start("period"), _nearest(period, ["day", "month"]))
        return CALENDAR_SECONDS[period], period

    def _count(self, part: str, column: int, scale: int = 1) -> tuple[int, str, int]:
        found = _NUMBER.match(part)
        if found is None:
            why = _invalid_digits(part) or f"{_shown(part)} does not start with a number"
            raise _error(why, self.line, column, _nearest(part.lower(), ["burst"]))
        suffix, end = found["suffix"], found.end()
        if suffix not in _SUFFIXES:
            why = f"{_shown(suffix)} is not a valid suffix: only k (1,000) and M (1,000,000) are"
            raise _error(why, self.line, column + found.start("suffix"))
        if end < len(part) and part[end] not in " \t/":
            why = _invalid_digits(part) or f"{_shown(part)} does not start with a whole number"
            raise _error(why, self.line, column)
        scaled = int(found["whole"] + (found["fraction"] or "")) * _SUFFIXES[suffix] * scale
        count, left = divmod(scaled, 10 ** len(found["fraction"] or ""))
        if left:
            why = f"{part[:end]} is not a whole number; write less than one a second as 1/2s, for example"
            if scale > 1:
                why = f"${part[:end]} is finer than a millionth of a dollar"
            raise _error(why, self.line, column)
        if count > MAX_COUNT * scale:
            raise _error(f"{_shown(part[:end])} is more than {MAX_COUNT:,}", self.line, column)
        rest = part[end:].lstrip()
        return count, rest, column + len(part) - len(rest)

    def _rate(self, count: int, rest: str, column: int, rest_column: int) -> None:
        found = self._period(rest, rest_column)
        what = found["what"].lower()
        if what not in {"", "request", "requests", "token", "tokens"}:
            hint = _nearest(what, ["tokens", "requests"])
            raise _error(f"{_shown(what)} cannot be limited", self.line, rest_column, hint)
        window = self._window(found, rest_column)
        if what.startswith("token"):
            self._once(window, self.tokens, "tokens", column)
            self.tokens[window] = TokenLimit(count, window)
        else:
            self._once(window, self.requests, "requests", column)
            self.requests[window] = RequestLimit(count, window)

    def _period(self, rest: str, column: int) -> re.Match[str]:
        found = _RATE.fullmatch(rest)
        if found is None:
            hint = _nearest(
                _PER.sub("/", rest.lower()), ["at once", "/s", "/min", "/minute", "/hour", "/day"]
            )
            why = f"Cannot parse {_shown(rest)}"
            if _CALENDAR.search(rest):
                why = "Only money has calendar periods"
            raise _error(why, self.line, column, hint)
        return found

    def _window(self, found: re.Match[str], column: int) -> int:
        multiple, unit = found["multiple"], (found["unit"] or "").lower()
        if unit not in _UNIT_SECONDS:
            place = column + found.start("unit") if unit else column + found.end()
            what = f"{_shown(unit)} is not a unit of time" if unit else "A unit of time is missing"
            hint = _nearest(unit, ["s", "sec", "second", "min", "minute", "hour", "day"])
            raise _error(_invalid_digits(unit) or what, self.line, place, hint)
        window = int(multiple or 1) * _UNIT_SECONDS[unit]
        if not 1 <= window <= MAX_WINDOW_SECONDS:
            why = "A window must be between 1 second and 31 days long"
            raise _error(why, self.line, column + found.start("multiple"))
        return window

    def _once(self, window: int, seen: Mapping[int, _Limit], what: str, column: int) -> None:
        if window in seen:
            raise _error(f"/{_window_text(window)} is given twice for {what}", self.line, column)


def _parts(line: str) -> Iterator[tuple[int, str]]:
    """Yields the trimmed parts between commas, each with the column (from 1) of its start."""
    position = 0
    for part in line.split(","):
        trimmed = part.strip()
        yield position + (len(part) - len(part.lstrip()) if trimmed else 0) + 1, trimmed
        position += len(part) + 1


def _invalid_digits(text: str) -> str | None:
    """Returns the error of a text that looks like a number but is not one; None for any other text."""
    if text.startswith(("-", "\N{MINUS SIGN}")):
        return f"{_shown(text)} is negative"
    if any(character.isnumeric() and not character.isascii() for character in text):
        return f"{_shown(text)} contains digits other than 0 to 9"
    return None


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def _shown(text: str) -> str:
    longest = 40
    return repr(text if len(text) <= longest else text[: longest - 1] + "…")


def _error(what: str, line: str, column: int, hint: str = "") -> TrafficTargetError:
    where = f" at column {column} of {echoed(line)}" if len(line) <= MAX_LINE_CHARACTERS else ""
    return TrafficTargetError(f"{what}{where}.{hint}\n{GRAMMAR}")


def _window_text(seconds: int) -> str:
    size, unit = next((size, unit) for size, unit in _CANONICAL_UNITS if seconds % size == 0)
    return unit if seconds == size else f"{seconds // size}{unit}"


def usd_text(micro_usd: int) -> str:
    """Prints an amount in US dollars, exactly: `$20`, `$0.25`."""
    whole, rest = divmod(micro_usd, MICRO_USD)
    fraction = f"{rest:06}".rstrip("0")
    return f"${whole}.{fraction:0<2}" if fraction else f"${whole}"


def _count_text(count: int) -> str:
    for suffix, size in (("M", 1_000_000), ("k", 1000)):
        if count and count % size == 0:
            return f"{count // size}{suffix}"
    return str(count)


def _never_binding(limits: Sequence[_Limit]) -> Iterator[str]:
    for loose in limits:
        for tight in limits:
            if tight is not loose and _always_tighter(tight, loose):
                yield f"{loose} never binds: {tight} is always tighter."
                break


def _always_tighter(tight: _Limit, loose: _Limit) -> bool:
    calendar = getattr(tight, "calendar", None)
    if calendar and not getattr(loose, "calendar", None):
        return False  # a calendar period bounds no window that starts at any time
    covering = -(-loose.window_seconds // tight.window_seconds)  # tight windows that cover one loose window
    if covering * tight.count > loose.count:
        return False
    same = (tight.count, tight.window_seconds) == (loose.count, loose.window_seconds)
    return not same or calendar != getattr(loose, "calendar", None)
