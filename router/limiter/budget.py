"""Budgets: what one comes to by its end at the pace of its recent part, and the levels it reaches. Pure."""

from __future__ import annotations

from datetime import datetime, timedelta

from router.traffic import MICRO_USD, MoneyLimit

LEVELS = (100, 80)  # percent of a budget whose reaching is reported
RECENT_PART = 24  # the pace is that of this part of the window: of an hour for a day


def forecast(limit: MoneyLimit, used: int, recent: int, now: datetime) -> int:
    """Returns what the period comes to by its end, in millionths of a US dollar.

    `recent` was spent in the latest RECENT_PART-th of the window. A rolling window has no end: it comes to a
    whole window at this pace.
    """
    pace = recent * RECENT_PART / limit.window_seconds
    if limit.calendar is None:
        return round(pace * limit.window_seconds)
    left = (period_end(limit.calendar, now) - now).total_seconds()
    return used + round(pace * left)


def period_end(calendar: str, now: datetime) -> datetime:
    """Returns the end of the calendar period in UTC that contains `now`, which has a time zone of UTC."""
    begin = now.replace(hour=0, minute=0, second=0, microsecond=0)
    if calendar == "day":
        return begin + timedelta(days=1)
    return (begin.replace(day=1) + timedelta(days=31)).replace(day=1)


def level_reached(limit: MoneyLimit, used: int) -> int:
    """Returns the highest of LEVELS that `used` millionths of a US dollar have reached; 0 for none."""
    return next((level for level in LEVELS if 100 * used >= level * limit.count), 0)


def use_text(limit: MoneyLimit, used: int) -> str:
    """Returns how much of a budget is used, as in `$16.20 of $20/d used (81 %)`."""
    share = 100 * used // limit.count if limit.count else 100
    return f"${used / MICRO_USD:,.2f} of {limit} used ({share} %)"
