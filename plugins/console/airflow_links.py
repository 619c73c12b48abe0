"""From a call to Airflow's log: which Airflow task of which run was the model's worker."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from urllib.parse import quote, urlsplit

from airflow.configuration import conf
from airflow.models.renderedtifields import RenderedTaskInstanceFields
from airflow.utils.session import create_session
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from router.queue import LoggedCall

from .auth import SOLVE_DAG

log = logging.getLogger("router.console")

WORKERS = "work"  # the mapped Airflow task of solve_tasks


def logs(calls: Sequence[LoggedCall], runs: Mapping[str, str]) -> dict[str, str]:
    """call_id -> where Airflow's page shows the log of the worker that made the call, if that is known.

    `runs`: call_id -> run.
    """
    wanted = set(runs.values())
    try:
        indexes = {run: _map_indexes(run) for run in wanted}
    except SQLAlchemyError as error:  # a story without its links is a story still
        log.warning("Airflow's tasks cannot be read: %s", type(error).__name__)
        return {}
    found = {}
    for call in calls:
        run = runs.get(call.call_id)
        index = indexes.get(run or "", {}).get(call.model)
        if run is not None and index is not None:
            found[call.call_id] = (
                f"{_base()}/dags/{SOLVE_DAG}/runs/{quote(run, safe='')}/tasks/{WORKERS}/mapped/{index}"
            )
    return found


def _map_indexes(run: str) -> dict[str, int]:
    """model -> the map index of its worker in this run."""
    fields = RenderedTaskInstanceFields
    statement = select(fields.map_index, fields.rendered_fields).where(
        fields.dag_id == SOLVE_DAG, fields.task_id == WORKERS, fields.run_id == run
    )
    with create_session() as session:
        found = session.execute(statement).all()
    return {
        str(rendered["assigned"]["model"]): index
        for index, rendered in found
        if isinstance(rendered.get("assigned"), dict) and "model" in rendered["assigned"]
    }


def _base() -> str:
    """The path under which Airflow's page is, without a slash at its end."""
    return urlsplit(conf.get("api", "base_url", fallback="")).path.rstrip("/")
