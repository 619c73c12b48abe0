"""Drops days of the call log that are old and summed up, and scores older than the memory.

A day that is not summed up is never dropped, since its evidence would be lost. Running it again drops nothing
more.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import psycopg2
import psycopg2.errors
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from router.database import Connection, rows, transaction
from router.errors import TrafficTargetError
from router.learning.review import exclusive_review
from router.settings import LearningSettings
from router.traffic import TrafficTarget

DAY_SECONDS = 86_400
LOCK_MILLISECONDS = 200  # claims and settlements queue behind the lock request for at most this long
RETRY_SECONDS = 20.0  # per day of the log
SCORES_BATCH = 20_000
CLIENT_USAGE_DAYS = 32.0  # the longest window of a limit, and a day
BUSY = (psycopg2.errors.LockNotAvailable, psycopg2.errors.DeadlockDetected)


@dataclass(frozen=True, slots=True)
class Retention:
    """Dropped days and scores; for a dry run, those that would be dropped. `kept`: old days with reasons."""

    days: tuple[str, ...]
    bytes_freed: int
    scores: int
    kept: tuple[str, ...]

    def __str__(self) -> str:
        dropped = f"{len(self.days)} days of the log dropped ({self.bytes_freed / 1e6:,.1f} MB)"
        return f"{dropped}, {self.scores} old scores deleted, {len(self.kept)} old days kept"


def drop_old_calls(url: str, learning: LearningSettings, *, dry_run: bool = False) -> Retention:
    """Drops days that ended more than `retention_days` ago, and scores older than the memory.

    Keeps a day while a period that overlaps it is open, or while the longest window of a traffic target needs
    it. Raises ReviewBusy while a review runs.
    """
    with exclusive_review(url, autocommit=True) as connection:
        days, kept, freed = _drop_days(connection, learning, dry_run=dry_run)
        scores = 0 if dry_run else _prune_scores(connection, learning)
        if not dry_run:
            _prune_audit(connection, learning)
    return Retention(tuple(days), freed, scores, tuple(kept))


def _drop_days(
    connection: Connection, learning: LearningSettings, *, dry_run: bool
) -> tuple[list[str], list[str], int]:
    min_days = float(max(learning.retention_days, _limiter_days(connection)))
    dropped, kept, freed = [], [], 0
    for day in rows(
        connection, "SELECT * FROM old_call_partitions(%s, %s)", (learning.period_seconds, min_days)
    ):
        name, reason = day["partition"], day["kept"]
        if reason is None and not dry_run:
            reason = _drop(connection, name)
        if reason is None:
            dropped.append(name)
            freed += day["bytes"]
        else:
            kept.append(f"{name}: {reason}")
    return dropped, kept, freed


def _limiter_days(connection: Connection) -> float:
    """Days of the log that rebuild a limiter after Redis lost its state: the longest window, plus one."""
    longest = 0
    for row in rows(connection, "SELECT target FROM newest_targets"):
        with contextlib.suppress(TrafficTargetError):  # of an older version, and not active
            longest = max(longest, TrafficTarget.parse(row["target"]).longest_window_seconds)
    return longest / DAY_SECONDS + 1


def _drop(connection: Connection, partition: str) -> str | None:
    """Drops one day; the reason if the log stays locked by others."""
    retrying = Retrying(
        retry=retry_if_exception_type(BUSY),
        wait=wait_random_exponential(multiplier=0.1, max=2),
        stop=stop_after_delay(RETRY_SECONDS),
        reraise=True,
    )
    try:
        retrying(_drop_once, connection, partition)
    except BUSY:
        return f"the log was in use for {RETRY_SECONDS:g} s; the next run tries again"
    return None


def _drop_once(connection: Connection, partition: str) -> None:
    with transaction(connection):
        rows(connection, "SELECT set_config('lock_timeout', %s, true)", (f"{LOCK_MILLISECONDS}ms",))
        rows(connection, "SELECT drop_call_partition(%s)", (partition,))


def _prune_audit(connection: Connection, learning: LearningSettings) -> None:
    """Deletes entries of the audit log, and usage of clients, that are older than the log of calls."""
    arguments = (float(learning.retention_days), SCORES_BATCH)
    while rows(connection, "SELECT prune_audit(%s, %s) AS gone", arguments)[0]["gone"]:
        pass
    days = max(float(learning.retention_days), CLIENT_USAGE_DAYS)
    rows(connection, "SELECT prune_client_usage(%s)", (days,))


def _prune_scores(connection: Connection, learning: LearningSettings) -> int:
    """Deletes scores of periods older than the memory, in short transactions."""
    seconds = learning.period_seconds
    statement = "SELECT prune_scores(period_start(period_of(clock_timestamp(), %s) - %s + 1, %s), %s) AS gone"
    arguments = (seconds, learning.memory_periods, seconds, SCORES_BATCH)
    pruned = 0
    while gone := rows(connection, statement, arguments)[0]["gone"]:
        pruned += gone
    return pruned
