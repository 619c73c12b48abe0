"""Reviews the call log and searches for better models every night."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import CronTriggerTimetable, Param, chain, dag
from nightly import NightlyReport, NightlyStep

DOC = """
### nightly_review
Runs every night at 02:30 UTC, or now by **Trigger**. Grades a sample of the answers, judges some of them with
another model, sums up the call log, ranks the models, searches for better ones, promotes or retires those on
probation, and drops old days of the log. The log of `report` shows all changes with reasons.

* Workers apply a new ranking within a second, without a restart. `router ranking undo` undoes it.
* Every step can be cleared and run again. After a crash the previous ranking stays active.
* Settings and budgets are in `config/learning.yaml` and `config/search.yaml`.
"""
ALL_DONE = "all_done"  # trigger rule of steps that also run after a failed step
FORM = {
    "dry_run": ("Dry run", False, "Show what would change; store nothing."),
    "judge": ("Judge", True, "Judge a sample of the answers with other models."),
    "search": ("Search", True, "Search for better models and try them."),
}
CATEGORIES = Param(
    None, type=["null", "array"], items={"type": "string"}, title="Categories", description="Of the search."
)


@dag(
    # No run is made up for when it is first unpaused; after later pauses Airflow runs the last missed one.
    schedule=CronTriggerTimetable("30 2 * * *", timezone="UTC", run_immediately=timedelta(0)),
    catchup=False,
    max_active_runs=1,
    dagrun_timeout=timedelta(hours=12),
    default_args={"retries": 3, "retry_delay": timedelta(minutes=1), "execution_timeout": timedelta(hours=2)},
    doc_md=DOC,
    tags=["router"],
    params={
        **{key: Param(on, type="boolean", title=title, description=description)
           for key, (title, on, description) in FORM.items()},
        "categories": CATEGORIES,
    },
)  # fmt: skip
def nightly_review() -> None:
    chain(
        NightlyStep(task_id="grade"),
        NightlyStep(task_id="judge"),
        NightlyStep(task_id="sum_up", trigger_rule=ALL_DONE),
        NightlyStep(task_id="rank"),
        NightlyStep(task_id="search"),
        NightlyStep(task_id="probation", trigger_rule=ALL_DONE),
        NightlyStep(task_id="retention", trigger_rule=ALL_DONE),
        NightlyReport(task_id="report", trigger_rule=ALL_DONE, retries=0),
    )


nightly_review()
