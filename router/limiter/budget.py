"""Forecast of a budget: what it comes to by its end at the pace of its recent part. Pure."""

from __future__ import annotations

from datetime import datetime, timedelta

from router.traffic import MoneyLimit

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
