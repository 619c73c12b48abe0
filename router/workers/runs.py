"""Runs of the DAG solve_tasks: one opens with a worker per model, and reports its calls when it is over."""

from __future__ import annotations

from typing import Any

from router.database import Connection, rows
from router.errors import ConfigError


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
