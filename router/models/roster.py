"""Roster in Postgres: the models in use and their ranking in each category.

`router models sync` writes `config/models.yaml` to Postgres, which is authoritative at runtime. The roster is
written synchronously by the command line, and read asynchronously by workers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import asyncpg

from router.database import Connection, fetch, rows
from router.models.ranked import RankedModel, Rankings
from router.settings import DEFAULT_CLIENT, RouterConfig

NO_SHARE = RankedModel(quality=1.0, most_share=0.0)


@dataclass(frozen=True, slots=True)
class RosterModel:
    """One model in use."""

    model: str
    endpoint: str
    state: str
    max_tokens: int
    timeout_seconds: float
    default_target: str
    context_tokens: int | None = None
    tokens_per_byte: float | None = None  # learned from the log, as the following
    spread: float | None = None  # standard deviation of tokens_per_byte
    tokens_per_call: float | None = None
    input_price: float = 0.0  # USD per million tokens
    output_price: float = 0.0


@dataclass(frozen=True, slots=True)
class Roster:
    """All models in use. `places`: category -> model -> rank, 1 is best. `learned`: the review's ranking."""

    models: Mapping[str, RosterModel]
    places: Mapping[str, Mapping[str, int]]
    categories: tuple[str, ...]
    version: int
    learned: Rankings = field(default_factory=dict)


def sync_roster(connection: Connection, config: RouterConfig) -> None:
    """Writes the config to Postgres: categories, models, ranks, and settings of the queue."""
    whole = {**config.model_dump(mode="json"), "categorise": False}
    if config.classification is not None:
        whole["categorise"] = config.classification.classify_tasks
        whole["categorise_seconds"] = config.classification.timeout_seconds
    whole["task_defaults"] = config.tasks.as_text()
    whole["client_weight"] = config.client(DEFAULT_CLIENT).weight
    whole["client_weights"] = {name: config.client(name).weight for name in config.clients}
    rows(connection, "SELECT sync_roster(%s::jsonb)", (json.dumps(whole),))


async def read_roster(pool: asyncpg.Pool) -> Roster:
    """Reads the current roster."""
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
            if row["model"] not in places.get(category, {}):  # its probation is in other categories
                learned.setdefault(category, {})[row["model"]] = NO_SHARE
    return Roster(
        models={row["model"]: RosterModel(**dict(row)) for row in models},
        places=places,
        categories=categories,
        version=version,
        learned=learned,
    )


async def roster_version(pool: asyncpg.Pool) -> int:
    """Reads a number that grows with every change of roster or ranking."""
    found = await fetch(pool, "SELECT last_value FROM roster_version")
    return int(found[0]["last_value"])


async def read_solved(pool: asyncpg.Pool) -> dict[str, int]:
    """Reads category -> number of tasks solved so far."""
    found = await fetch(pool, "SELECT category, solved FROM task_counts_now")
    return {row["category"]: int(row["solved"]) for row in found}


async def record_model_error(pool: asyncpg.Pool, model: str, error: str | None) -> None:
    """Records the last error of a model's calls; None once a call has succeeded again."""
    await fetch(
        pool,
        "UPDATE roster SET trouble = $2 WHERE model = $1 AND trouble IS DISTINCT FROM $2",
        model,
        error,
    )
