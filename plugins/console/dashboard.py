"""Data for the live status and the plots of the console."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from functools import lru_cache
from typing import Any

from router.database import Connection, rows
from router.status import Status, read_status
from router.traffic import TrafficTarget

from .throughput import ThroughputMeter, bottleneck, throughput

BUCKET_SECONDS = 5
HISTORY_SECONDS = 600
HISTORY_MAX_CALLS = 100_000
NEWEST_BUCKETS = 3  # the last is incomplete; a page that missed one gets it with the next status
NEWEST_MAX_CALLS = 20_000
SLOW_READ_SECONDS = 5.0
THROUGHPUT_SECONDS = 60
THROUGHPUT_MAX_CALLS = 3000

_SENDS = "SELECT * FROM console_sends(%s, %s, %s)"
_RANKINGS = (
    "SELECT category, array_agg(model ORDER BY place, model) AS models FROM rankings GROUP BY category"
)
_OLDEST = "SELECT * FROM console_oldest()"
_ENDED = "SELECT * FROM console_ended(%s, %s)"
_TARGETS = """
SELECT model, target, in_force_at FROM traffic_targets WHERE in_force_at > %s
 UNION ALL
SELECT DISTINCT ON (model) model, target, in_force_at FROM traffic_targets
 WHERE in_force_at <= %s ORDER BY model, in_force_at"""
_CATEGORIES = "SELECT name FROM categories ORDER BY name"


@dataclass
class _SlowReadings:
    """Data that is read every SLOW_READ_SECONDS only."""

    read_at: float
    rankings: Mapping[str, Sequence[str]]
    oldest: Mapping[str, Any] | None
    logged_throughput: Mapping[str, float]
    category_names: Sequence[str]


class Dashboard:
    """Reads the live status. Not thread-safe."""

    def __init__(self) -> None:
        self._meter = ThroughputMeter()
        self._slow: _SlowReadings | None = None

    def read(self, connection: Connection, redis_url: str) -> dict[str, Any]:
        """Returns the current status: the keys of `router status --json` and those of the console."""
        status = read_status(connection, redis_url)
        slow = self._read_slow(connection)
        now = datetime.now(timezone.utc)
        since = now - timedelta(seconds=BUCKET_SECONDS * NEWEST_BUCKETS)
        models = {
            m.model: {**{name: getattr(m, name) for name in m.__slots__}, **requests_of(m.target)}
            for m in status.models
        }
        return {
            **status.as_json(),
            "models": models,
            "at": now,
            "category_names": slow.category_names,
            "oldest": slow.oldest,
            "pace": self._throughput(status, slow),
            "sends": sends(connection, since, NEWEST_MAX_CALLS),
        }

    def _read_slow(self, connection: Connection) -> _SlowReadings:
        at = time.monotonic()
        if self._slow is None or at - self._slow.read_at > SLOW_READ_SECONDS:
            rankings = {row["category"]: row["models"] for row in rows(connection, _RANKINGS)}
            ended = rows(connection, _ENDED, (THROUGHPUT_SECONDS, THROUGHPUT_MAX_CALLS))
            self._slow = _SlowReadings(
                read_at=at,
                rankings=rankings,
                oldest=next(iter(rows(connection, _OLDEST)), None),
                logged_throughput={row["category"]: row["ended"] / THROUGHPUT_SECONDS for row in ended},
                category_names=[row["name"] for row in rows(connection, _CATEGORIES)],
            )
        return self._slow

    def _throughput(self, status: Status, slow: _SlowReadings) -> dict[str, Any]:
        counts = status.categories
        self._meter.record(time.monotonic(), {n: c["solved"] + c["failed"] for n, c in counts.items()})
        rates = self._meter.per_second()
        if rates is None:
            rates = dict(slow.logged_throughput)
        categories = {n: throughput(count["unsolved"], rates.get(n, 0.0)) for n, count in counts.items()}
        total = throughput(status.tasks.unsolved, sum(rates.values()))
        limiting = bottleneck(
            {n: count["unsolved"] for n, count in counts.items()},
            categories, slow.rankings, {model.model: model for model in status.models},
        )  # fmt: skip
        return {
            **asdict(total),
            "categories": {name: asdict(one) for name, one in categories.items()},
            "bottleneck": None if limiting is None else asdict(limiting),
        }


def sends(connection: Connection, since: datetime, max_calls: int) -> dict[str, Any]:
    """Counts calls by model and bucket: `{"seconds", "first", "last", "models": {name: [calls]}}`.

    A bucket is numbered by its Unix time divided by `seconds`. The first is complete, the last is not.
    """
    first = int(since.timestamp()) // BUCKET_SECONDS + 1
    begin = datetime.fromtimestamp(first * BUCKET_SECONDS, timezone.utc)
    found = rows(connection, _SENDS, (begin, BUCKET_SECONDS, max_calls))
    last = max([int(time.time()) // BUCKET_SECONDS, *(row["stretch"] for row in found)])
    models: dict[str, list[int]] = {}
    for row in found:
        if row["stretch"] >= first:
            line = models.setdefault(row["model"], [0] * (last - first + 1))
            line[row["stretch"] - first] = row["calls"]
    return {"seconds": BUCKET_SECONDS, "first": first, "last": last, "models": models}


class History:
    """Sends and targets of the last HISTORY_SECONDS. Reads all of them once, then only new ones."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cached: dict[str, Any] | None = None

    def read(self, connection: Connection) -> dict[str, Any]:
        """Returns the sends (see `sends`) and the targets that were active, with their `requests_of`."""
        since = datetime.now(timezone.utc) - timedelta(seconds=HISTORY_SECONDS)
        with self._lock:
            self._cached = self._sends(connection, since)
            return {"sends": self._cached, "targets": _targets(connection, since)}

    def _sends(self, connection: Connection, since: datetime) -> dict[str, Any]:
        first = int(since.timestamp()) // BUCKET_SECONDS + 1
        cached = self._cached
        if cached is None or cached["last"] - NEWEST_BUCKETS < first:
            return sends(connection, since, HISTORY_MAX_CALLS)
        overlap = datetime.fromtimestamp((cached["last"] - NEWEST_BUCKETS) * BUCKET_SECONDS - 1, timezone.utc)
        return merged(cached, sends(connection, overlap, HISTORY_MAX_CALLS), first)


def merged(older: Mapping[str, Any], newer: Mapping[str, Any], first: int) -> dict[str, Any]:
    """Merges two results of `sends` from the bucket `first` on; `newer` wins where they overlap."""
    models = {}
    for name in older["models"].keys() | newer["models"].keys():
        old = older["models"].get(name, [0] * (older["last"] - older["first"] + 1))
        new = newer["models"].get(name, [0] * (newer["last"] - newer["first"] + 1))
        line = (old[: newer["first"] - older["first"]] + new)[max(0, first - older["first"]) :]
        if any(line):
            models[name] = line
    return {**newer, "first": max(first, older["first"]), "models": models}


def _targets(connection: Connection, since: datetime) -> dict[str, list[dict[str, Any]]]:
    targets: dict[str, list[dict[str, Any]]] = {}
    for row in rows(connection, _TARGETS, (since, since)):
        entry = {"at": row["in_force_at"], "target": row["target"], **requests_of(row["target"])}
        targets.setdefault(row["model"], []).append(entry)
    for entries in targets.values():
        entries.sort(key=lambda entry: entry["at"])
    return targets


@lru_cache(maxsize=1000)
def requests_of(target: str | None) -> dict[str, float | None]:
    """Returns a target's requests per minute and tightest window in seconds; None without request limits."""
    parsed = TrafficTarget.parse(target) if target else None
    if parsed is None or not parsed.requests:
        return {"per_minute": 0.0 if parsed and parsed.stopped else None, "window_seconds": None}
    tightest = min(parsed.requests, key=lambda limit: limit.per_second)
    rate = parsed.requests_per_second()
    return {"per_minute": None if rate is None else rate * 60, "window_seconds": tightest.window_seconds}
