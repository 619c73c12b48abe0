"""Solves the tasks in Postgres, one deferrable worker a model, for ever."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

from airflow.providers.postgres.hooks.postgres import PostgresHook
from airflow.sdk import dag, task
from model_worker import ModelWorker, WaitForWork

from router.workers import begin_run, run_report

DOC = """
### solve_tasks
Waits until there is an unsolved task, then runs one worker for each model of the roster, deferred in the
triggerer. Each takes one task at a time and sends it at the traffic that `traffic.<model>` allows.

* **Change a model's traffic**: edit its Variable; it holds within a second. `0` stops the model.
* **Stop and go on**: pause and unpause this DAG; sending follows within two seconds, calls in flight finish.
* A run ends, with all its workers at once, when the queue was empty for a while or the roster changed; the
  next one follows within seconds. A worker marked failed rests its model until it is cleared or the next run.
"""


@dag(
    schedule="@continuous",
    # Without one the second run would have the date of the first, and would never be made.
    start_date=datetime(2024, 1, 1, tzinfo=timezone.utc),
    max_active_runs=1,
    catchup=False,
    doc_md=DOC,
    tags=["router"],
)
def solve_tasks() -> None:
    @task(retries=1000, retry_delay=timedelta(seconds=3))
    def assign_models(run_id: str | None = None) -> list[dict[str, Any]]:
        return begin_run(PostgresHook("router_db").get_conn(), str(run_id))

    @task(trigger_rule="all_done", retries=3)
    def report(run_id: str | None = None) -> dict[str, Any]:
        return run_report(PostgresHook("router_db").get_conn(), str(run_id))

    assigned = assign_models()
    workers = ModelWorker.partial(
        task_id="work",
        retries=1_000_000,
        retry_delay=timedelta(seconds=3),
        max_retry_delay=timedelta(seconds=3),
    ).expand(assigned=assigned)
    WaitForWork(task_id="wait_for_work", retries=1000, retry_delay=timedelta(seconds=3)) >> assigned
    workers >> report()


solve_tasks()
