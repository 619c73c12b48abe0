"""Data about model discovery for the view Ranking: candidates, probation and roster changes."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from router.database import Connection, rows
from router.errors import ConfigError
from router.settings import ProbationSettings, load_discovery

MAX_FINDINGS = 20_000  # the newest, of all searches
MAX_PER_VERDICT = 50
MAX_MODELS = 100
MAX_EVENTS = 30

_SEARCH = "SELECT search, at, ended_at, by, notes FROM searches ORDER BY search DESC LIMIT 1"
_CANDIDATES = "SELECT * FROM console_candidates(%s, %s)"
_PROBATION = "SELECT * FROM console_probation(%s)"
_EVENTS = """
SELECT event, model, at, by, what, why, search, undoes, undone_by FROM roster_events
 ORDER BY event DESC LIMIT %s"""
_BOUNDS = """
SELECT k.category, k.model, (p.evidence ->> 'bound')::float8 AS bound
  FROM rankings k JOIN roster r USING (model)
  LEFT JOIN review_places p
    ON p.review = k.review AND p.category = k.category AND p.topic = '' AND p.model = k.model
 WHERE r.state = 'active' ORDER BY k.category, k.place, k.model"""


class ProbationCriteria:
    """Probation settings in `search.yaml`, read again when the file has changed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._cached: tuple[int, ProbationSettings] | None = None

    def read(self, categories: Sequence[str]) -> ProbationSettings | None:
        """Returns the settings; None if the file is invalid, which the search reports."""
        with self._lock:
            try:
                own = self._folder / "search.yaml"
                changed = own.stat().st_mtime_ns if own.exists() else 0
                if self._cached is None or self._cached[0] != changed:
                    self._cached = changed, load_discovery(self._folder, categories).probation
            except (OSError, ConfigError):
                return None
            return self._cached[1]


def read_discovery(connection: Connection, criteria: ProbationCriteria) -> dict[str, Any]:
    """Returns the last search, candidates by category ('' for all), probation and roster changes."""
    categories = [row["name"] for row in rows(connection, "SELECT name FROM categories ORDER BY name")]
    needs = criteria.read(categories)
    return {
        "search": next(iter(rows(connection, _SEARCH)), None),
        "candidates": _candidates(connection, categories),
        "probation": _probation(connection),
        "needs": None if needs is None else _required(needs),
        "events": rows(connection, _EVENTS, (MAX_EVENTS,)),
    }  # fmt: skip


def running_search(connection: Connection) -> dict[str, Any]:
    """Returns the search that runs now, with the calls of its trials; null if none does."""
    return {"running": next(iter(rows(connection, "SELECT * FROM running_search()")), None)}


def _required(settings: ProbationSettings) -> dict[str, Any]:
    return {
        "least_calls": settings.min_calls, "most_nights": settings.max_days, "margin": settings.margin
    }  # fmt: skip


def _candidates(connection: Connection, categories: Sequence[str]) -> dict[str, Any]:
    """Returns category -> `{"counts": {verdict: models}, "findings": [...]}`."""
    candidates: dict[str, Any] = {name: {"counts": {}, "findings": []} for name in categories}
    for row in rows(connection, _CANDIDATES, (MAX_FINDINGS, MAX_PER_VERDICT)):
        entry = candidates.setdefault(row.pop("category") or "", {"counts": {}, "findings": []})
        entry["counts"][row["verdict"]] = row.pop("alike")
        entry["findings"].append(row)
    return candidates


def _probation(connection: Connection) -> list[dict[str, Any]]:
    models: dict[str, dict[str, Any]] = {}
    medians = _medians(rows(connection, _BOUNDS))
    for row in rows(connection, _PROBATION, (MAX_MODELS,)):
        about = {name: row[name] for name in ("model", "target", "since", "by", "why", "search")}
        model = models.setdefault(row["model"], {**about, "categories": {}})
        if row["category"] is not None:
            names = ("place", "most_share", "bound", "reason", "calls", "trial")
            here = {name: row[name] for name in names}
            model["categories"][row["category"]] = {**here, "middle": medians.get(row["category"])}
    return list(models.values())


def _medians(active: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns category -> the median active model, which models on probation are compared with."""
    by_category: dict[str, list[dict[str, Any]]] = {}
    for row in active:
        by_category.setdefault(row["category"], []).append({"model": row["model"], "bound": row["bound"]})
    return {category: order[(len(order) - 1) // 2] for category, order in by_category.items()}
