"""The board: everything the open pages show live, read once for all of them."""

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

from .throughput import Bottleneck, Counter, Pace, bottleneck, pace

STRETCH_SECONDS = 5
HISTORY_SECONDS = 600
HISTORY_CALLS = 100_000
NEWEST_STRETCHES = 3  # the last is still filling; a page that missed one has it from the next look
NEWEST_CALLS = 20_000
SELDOM_SECONDS = 5.0
PACE_SECONDS = 60
PACE_CALLS = 3000

_SENDS = "SELECT * FROM console_sends(%s, %s, %s)"
_PLACES = "SELECT category, array_agg(model ORDER BY place, model) AS models FROM rankings GROUP BY category"
_OLDEST = "SELECT * FROM console_oldest()"
_ENDED = "SELECT * FROM console_ended(%s, %s)"
_TARGETS = """
SELECT model, target, in_force_at FROM traffic_targets WHERE in_force_at > %s
 UNION ALL
SELECT DISTINCT ON (model) model, target, in_force_at FROM traffic_targets
 WHERE in_force_at <= %s ORDER BY model, in_force_at"""
_CATEGORIES = "SELECT name FROM categories ORDER BY name"


@dataclass
class _Seldom:
    """What need not be read each second."""

    read_at: float
    places: Mapping[str, Sequence[str]]
    oldest: Mapping[str, Any] | None
    log_pace: Mapping[str, float]
    category_names: Sequence[str]


class Board:
    """Reads the board; one thread at a time."""

    def __init__(self) -> None:
        self._counter = Counter()
        self._seldom: _Seldom | None = None

    def read(self, connection: Connection, redis_url: str) -> dict[str, Any]:
        """The board of this moment; its first words are those of `router status --json`."""
        status = read_status(connection, redis_url)
        seldom = self._read_seldom(connection)
        now = datetime.now(timezone.utc)
        since = now - timedelta(seconds=STRETCH_SECONDS * NEWEST_STRETCHES)
        models = {
            m.model: {**{name: getattr(m, name) for name in m.__slots__}, **requests_of(m.target)}
            for m in status.models
        }
        return {
            **status.as_json(),
            "models": models,
            "at": now,
            "category_names": seldom.category_names,
            "oldest": seldom.oldest,
            **self._paces(status, seldom),
            "sends": sends(connection, since, NEWEST_CALLS),
        }

    def _read_seldom(self, connection: Connection) -> _Seldom:
        at = time.monotonic()
        if self._seldom is None or at - self._seldom.read_at > SELDOM_SECONDS:
            places = {row["category"]: row["models"] for row in rows(connection, _PLACES)}
            ended = rows(connection, _ENDED, (PACE_SECONDS, PACE_CALLS))
            self._seldom = _Seldom(
                read_at=at,
                places=places,
                oldest=next(iter(rows(connection, _OLDEST)), None),
                log_pace={row["category"]: row["ended"] / PACE_SECONDS for row in ended},
                category_names=[row["name"] for row in rows(connection, _CATEGORIES)],
            )
        return self._seldom

    def _paces(self, status: Status, seldom: _Seldom) -> dict[str, Any]:
        counts = status.categories
        self._counter.look(time.monotonic(), {n: c["solved"] + c["failed"] for n, c in counts.items()})
        speeds = self._counter.per_second()
        if speeds is None:
            speeds = dict(seldom.log_pace)
        paces = {n: pace(count["unsolved"], speeds.get(n, 0.0)) for n, count in counts.items()}
        whole = pace(status.tasks.unsolved, sum(speeds.values()))
        held_up = bottleneck(
            {n: count["unsolved"] for n, count in counts.items()},
            paces, seldom.places, {model.model: model for model in status.models},
        )  # fmt: skip
        return {"pace": _pace_object(whole, paces, held_up)}


def _pace_object(whole: Pace, paces: Mapping[str, Pace], held_up: Bottleneck | None) -> dict[str, Any]:
    return {
        **asdict(whole),
        "categories": {name: asdict(one) for name, one in paces.items()},
        "bottleneck": None if held_up is None else asdict(held_up),
    }


def sends(connection: Connection, since: datetime, most: int) -> dict[str, Any]:
    """Calls by model and stretch: `{"seconds", "first", "last", "models": {name: [calls]}}`.

    A stretch is a number: seconds since 1970 divided by `seconds`. The first is whole, the last still fills.
    """
    first = int(since.timestamp()) // STRETCH_SECONDS + 1
    begin = datetime.fromtimestamp(first * STRETCH_SECONDS, timezone.utc)
    found = rows(connection, _SENDS, (begin, STRETCH_SECONDS, most))
    last = max([int(time.time()) // STRETCH_SECONDS, *(row["stretch"] for row in found)])
    models: dict[str, list[int]] = {}
    for row in found:
        if row["stretch"] >= first:
            line = models.setdefault(row["model"], [0] * (last - first + 1))
            line[row["stretch"] - first] = row["calls"]
    return {"seconds": STRETCH_SECONDS, "first": first, "last": last, "models": models}


class History:
    """The last minutes of sends and targets. Reads them whole once, and then what is new."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, Any] | None = None

    def read(self, connection: Connection) -> dict[str, Any]:
        """`sends` as above, and every target that was in force meanwhile, with what `requests_of` says."""
        since = datetime.now(timezone.utc) - timedelta(seconds=HISTORY_SECONDS)
        with self._lock:
            self._known = self._sends(connection, since)
            return {"sends": self._known, "targets": _targets(connection, since)}

    def _sends(self, connection: Connection, since: datetime) -> dict[str, Any]:
        first = int(since.timestamp()) // STRETCH_SECONDS + 1
        known = self._known
        if known is None or known["last"] - NEWEST_STRETCHES < first:
            return sends(connection, since, HISTORY_CALLS)
        overlap = datetime.fromtimestamp(
            (known["last"] - NEWEST_STRETCHES) * STRETCH_SECONDS - 1, timezone.utc
        )
        return joined(known, sends(connection, overlap, HISTORY_CALLS), first)


def joined(known: Mapping[str, Any], newer: Mapping[str, Any], first: int) -> dict[str, Any]:
    """Both sends in one, from the stretch `first` on; where both know a stretch, `newer` is right."""
    models = {}
    for name in known["models"].keys() | newer["models"].keys():
        old = known["models"].get(name, [0] * (known["last"] - known["first"] + 1))
        new = newer["models"].get(name, [0] * (newer["last"] - newer["first"] + 1))
        line = (old[: newer["first"] - known["first"]] + new)[max(0, first - known["first"]) :]
        if any(line):
            models[name] = line
    return {**newer, "first": max(first, known["first"]), "models": models}


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
    """Requests that a target allows a minute, and their tightest window; None if it does not limit them."""
    parsed = TrafficTarget.parse(target) if target else None
    if parsed is None or not parsed.requests:
        return {"per_minute": 0.0 if parsed and parsed.stopped else None, "window_seconds": None}
    tightest = min(parsed.requests, key=lambda limit: limit.per_second)
    rate = parsed.requests_per_second()
    return {"per_minute": None if rate is None else rate * 60, "window_seconds": tightest.window_seconds}
