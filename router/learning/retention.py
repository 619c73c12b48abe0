"""Dropping what the log need not keep: days that are old and summed up, and scores that are out of memory.

Never a day that is not summed up: its evidence would be lost. Run again, it drops nothing more.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import psycopg2
import psycopg2.errors
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from router.database import Connection, rows
from router.errors import TrafficTargetError
from router.learning.review import alone
from router.settings import LearningSettings
from router.traffic import TrafficTarget

DAY_SECONDS = 86_400
LOCK_MILLISECONDS = 200  # whoever claims or settles waits behind us no longer
LOCK_PATIENCE_SECONDS = 20.0  # for each day; then it is tried again in the next night
SCORES_AT_ONCE = 20_000
BUSY = (psycopg2.errors.LockNotAvailable, psycopg2.errors.DeadlockDetected)


@dataclass(frozen=True, slots=True)
class Retention:
    """What was dropped, or would be with `dry_run`. `kept`: older days that must stay, with the reason."""

    days: tuple[str, ...]
    bytes_freed: int
    scores: int
    kept: tuple[str, ...]

    def __str__(self) -> str:
        words = f"{len(self.days)} days of the log dropped ({self.bytes_freed / 1e6:,.1f} MB)"
        return f"{words}, {self.scores} old scores deleted, {len(self.kept)} old days kept"


def drop_old_calls(url: str, learning: LearningSettings, *, dry_run: bool = False) -> Retention:
    """Drop the days of the log that ended more than `retention_days` ago, and scores out of memory.

    A day stays while a period that it lies in is not summed up and closed, and as long as the longest window
    of a traffic target needs it. ReviewBusy while a review runs.
    """
    with alone(url, autocommit=True) as connection:
        days, kept, freed = _drop_days(connection, learning, dry_run=dry_run)
        scores = 0 if dry_run else _forget_scores(connection, learning)
    return Retention(tuple(days), freed, scores, tuple(kept))


def _drop_days(
    connection: Connection, learning: LearningSettings, *, dry_run: bool
) -> tuple[list[str], list[str], int]:
    asked = (learning.period_seconds, float(max(learning.retention_days, _limiter_days(connection))))
    dropped, kept, freed = [], [], 0
    for day in rows(connection, "SELECT * FROM old_call_partitions(%s, %s)", asked):
        name, why = day["partition"], day["kept"]
        if why is None and not dry_run:
            why = _drop(connection, name)
        if why is None:
            dropped.append(name)
            freed += day["bytes"]
        else:
            kept.append(f"{name}: {why}")
    return dropped, kept, freed


def _limiter_days(connection: Connection) -> float:
    """Days of the log from which a limiter that lost its memory is rebuilt: the longest window, and one."""
    longest = 0
    for row in rows(connection, "SELECT target FROM newest_targets"):
        with contextlib.suppress(TrafficTargetError):  # of an older version: nothing is sent by it
            longest = max(longest, TrafficTarget.parse(row["target"]).longest_window_seconds)
    return longest / DAY_SECONDS + 1


def _drop(connection: Connection, partition: str) -> str | None:
    """Drop one day; why not, if others kept the log busy."""
    waiting = Retrying(
        retry=retry_if_exception_type(BUSY),
        wait=wait_random_exponential(multiplier=0.1, max=2),
        stop=stop_after_delay(LOCK_PATIENCE_SECONDS),
        reraise=True,
    )
    try:
        waiting(_drop_once, connection, partition)
    except BUSY:
        return f"the log was in use for {LOCK_PATIENCE_SECONDS:g} s; it is tried again in the next night"
    return None


def _drop_once(connection: Connection, partition: str) -> None:
    statements: tuple[tuple[str, tuple[Any, ...]], ...] = (
        ("SELECT set_config('lock_timeout', %s, true)", (f"{LOCK_MILLISECONDS}ms",)),
        ("SELECT drop_call_partition(%s)", (partition,)),
    )
    rows(connection, "BEGIN")
    try:
        for statement, arguments in statements:
            rows(connection, statement, arguments)
        rows(connection, "COMMIT")
    except BaseException:
        rows(connection, "ROLLBACK")
        raise


def _forget_scores(connection: Connection, learning: LearningSettings) -> int:
    """Delete what no period within memory asks for any more, in small transactions."""
    seconds = learning.period_seconds
    statement = "SELECT prune_scores(period_start(period_of(clock_timestamp(), %s) - %s + 1, %s), %s) AS gone"
    forgotten = 0
    while gone := rows(connection, statement, (seconds, learning.memory_periods, seconds, SCORES_AT_ONCE))[0][
        "gone"
    ]:
        forgotten += gone
    return forgotten
