"""Forecasts of budgets: by hand-computed cases."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest

from router.limiter.budget import forecast, level_reached, period_end, use_text
from router.traffic import TrafficTarget

NOON = datetime(2024, 2, 28, 12, tzinfo=timezone.utc)  # of a leap year


@pytest.mark.parametrize(
    ("line", "used", "recent", "expected"),
    [
        ("$20/d", 5_000_000, 500_000, 12_000_000),  # 24 hours like the last one
        ("$20/d", 5_000_000, 0, 0),
        ("$20/calendar day", 5_000_000, 500_000, 11_000_000),  # 12 hours are left
        ("$20/calendar day", 5_000_000, 0, 5_000_000),
        (
            "$300/calendar month",
            100_000_000,
            31_000_000,
            136_000_000,
        ),  # a day's part is 24 in 31 h; 1.5 days left
    ],
)
def test_budget_comes_to_its_use_and_the_rest_at_the_recent_pace(
    line: str, used: int, recent: int, expected: int
) -> None:
    (limit,) = TrafficTarget.parse(line).money
    assert forecast(limit, used, recent, NOON) == expected


def test_calendar_periods_end_at_midnight_utc() -> None:
    assert period_end("day", NOON) == datetime(2024, 2, 29, tzinfo=timezone.utc)
    assert period_end("month", NOON) == datetime(2024, 3, 1, tzinfo=timezone.utc)
    assert period_end("month", datetime(2024, 12, 31, 23, tzinfo=timezone.utc)).year == 2025


@pytest.mark.parametrize(
    ("used", "level", "text"),
    [
        (0, 0, "$0.00 of $20/d used (0 %)"),
        (15_999_999, 0, "$16.00 of $20/d used (79 %)"),
        (16_000_000, 80, "$16.00 of $20/d used (80 %)"),
        (20_000_000, 100, "$20.00 of $20/d used (100 %)"),
        (21_000_000, 100, "$21.00 of $20/d used (105 %)"),
    ],
)
def test_levels_of_a_budget(used: int, level: int, text: str) -> None:
    (limit,) = TrafficTarget.parse("$20/d").money
    assert (level_reached(limit, used), use_text(limit, used)) == (level, text)
