"""DAG that processes the task queue with one deferrable worker per model, continuously."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

from airflow.providers.postgres.hooks.postgres import PostgresHook
from airflow.sdk import dag, task
from model_worker import ModelWorker, WaitForWork

from router.workers import begin_run, run_report

DOC = """
### solve_tasks
Waits for unsolved tasks, then runs one worker per active model, deferred in the triggerer. Each worker claims
tasks and sends them within the limits of the Variable `traffic.<model>`.

* **Change a model's traffic**: edit its Variable; it applies within a second. `0` stops the model.
* **Pause**: pause and unpause this DAG; sending follows within two seconds, calls in flight finish.
* A run ends when the queue has been empty for a while or the roster changed; the next one starts within
  seconds. A worker marked failed stops its model until the task is cleared or the next run starts.
"""


@dag(
    schedule="@continuous",
    # Without it the second run would get the date of the first and would not be created.
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
