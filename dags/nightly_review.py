"""Lets the log teach, and looks for better models, once a night."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import CronTriggerTimetable, Param, chain, dag
from nightly import NightReport, NightStep

DOC = """
### nightly_review
Every night at 02:30 UTC, or now by **Trigger**: grades a sample of the answers, has another model judge
some, sums the log up, orders the models anew, searches for better ones, decides about those on probation,
drops old days of the log, and says in the log of `report` what moved and why.

* Workers hear of a new order within a second; nothing is restarted. `router ranking undo` sets it back.
* Every step can be cleared and run again. A run that dies leaves the old order in force.
* `config/learning.yaml` and `config/search.yaml` hold the settings, also what a night may cost.
"""
WHATEVER = "all_done"  # the step is done also where one before it failed
FORM = {
    "dry_run": ("Dry run", False, "Show what would move; keep nothing."),
    "judge": ("Judge", True, "Have a sample of the answers judged by models."),
    "search": ("Search", True, "Look for better models, and try them."),
}
CATEGORIES = Param(
    None, type=["null", "array"], items={"type": "string"}, title="Categories", description="Of the search."
)


@dag(
    # Unpaused for the first time it makes up for no night; later Airflow runs the last one that was missed.
    schedule=CronTriggerTimetable("30 2 * * *", timezone="UTC", run_immediately=timedelta(0)),
    catchup=False,
    max_active_runs=1,
    dagrun_timeout=timedelta(hours=12),
    default_args={"retries": 3, "retry_delay": timedelta(minutes=1), "execution_timeout": timedelta(hours=2)},
    doc_md=DOC,
    tags=["router"],
    params={
        **{key: Param(on, type="boolean", title=title, description=words)
           for key, (title, on, words) in FORM.items()},
        "categories": CATEGORIES,
    },
)  # fmt: skip
def nightly_review() -> None:
    chain(
        NightStep(task_id="grade"),
        NightStep(task_id="judge"),
        NightStep(task_id="sum_up", trigger_rule=WHATEVER),
        NightStep(task_id="rank"),
        NightStep(task_id="search"),
        NightStep(task_id="probation", trigger_rule=WHATEVER),
        NightStep(task_id="retention", trigger_rule=WHATEVER),
        NightReport(task_id="report", trigger_rule=WHATEVER, retries=0),
    )


nightly_review()
