"""The roster in Postgres: which models are in use, their order for each category, the targets kept for them.

`config/models.yaml` is written by people and carried over at start and on `router models sync`; at run time
Postgres is the truth. Synchronous where people wait for it, asynchronous where a worker reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from router.database import AWAY_ERRORS, Connection, rows
from router.errors import ConfigError, DatabaseError
from router.models.ranked import Learned, Rankings
from router.settings.router import RouterConfig
from router.traffic import TrafficTarget

NOTHING_THERE = Learned(quality=1.0, most_share=0.0)  # of no weight beside what was learned of others


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
    if config.categorising is not None:
        whole["categorise"] = config.categorising.categorise_tasks
        whole["categorise_seconds"] = config.categorising.patience_seconds
    rows(connection, "SELECT sync_roster(%s::jsonb)", (json.dumps(whole),))


def active_models(connection: Connection) -> list[str]:
    """The names of the models that may be sent to, in order."""
    return [row["model"] for row in rows(connection, "SELECT model FROM roster_in_use ORDER BY model")]


def begin_run(connection: Any, run: str) -> list[dict[str, Any]]:
    """Open a run of solve_tasks; returns one worker's arguments a model. ConfigError if there is no model.

    `connection`: any DB-API connection of psycopg2; Airflow's hook wraps its own in another type.
    """
    with connection:
        rows(connection, "SELECT begin_run(%s)", (run,))
        models = active_models(connection)
    if not models:
        raise ConfigError("No model is active. Add one to config/models.yaml and run `router models sync`.")
    return [{"model": model, "run": run, "models": models} for model in models]


def run_report(connection: Any, run: str) -> dict[str, Any]:
    """What the run did: why it ended, and per model its calls by outcome."""
    with connection:
        about = rows(connection, "SELECT reason FROM runs WHERE run = %s", (run,))
        models: dict[str, dict[str, int]] = {}
        for row in rows(connection, "SELECT * FROM run_calls(%s)", (run,)):
            models.setdefault(row["model"], {})[row["outcome"]] = row["calls"]
    return {"run": run, "reason": about[0]["reason"] if about else "never begun", "models": models}


async def read_roster(pool: asyncpg.Pool) -> Roster:
    """The roster as it is now, for a worker."""
    version = await roster_version(pool)
    places: dict[str, dict[str, int]] = {}
    learned: dict[str, dict[str, Learned]] = {}
    for row in await _fetch(pool, "SELECT * FROM rankings"):
        places.setdefault(row["category"], {})[row["model"]] = row["place"]
        if row["quality"] is not None:
            known = Learned(row["quality"], row["least_share"], row["most_share"])
            learned.setdefault(row["category"], {})[row["model"]] = known
    models = await _fetch(pool, "SELECT * FROM roster_in_use ORDER BY model")
    found = await _fetch(pool, "SELECT name FROM categories ORDER BY is_default, name")
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
    found = await _fetch(pool, "SELECT last_value FROM roster_version")
    return int(found[0]["last_value"])


async def read_solved(pool: asyncpg.Pool) -> dict[str, int]:
    """category -> tasks solved up to now."""
    found = await _fetch(pool, "SELECT category, solved FROM task_counts_now")
    return {row["category"]: int(row["solved"]) for row in found}


async def read_targets(pool: asyncpg.Pool) -> dict[str, tuple[TrafficTarget, int]]:
    """model -> (target, version): the last good targets, which outlive Redis, Airflow and this process."""
    found = await _fetch(pool, "SELECT model, target, version FROM newest_targets")
    return {row["model"]: (TrafficTarget.parse(row["target"]), row["version"]) for row in found}


async def keep_target(pool: asyncpg.Pool, model: str, target: str, version: int) -> None:
    """Keep a target that is in force now, for a restart and for the judge."""
    await _fetch(pool, "SELECT keep_target($1, $2, $3)", model, target, version)


async def report_target_trouble(pool: asyncpg.Pool, model: str, line: str, problem: str) -> None:
    """Say that a model's Variable does not parse; its last good target stays in force."""
    await _fetch(pool, "SELECT report_target_trouble($1, $2, $3)", model, line, problem)


async def forget_target_troubles(pool: asyncpg.Pool, models: Iterable[str]) -> None:
    """Only the lines of these models can be wrong: the Variables of others are gone."""
    await _fetch(pool, "SELECT forget_target_troubles($1)", list(models))


async def report_model_trouble(pool: asyncpg.Pool, model: str, trouble: str | None) -> None:
    """Say why a model gets nothing though it is active; None when it is well again."""
    await _fetch(
        pool,
        "UPDATE roster SET trouble = $2 WHERE model = $1 AND trouble IS DISTINCT FROM $2",
        model,
        trouble,
    )


async def hold_solving(pool: asyncpg.Pool, *, held: bool, version: int) -> None:
    """Hold the batch back, or let it go; the older read loses."""
    await _fetch(pool, "SELECT hold_solving($1, $2)", held, version)


async def tell_watching(pool: asyncpg.Pool) -> None:
    """Say that the Variables are watched, so that workers need not read them."""
    await _fetch(pool, "SELECT watch_goes_on()")


async def past_calls(pool: asyncpg.Pool, model: str, seconds: float) -> list[tuple[float, int, bool]]:
    """(age in seconds, reserved tokens, still open) of each call sent within the last `seconds`.

    Ages are Postgres's own, and each call counts as late as it could have been sent.
    """
    found = await _fetch(pool, "SELECT * FROM past_calls($1, $2)", model, float(seconds))
    return [(row["age_seconds"], row["tokens"], row["is_open"]) for row in found]


async def _fetch(pool: asyncpg.Pool, statement: str, *arguments: Any) -> list[Any]:
    try:
        return list(await pool.fetch(statement, *arguments))
    except (asyncpg.PostgresError, *AWAY_ERRORS) as error:
        raise DatabaseError(f"Postgres: {error or type(error).__name__}") from error
