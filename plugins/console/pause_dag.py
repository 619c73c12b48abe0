"""Pauses and resumes a DAG as Airflow's own switch does, with the same audit log entry."""

from __future__ import annotations

import json

from airflow.models.dag import DagModel
from airflow.models.log import Log
from airflow.utils.session import create_session

from router.errors import InputError


def set_paused(dag_id: str, user: str, *, paused: bool) -> None:
    """Sets the DAG's switch. Raises InputError if Airflow has not read the DAG yet."""
    with create_session() as session:
        dag = session.get(DagModel, dag_id)
        if dag is None:
            raise InputError(f"Airflow has no DAG {dag_id}. Check the dag-processor.")
        dag.is_paused = paused
        extra = json.dumps({"is_paused": paused, "from": "router console"})
        session.add(Log(event="patch_dag", dag_id=dag_id, owner=user, owner_display_name=user, extra=extra))
