"""What the view Priorities reads of the search: what it found, and who is on probation and needs what."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from router.database import Connection, rows
from router.errors import ConfigError
from router.settings import ProbationSettings, load_discovery

AMONG_FINDINGS = 20_000  # the newest, of all searches
EACH_VERDICT = 50
MOST_MODELS = 100
MOST_EVENTS = 30

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


class Criteria:
    """What `search.yaml` asks of a model on probation; read again when the file has changed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._known: tuple[int, ProbationSettings] | None = None

    def read(self, categories: Sequence[str]) -> ProbationSettings | None:
        """The settings; None if the file cannot be used, of which the search itself says what is wrong."""
        with self._lock:
            try:
                own = self._folder / "search.yaml"
                changed = own.stat().st_mtime_ns if own.exists() else 0
                if self._known is None or self._known[0] != changed:
                    self._known = changed, load_discovery(self._folder, categories).probation
            except (OSError, ConfigError):
                return None
            return self._known[1]


def found(connection: Connection, criteria: Criteria) -> dict[str, Any]:
    """The last search, findings by category ('': whatever the category), probation, and what changed."""
    categories = [row["name"] for row in rows(connection, "SELECT name FROM categories ORDER BY name")]
    needs = criteria.read(categories)
    asked = {"min_calls", "max_days", "margin"}
    return {
        "search": next(iter(rows(connection, _SEARCH)), None),
        "candidates": _candidates(connection, categories),
        "probation": _probation(connection),
        "needs": None if needs is None else needs.model_dump(include=asked),
        "events": rows(connection, _EVENTS, (MOST_EVENTS,)),
    }  # fmt: skip


def _candidates(connection: Connection, categories: Sequence[str]) -> dict[str, Any]:
    """category -> `{"counts": {verdict: models}, "findings": [...]}`."""
    told: dict[str, Any] = {name: {"counts": {}, "findings": []} for name in categories}
    for row in rows(connection, _CANDIDATES, (AMONG_FINDINGS, EACH_VERDICT)):
        here = told.setdefault(row.pop("category") or "", {"counts": {}, "findings": []})
        here["counts"][row["verdict"]] = row.pop("alike")
        here["findings"].append(row)
    return told


def _probation(connection: Connection) -> list[dict[str, Any]]:
    models: dict[str, dict[str, Any]] = {}
    middles = _middles(rows(connection, _BOUNDS))
    for row in rows(connection, _PROBATION, (MOST_MODELS,)):
        about = {name: row[name] for name in ("model", "target", "since", "by", "why", "search")}
        model = models.setdefault(row["model"], {**about, "categories": {}})
        if row["category"] is not None:
            names = ("place", "most_share", "bound", "reason", "calls", "trial")
            here = {name: row[name] for name in names}
            model["categories"][row["category"]] = {**here, "middle": middles.get(row["category"])}
    return list(models.values())


def _middles(active: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """category -> the middle one of its active models, by which those on probation are measured."""
    by_category: dict[str, list[dict[str, Any]]] = {}
    for row in active:
        by_category.setdefault(row["category"], []).append({"model": row["model"], "bound": row["bound"]})
    return {category: order[(len(order) - 1) // 2] for category, order in by_category.items()}
