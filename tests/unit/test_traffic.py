"""Traffic targets: parsing, printing, derived rates, and error messages."""

# ruff: noqa: RUF001 - some lines test digits of other scripts

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.errors import ConfigError, TrafficTargetError, echoed
from router.traffic import (
    CALENDAR_SECONDS,
    GRAMMAR,
    MoneyLimit,
    RequestLimit,
    TokenLimit,
    TrafficTarget,
)


def test_example_of_the_grammar_parses():
    target = TrafficTarget.parse("120/min, 4/s, 90k tokens/min, 20 at once")
    assert target.requests == (RequestLimit(120, 60), RequestLimit(4, 1))
    assert target.tokens == (TokenLimit(90_000, 60),)
    assert target.at_once == 20
    assert not target.burst
    assert str(target) == "120/min, 4/s, 90k tokens/min, 20 at once"


@pytest.mark.parametrize(
    ("line", "canonical"),
    [
        ("4/s,120/min", "120/min, 4/s"),
        ("  100/10s ,BURST ", "100/10s, burst"),
        ("120 requests / minute", "120/min"),
        ("1.5k tokens/hour", "1500 tokens/h"),
        ("2M tokens/2 d", "2M tokens/2d"),
        ("60/60s", "60/min"),
        ("20 AT  ONCE", "20 at once"),
        ("0", "0"),
        ("0/min", "0"),
        ("120/min, 0 at once", "0"),
        ("120/min, 0 tokens/s", "0"),
        ("$20/day", "$20/d"),
        ("$20/calendar day", "$20/calendar day"),
        ("$ 1.5k / Calendar Month, 4/s", "4/s, $1500/calendar month"),
        ("$0.25/h, $0.5/d", "$0.50/d, $0.25/h"),
        ("$0.000001/s", "$0.000001/s"),
        ("$0/day, 4/s", "0"),
        ("$0.0/calendar day", "0"),
    ],
)
def test_line_is_printed_in_canonical_form(line: str, canonical: str):
    assert str(TrafficTarget.parse(line)) == canonical


@pytest.mark.parametrize(
    ("line", "column", "word"),
    [
        ("", 1, "missing"),
        ("4/s, ", 5, "missing"),
        ("-1/min", 1, "negative"),
        ("120/min, -4/s", 10, "negative"),
        ("2000000000/min", 1, "1,000,000,000"),
        ("−5/s", 1, "negative"),
        ("120/-1s", 5, "negative"),
        ("9" * 400 + "/min", 1, "1,000,000,000"),
        ("90M tokens/min, 2000M tokens/h", 17, "1,000,000,000"),
        ("1000000001 at once", 1, "1,000,000,000"),
        ("4/s, 1/0s", 8, "between 1 second"),
        ("4/s, 1/0min", 8, "between 1 second"),
        ("1/" + "9" * 300 + "s", 3, "31 days"),
        ("1/99999d", 3, "31 days"),
        ("1/s, 4/s", 6, "twice"),
        ("60/min, 1/60s", 9, "twice"),
        ("1k tokens/s, 2k tokens/s", 14, "twice"),
        ("1 at once, 2 at once", 12, "twice"),
        ("1/s, burst, burst", 13, "twice"),
        ("120/mni", 5, "Did you mean 'min'?"),
        ("120/minn", 5, "Did you mean 'min'?"),
        ("9 tokens/hoor", 10, "Did you mean 'hour'?"),
        ("5 at ones", 3, "Did you mean 'at once'?"),
        (
            "55 per minut",
            4,
            "Cannot parse 'per minut' at column 4 of '55 per minut'. Did you mean '/minute'?",
        ),
        ("1/s; 2/min", 2, "Cannot parse"),
        ("1/s\n2/min", 2, "Cannot parse"),
        ("1/s\0", 3, "not a unit of time"),
        ("120/", 5, "missing"),
        ("1/s, brst", 6, "Did you mean 'burst'?"),
        ("9 tokns/min", 3, "Did you mean 'tokens'?"),
        ("٣/min", 1, "other than 0 to 9"),
        ("１２０/min", 1, "other than 0 to 9"),
        ("1２0/min", 1, "other than 0 to 9"),
        ("4/s, 120/٣s", 10, "other than 0 to 9"),
        ("²/s", 1, "other than 0 to 9"),
        ("٣ at once", 1, "other than 0 to 9"),
        ("1e9/s", 2, "only k"),
        ("1,000/min", 1, "a comma separates limits"),
        ("90m tokens/min", 3, "only k"),
        ("0.5/s", 1, "1/2s"),
        ("120", 1, "Only 0 is valid alone"),
        ("4/s, $20", 6, "lacks a period"),
        ("$-5/day", 2, "negative"),
        ("$x/day", 2, "does not start with a number"),
        ("$0.0000001/day", 2, "finer than a millionth"),
        ("$2000M/day", 2, "1,000,000,000"),
        ("4/s, $5 tokens/day", 9, "Cannot parse"),
        ("$5/calendar year", 13, "only day and month"),
        ("$5/calendar dya", 13, "Did you mean 'day'?"),
        ("4/s, 5/calendar day", 7, "Only money has calendar periods"),
        ("5 tokens/calendar month", 3, "Only money has calendar periods"),
        ("$5/day, $6/24h", 9, "twice"),
        ("$5/calendar day, $6/calendar day", 18, "twice"),
        ("$5 per day", 4, "Did you mean '/day'?"),
        ("burst", 1, "no limit"),
    ],
)
def test_invalid_line_is_reported_with_column_and_grammar(line: str, column: int, word: str):
    with pytest.raises(TrafficTargetError) as caught:
        TrafficTarget.parse(line)
    message = str(caught.value)
    assert word in message
    assert f"at column {column} of {echoed(line)}" in message
    assert message.endswith(GRAMMAR)
    assert isinstance(caught.value, ConfigError)


@pytest.mark.parametrize("line", ["7" * 501, "7" * 100_000, "1/s, " * 20_000, "," * 100_000, "٣" * 100_000])
def test_oversized_line_is_rejected_without_echoing_it(line: str):
    with pytest.raises(TrafficTargetError) as caught:
        TrafficTarget.parse(line)
    message = str(caught.value)
    assert f"{len(line)} characters; at most 500" in message
    assert line[:50] not in message
    assert message.endswith(GRAMMAR)
    assert len(message) < 1000


def test_error_message_of_a_long_line_is_bounded():
    with pytest.raises(TrafficTargetError) as caught:
        TrafficTarget.parse("1/x" + "x" * 497)
    assert len(str(caught.value)) < 1200


def test_money_is_counted_in_millionths_of_a_dollar():
    target = TrafficTarget.parse("$20/day, $300/calendar month, 4/s")
    assert target.money == (
        MoneyLimit(300_000_000, 31 * 86_400, "month"),
        MoneyLimit(20_000_000, 86_400),
    )
    assert target.longest_window_seconds == 31 * 86_400
    assert target.requests_per_second() == 4.0  # a budget sets no pace


def test_rate_is_that_of_the_tightest_request_limit():
    target = TrafficTarget.parse("120/min, 4/s, 90k tokens/min")
    assert target.requests_per_second() == 2.0
    assert target.gap_seconds == pytest.approx(0.9 * 60 / 120)
    assert target.longest_window_seconds == 60


def test_burst_has_no_gap_and_a_target_without_requests_has_no_rate():
    assert TrafficTarget.parse("120/min, burst").gap_seconds == 0.0
    assert TrafficTarget.parse("20 at once").requests_per_second() is None
    assert TrafficTarget.parse("20 at once").gap_seconds == 0.0


def test_stopped_model_has_rate_zero():
    target = TrafficTarget.parse("0")
    assert target.stopped
    assert target.requests_per_second() == 0.0
    assert not TrafficTarget.parse("1/d").stopped


@pytest.mark.parametrize(
    ("line", "loose"),
    [
        ("60/min, 1/s", "60/min"),
        ("10000/min, 1/s", "10000/min"),
        ("10/s, 6000/min", "6000/min"),
        ("1k tokens/s, 1M tokens/min", "1M tokens/min"),
        ("$1/h, $30/d", "$30/d"),
        ("$1/d, $1/calendar day", "$1/calendar day"),
        ("$1/calendar day, $31/calendar month", "$31/calendar month"),
    ],
)
def test_limit_that_never_binds_causes_a_warning(line: str, loose: str):
    (warning,) = TrafficTarget.parse(line).warnings
    assert warning.startswith(f"{loose} never binds")


def test_line_whose_canonical_form_is_too_long_is_rejected():
    line = ",".join(f"1M/{seconds}s" for seconds in range(2, 60))
    assert len(line) < 500
    with pytest.raises(TrafficTargetError, match="The canonical line has"):
        TrafficTarget.parse(line)


@pytest.mark.parametrize(
    "line",
    [
        "120/min, 4/s",
        "59/min, 1/s",
        "100/10s, 30/3s",
        "20 at once",
        "$1/h, $20/d",
        "$1/calendar day, $20/calendar month",
    ],
)
def test_binding_limits_cause_no_warning(line: str):
    assert TrafficTarget.parse(line).warnings == ()


_windows = st.one_of(
    st.integers(1, 500),
    st.sampled_from([60, 120, 3600, 7200, 86_400, 31 * 86_400]),
    st.integers(1, 31 * 86_400),
)
_counts = st.one_of(st.integers(1, 1_000_000_000), st.sampled_from([1000, 90_000, 1_000_000, 2_500_000]))


_money_periods = st.one_of(
    st.tuples(_windows, st.just("")),
    st.sampled_from([(CALENDAR_SECONDS[kind], kind) for kind in CALENDAR_SECONDS]),
)


@st.composite
def _targets(draw: st.DrawFn) -> TrafficTarget:
    requests = draw(st.dictionaries(_windows, _counts, max_size=4))
    tokens = draw(st.dictionaries(_windows, _counts, max_size=4))
    money = draw(st.dictionaries(_money_periods, st.integers(1, 10**15), max_size=4))
    at_once = draw(st.one_of(st.none(), st.integers(1, 1_000_000_000)))
    if not requests and not tokens and not money and at_once is None:
        at_once = 1
    return TrafficTarget(
        requests=tuple(RequestLimit(requests[window], window) for window in sorted(requests, reverse=True)),
        tokens=tuple(TokenLimit(tokens[window], window) for window in sorted(tokens, reverse=True)),
        at_once=at_once,
        burst=draw(st.booleans()),
        money=tuple(
            MoneyLimit(money[seconds, kind], seconds, kind or None)
            for seconds, kind in sorted(money, reverse=True)
        ),
    )


@given(_targets())
def test_printed_target_parses_to_the_same_target(target: TrafficTarget):
    line = str(target)
    assert TrafficTarget.parse(line) == target
    assert str(TrafficTarget.parse(line)) == line


@given(st.text(max_size=80))
def test_any_text_is_parsed_or_raises_a_target_error(line: str):
    try:
        target = TrafficTarget.parse(line)
    except TrafficTargetError:
        return
    assert TrafficTarget.parse(str(target)) == target
