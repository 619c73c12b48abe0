"""Runs of the DAG `solve_tasks`: opened with one worker per model, and reported when they end."""

from __future__ import annotations

from typing import Any

from router.database import rows
from router.errors import ConfigError


def begin_run(connection: Any, run: str) -> list[dict[str, Any]]:
    """Opens a run; returns the arguments of one worker per model. Raises ConfigError if no model is active.

    `connection` is any DB-API connection of psycopg2; Airflow's hook wraps its own in another type.
    """
    with connection:
        rows(connection, "SELECT begin_run(%s)", (run,))
        in_use = rows(connection, "SELECT model FROM roster_in_use ORDER BY model")
    models = [row["model"] for row in in_use]
    if not models:
        raise ConfigError("No model is active. Add one to config/models.yaml and run `router models sync`.")
    return [{"model": model, "run": run, "models": models} for model in models]


def run_report(connection: Any, run: str) -> dict[str, Any]:
    """Returns why the run ended and, per model, its calls by outcome."""
    with connection:
        about = rows(connection, "SELECT reason FROM runs WHERE run = %s", (run,))
        models: dict[str, dict[str, int]] = {}
        for row in rows(connection, "SELECT * FROM run_calls(%s)", (run,)):
            models.setdefault(row["model"], {})[row["outcome"]] = row["calls"]
    return {"run": run, "reason": about[0]["reason"] if about else "never begun", "models": models}
