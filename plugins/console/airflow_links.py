"""Links from calls to the Airflow logs of the workers that made them."""

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
    """Returns call_id -> path of the worker's log in Airflow, where it is known. `runs`: call_id -> run."""
    try:
        indexes = {run: _map_indexes(run) for run in set(runs.values())}
    except SQLAlchemyError as error:  # the links are optional
        log.warning("console: cannot read Airflow's tasks: %s", type(error).__name__)
        return {}
    links = {}
    for call in calls:
        run = runs.get(call.call_id)
        index = indexes.get(run or "", {}).get(call.model)
        if run is not None and index is not None:
            links[call.call_id] = (
                f"{_base()}/dags/{SOLVE_DAG}/runs/{quote(run, safe='')}/tasks/{WORKERS}/mapped/{index}"
            )
    return links


def _map_indexes(run: str) -> dict[str, int]:
    """Returns model -> map index of its worker in a run."""
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
    """Returns the path of Airflow's base URL, without a trailing slash."""
    return urlsplit(conf.get("api", "base_url", fallback="")).path.rstrip("/")
