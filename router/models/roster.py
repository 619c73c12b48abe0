"""The roster in Postgres: which models are in use, their order for each category, the targets kept for them.

`config/models.yaml` is written by people and carried over at start and on `router models sync`; at run time
Postgres is the truth. Synchronous where people wait for it, asynchronous where a worker reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import asyncpg

from router.database import Connection, fetch, rows
from router.models.ranked import RankedModel, Rankings
from router.settings import RouterConfig

NOTHING_THERE = RankedModel(quality=1.0, most_share=0.0)  # of no weight beside what was learned of others


@dataclass(frozen=True, slots=True)
class RosterModel:
    """One model that may be used now."""

    model: str
    endpoint: str
    state: str
    max_tokens: int
    timeout_seconds: float
    default_target: str


@dataclass(frozen=True, slots=True)
class Roster:
    """All models that may be used now, and their places (category -> model -> place, 1 is best)."""

    models: Mapping[str, RosterModel]
    places: Mapping[str, Mapping[str, int]]
    categories: tuple[str, ...]
    version: int
    learned: Rankings = field(default_factory=dict)  # category -> model, where a review ranked it


def sync_roster(connection: Connection, config: RouterConfig) -> None:
    """Carry `config/models.yaml` over: categories, models, places, and the queue's settings."""
    whole = {**config.model_dump(mode="json"), "categorise": False}
    if config.classification is not None:
        whole["categorise"] = config.classification.classify_tasks
        whole["categorise_seconds"] = config.classification.timeout_seconds
    rows(connection, "SELECT sync_roster(%s::jsonb)", (json.dumps(whole),))


async def read_roster(pool: asyncpg.Pool) -> Roster:
    """The roster as it is now, for a worker."""
    version = await roster_version(pool)
    places: dict[str, dict[str, int]] = {}
    learned: dict[str, dict[str, RankedModel]] = {}
    for row in await fetch(pool, "SELECT * FROM rankings"):
        places.setdefault(row["category"], {})[row["model"]] = row["place"]
        if row["quality"] is not None:
            known = RankedModel(row["quality"], row["least_share"], row["most_share"])
            learned.setdefault(row["category"], {})[row["model"]] = known
    models = await fetch(pool, "SELECT * FROM roster_in_use ORDER BY model")
    found = await fetch(pool, "SELECT name FROM categories ORDER BY is_default, name")
    categories = tuple(row["name"] for row in found)
    for row in models:
        for category in categories if row["state"] == "probation" else ():
            if row["model"] not in places.get(category, {}):  # it proves itself where it was taken on
                learned.setdefault(category, {})[row["model"]] = NOTHING_THERE
    return Roster(
        models={row["model"]: RosterModel(**dict(row)) for row in models},
        places=places,
        categories=categories,
        version=version,
        learned=learned,
    )


async def roster_version(pool: asyncpg.Pool) -> int:
    """A number that moves with every change of roster or ranking."""
    found = await fetch(pool, "SELECT last_value FROM roster_version")
    return int(found[0]["last_value"])


async def read_solved(pool: asyncpg.Pool) -> dict[str, int]:
    """category -> tasks solved up to now."""
    found = await fetch(pool, "SELECT category, solved FROM task_counts_now")
    return {row["category"]: int(row["solved"]) for row in found}


async def record_model_error(pool: asyncpg.Pool, model: str, trouble: str | None) -> None:
    """Say why a model gets nothing though it is active; None when it is well again."""
    await fetch(
        pool,
        "UPDATE roster SET trouble = $2 WHERE model = $1 AND trouble IS DISTINCT FROM $2",
        model,
        trouble,
    )
