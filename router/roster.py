"""The roster in Postgres: which models are in use, their order for each category, and the targets kept for them.

`config/models.yaml` is written by people and carried over at start and on `router models sync`; at run time
Postgres is the truth. Synchronous where people wait for it, asynchronous where a worker reads it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import asyncpg

from router.database import Connection, rows
from router.errors import ConfigError, DatabaseError
from router.settings import RouterConfig


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
    """All models that may be used now, and their places. places: category -> model -> place, 1 is best."""

    models: Mapping[str, RosterModel]
    places: Mapping[str, Mapping[str, int]]
    categories: tuple[str, ...]
    version: int


def sync_roster(connection: Connection, config: RouterConfig) -> None:
    """Carry `config/models.yaml` over: categories, models, settings, and places where none were learned yet.

    What people wrote wins over what a search wrote; models that the file does not name (any more) are paused if
    people had added them, and left alone if a search had.
    """
    rows(connection, "UPDATE categories SET is_default = false WHERE is_default AND name <> %s", (config.default_category,))
    for category in config.categories:
        rows(
            connection,
            "INSERT INTO categories AS c VALUES (%s, %s) ON CONFLICT (name) DO UPDATE SET is_default = EXCLUDED.is_default"
            " WHERE c.is_default <> EXCLUDED.is_default",
            (category, category == config.default_category),
        )
    rows(connection, "DELETE FROM categories WHERE name <> ALL (%s)", (list(config.categories),))
    worker = config.worker
    rows(
        connection,
        "UPDATE queue_settings SET max_attempts = %s, retry_base_seconds = %s, retry_cap_seconds = %s, lease_seconds = %s",
        (worker.max_attempts, worker.retry_base_seconds, worker.retry_cap_seconds, worker.lease_seconds),
    )
    for name in config.models:
        _sync_model(connection, config, name)
    rows(
        connection,
        "UPDATE roster SET state = 'paused', changed_at = clock_timestamp()"
        " WHERE source = 'people' AND state <> 'paused' AND model <> ALL (%s)",
        (list(config.models),),
    )


def _sync_model(connection: Connection, config: RouterConfig, name: str) -> None:
    model = config.models[name]
    values = (
        name, model.endpoint or name, model.state, model.context_tokens, model.max_tokens, model.timeout_seconds,
        model.input_price, model.output_price, model.target,
    )  # fmt: skip
    rows(
        connection,
        "INSERT INTO roster AS r (model, endpoint, state, source, context_tokens, max_tokens, timeout_seconds,"
        " input_price, output_price, default_target) VALUES (%s, %s, %s, 'people', %s, %s, %s, %s, %s, %s)"
        " ON CONFLICT (model) DO UPDATE SET endpoint = EXCLUDED.endpoint, state = EXCLUDED.state, source = 'people',"
        " context_tokens = EXCLUDED.context_tokens, max_tokens = EXCLUDED.max_tokens,"
        " timeout_seconds = EXCLUDED.timeout_seconds, input_price = EXCLUDED.input_price,"
        " output_price = EXCLUDED.output_price, default_target = EXCLUDED.default_target,"
        " changed_at = clock_timestamp()"
        " WHERE (r.endpoint, r.state, r.source, r.context_tokens, r.max_tokens, r.timeout_seconds, r.input_price,"
        " r.output_price, r.default_target) IS DISTINCT FROM (EXCLUDED.endpoint, EXCLUDED.state, 'people',"
        " EXCLUDED.context_tokens, EXCLUDED.max_tokens, EXCLUDED.timeout_seconds, EXCLUDED.input_price,"
        " EXCLUDED.output_price, EXCLUDED.default_target)",
        values,
    )
    for category, place in model.ranks.items():
        rows(
            connection,
            "INSERT INTO rankings AS r VALUES (%s, %s, %s) ON CONFLICT (category, model) DO UPDATE"
            " SET place = EXCLUDED.place WHERE r.place <> EXCLUDED.place",
            (category, name, place),
        )


def active_models(connection: Connection) -> list[str]:
    """The names of the models that may be sent to, in order."""
    found = rows(connection, "SELECT model FROM roster WHERE state IN ('active', 'probation') ORDER BY model")
    return [row["model"] for row in found]


def roster_version(connection: Connection) -> int:
    """Moves with every change of the roster or a ranking."""
    return int(rows(connection, "SELECT last_value FROM roster_version")[0]["last_value"])


async def read_roster(pool: asyncpg.Pool) -> Roster:
    """The roster as it is now, for a worker."""
    version = await _fetch(pool, "SELECT last_value FROM roster_version")
    models = await _fetch(
        pool,
        "SELECT model, endpoint, state, max_tokens, timeout_seconds, default_target FROM roster"
        " WHERE state IN ('active', 'probation') ORDER BY model",
    )
    places: dict[str, dict[str, int]] = {}
    for row in await _fetch(pool, "SELECT category, model, place FROM rankings"):
        places.setdefault(row["category"], {})[row["model"]] = row["place"]
    categories = await _fetch(pool, "SELECT name FROM categories ORDER BY is_default, name")
    return Roster(
        models={row["model"]: RosterModel(**dict(row)) for row in models},
        places=places,
        categories=tuple(row["name"] for row in categories),
        version=version[0]["last_value"],
    )


async def read_targets(pool: asyncpg.Pool) -> dict[str, tuple[str, int]]:
    """model -> (target, version): the last good targets, which outlive Redis, Airflow and this process."""
    found = await _fetch(pool, "SELECT model, target, version FROM newest_targets")
    return {row["model"]: (row["target"], row["version"]) for row in found}


async def keep_target(pool: asyncpg.Pool, model: str, target: str, version: int) -> None:
    """Keep a target that is in force now, for a restart and for the judge."""
    await _fetch(pool, "SELECT keep_target($1, $2, $3)", model, target, version)


async def report_target_trouble(pool: asyncpg.Pool, model: str, line: str, problem: str) -> None:
    """Say that a model's Variable does not parse; its last good target stays in force."""
    await _fetch(pool, "SELECT report_target_trouble($1, $2, $3)", model, line, problem)


async def report_model_trouble(pool: asyncpg.Pool, model: str, trouble: str | None) -> None:
    """Say why a model gets nothing though it is active; None when it is well again."""
    await _fetch(
        pool, "UPDATE roster SET trouble = $2 WHERE model = $1 AND trouble IS DISTINCT FROM $2", model, trouble
    )


async def hold_solving(pool: asyncpg.Pool, *, held: bool, version: int) -> None:
    """Hold the batch back, or let it go; the older read loses."""
    await _fetch(pool, "SELECT hold_solving($1, $2)", held, version)


async def past_calls(pool: asyncpg.Pool, model: str, seconds: float) -> list[tuple[float, int, bool]]:
    """Every call of the model that may have been sent within the last `seconds`, by Postgres's clock.

    (age in seconds, reserved tokens, still open); each as late as it could have been sent: an open one now.
    """
    found = await _fetch(
        pool,
        "SELECT greatest(0, extract(epoch FROM clock_timestamp() - coalesce(sent_at, finished_at, clock_timestamp())))::float8"
        " AS age, reserved_tokens, outcome IS NULL AS open FROM model_calls"
        " WHERE model = $1 AND outcome IS DISTINCT FROM 'unsent' AND call_id >= call_id_floor(clock_timestamp()"
        " - make_interval(secs => $2) - interval '15 minutes')"
        " AND coalesce(sent_at, finished_at, clock_timestamp()) > clock_timestamp() - make_interval(secs => $2)",
        model, float(seconds),
    )  # fmt: skip
    return [(row["age"], row["reserved_tokens"], row["open"]) for row in found]


async def _fetch(pool: asyncpg.Pool, statement: str, *arguments: Any) -> list[Any]:
    try:
        return list(await pool.fetch(statement, *arguments))
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncio.TimeoutError) as error:
        raise DatabaseError(f"Postgres: {error or type(error).__name__}") from error


def begin_run(connection: Connection, run: str) -> list[dict[str, Any]]:
    """Open a run of solve_tasks; returns one worker's arguments a model. The roster must hold a model."""
    with connection:
        rows(connection, "SELECT begin_run(%s)", (run,))
        models = active_models(connection)
    if not models:
        raise ConfigError("The roster holds no active model. Add one to config/models.yaml and run `router migrate`.")
    return [{"model": model, "run": run, "models": models} for model in models]


def run_report(connection: Connection, run: str) -> dict[str, Any]:
    """What the run did: why it ended, and per model its calls by outcome."""
    with connection:
        about = rows(connection, "SELECT started_at, left_at, reason FROM runs WHERE run = %s", (run,))
        if not about:
            return {"run": run, "reason": "never begun", "models": {}}
        calls = rows(
            connection,
            "SELECT model, coalesce(outcome, 'open') AS outcome, count(*) AS calls FROM model_calls"
            " WHERE call_id >= call_id_floor(%s) AND started_at <= coalesce(%s, clock_timestamp())"
            " GROUP BY 1, 2 ORDER BY 1, 2",
            (about[0]["started_at"], about[0]["left_at"]),
        )
    models: dict[str, dict[str, int]] = {}
    for row in calls:
        models.setdefault(row["model"], {})[row["outcome"]] = row["calls"]
    return {"run": run, "reason": about[0]["reason"], "models": models}
