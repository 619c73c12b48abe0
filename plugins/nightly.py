"""Steps of the nightly review: an operator whose task_id names its step, and one that reports.

Each step is idempotent. It returns a few lines on what it did; only these lines go to the report, never
answers, addresses or passwords.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from airflow.sdk import BaseOperator, Connection, Variable
from airflow.sdk.definitions.context import Context
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowRuntimeError
from connections import read_addresses

from router.database import act_as
from router.errors import AirflowError, ConfigError, InputError, RouterError, SchemaError, printable
from router.settings import (
    Addresses,
    LearningSettings,
    RouterConfig,
    config_folder,
    load_config,
    load_learning,
)

BY = "nightly_review"
MAX_LINES = 60  # of one step in the report; its own log has all of them
MAX_LINE = 400  # characters
PERMANENT = (ConfigError, InputError, SchemaError)  # a retry would fail alike
SKIPPED_IN_DRY_RUN = "skipped in a dry run"
DISABLED = "disabled for this run"


@dataclass(frozen=True)
class NightlyRun:
    """Input of a step. `params` are those of the trigger form."""

    addresses: Addresses
    folder: Path
    config: RouterConfig
    learning: LearningSettings
    params: Mapping[str, Any]
    began: datetime  # the same for every attempt of a step
    log: Callable[[str], None]  # of lines on the progress of a step

    @property
    def url(self) -> str:
        return self.addresses.database_url

    @property
    def dry_run(self) -> bool:
        return bool(self.params.get("dry_run"))


# The steps import what they need when they run: every Airflow process reads this file.


def grade(run: NightlyRun) -> list[str]:
    """Checks a sample of the answers."""
    from router.learning import grade_answers  # noqa: PLC0415 - see above

    return [f"{grade_answers(run.url, run.learning):,} answers graded by cheap checks"]


def judge(run: NightlyRun) -> list[str]:
    """Judges some of these answers with another model, within the budget."""
    from router.learning import Judged, judge_answers  # noqa: PLC0415 - see above
    from router.models import DirectCaller  # noqa: PLC0415 - see above

    async def judged() -> Judged:
        async with DirectCaller(run.addresses, run.config) as caller:
            return await judge_answers(caller, run.learning)

    if not run.params.get("judge", True):
        return [DISABLED]
    done = asyncio.run(judged())
    return [str(done), *done.notes]


def sum_up(run: NightlyRun) -> list[str]:
    """Sums the call log up into evidence."""
    from router.learning import sum_evidence  # noqa: PLC0415 - see above

    return [f"{sum_evidence(run.url, run.learning):,} calls summed up"]


def rank(run: NightlyRun) -> list[str]:
    """Ranks the models and activates the ranking. A dry run does all steps so far and rolls back."""
    from router.learning import rank_models, run_review  # noqa: PLC0415 - see above

    if run.dry_run:
        done = run_review(run.url, run.learning, by=BY, dry_run=True)
    else:
        done = rank_models(run.url, run.learning, by=BY)
    name = "dry run" if done.review is None else f"review {done.review}"
    return [f"{name}: {len(done.changes)} changes", *map(str, done.changes), *done.notes]


def search(run: NightlyRun) -> list[str]:
    """Searches for better models, tries them, and admits winners."""
    from router.discovery import LABELS, SearchProgress, is_unserved, run_search  # noqa: PLC0415 - see above
    from router.settings import load_discovery  # noqa: PLC0415 - see above

    if not run.params.get("search", True):
        return [DISABLED]
    done = run_search(
        run.addresses, run.config, run.learning, load_discovery(run.folder, run.config.categories),
        run.folder, categories=run.params.get("categories") or None, by=BY, dry_run=run.dry_run,
        variables=AirflowVariables(), since=run.began, progress=SearchProgress(run.log),
    )  # fmt: skip
    name = "dry run" if done.search is None else f"search {done.search}"
    counts = Counter(
        "not served" if is_unserved(finding) else LABELS.get(finding.verdict, finding.verdict)
        for finding in done.findings
    )
    summary = ", ".join(f"{number} {verdict}" for verdict, number in sorted(counts.items()))
    tried = [found for found in done.findings if found.verdict in LABELS and not is_unserved(found)]
    return [
        f"{name}: {summary or 'no models found'}",
        *(f"{found.model}, {found.category}: {LABELS[found.verdict]}: {found.reason}" for found in tried),
        *done.notes,
    ]


def probation(run: NightlyRun) -> list[str]:
    """Promotes or retires discovered models by their evidence."""
    from router.discovery import review_probation  # noqa: PLC0415 - see above
    from router.settings import load_discovery  # noqa: PLC0415 - see above

    decisions = review_probation(
        run.url, run.folder, run.config, run.learning, load_discovery(run.folder, run.config.categories),
        by=BY, variables=AirflowVariables(), dry_run=run.dry_run,
    )  # fmt: skip
    lines = [f"{decision.model}: {decision.step.value}: {decision.reason}" for decision in decisions]
    notes = dict.fromkeys(note for decision in decisions for note in decision.notes)
    return [*lines, *notes] or ["no model is on probation"]


def retention(run: NightlyRun) -> list[str]:
    """Drops old days of the call log once they are summed up."""
    from router.learning import drop_old_calls  # noqa: PLC0415 - see above

    done = drop_old_calls(run.url, run.learning, dry_run=run.dry_run)
    return [str(done), *done.days, *(f"kept {kept}" for kept in done.kept)]


STEPS: Mapping[str, Callable[[NightlyRun], list[str]]] = {
    step.__name__: step for step in (grade, judge, sum_up, rank, search, probation, retention)
}
WITHOUT_DRY_RUN = frozenset({"grade", "judge", "sum_up"})


class AirflowVariables:
    """Implements `router.discovery.publishing.Variables` inside an Airflow task, without HTTP."""

    def variables(self, prefix: str = "") -> dict[str, str]:
        with _as_airflow_error():
            return {key: str(Variable.get(key)) for key in Variable.keys(prefix=prefix)}

    def create_variable(self, key: str, value: str, description: str = "") -> bool:
        if key in self.variables(key):
            return False
        self.set_variable(key, value, description)
        return True

    def set_variable(self, key: str, value: str, description: str | None = None) -> None:
        with _as_airflow_error():
            Variable.set(key, value, description=description)

    def delete_variable(self, key: str) -> None:
        if key in self.variables(key):
            with _as_airflow_error():
                Variable.delete(key)


@contextmanager
def _as_airflow_error() -> Iterator[None]:
    try:
        yield
    except AirflowRuntimeError as error:
        raise AirflowError(f"Airflow refused the Variable: {error}") from error


class NightlyStep(BaseOperator):
    """Runs the step that its task_id names, and logs and returns its lines."""

    def execute(self, context: Context) -> list[str]:
        act_as(getattr(context.get("dag_run"), "triggering_user_name", None) or BY, "dag")
        try:
            began = context["dag_run"].run_after
            lines = self._run(_nightly_run(dict(context["params"]), began, partial(self.log.info, "%s")))
        except PERMANENT as error:
            raise AirflowFailException(str(error)) from None
        except (
            RouterError
        ) as error:  # another review is running, or a service is unavailable: Airflow retries
            raise AirflowException(str(error)) from None
        lines = [printable(line) for line in lines]
        for line in lines:
            self.log.info("%s", line)
        return [line[:MAX_LINE] for line in lines[:MAX_LINES]]

    def _run(self, run: NightlyRun) -> list[str]:
        if run.dry_run and self.task_id in WITHOUT_DRY_RUN:
            return [SKIPPED_IN_DRY_RUN]
        return STEPS[self.task_id](run)


class NightlyReport(BaseOperator):
    """Logs the lines of all steps, and fails if a step failed."""

    def execute(self, context: Context) -> dict[str, list[str]]:
        instance = context["ti"]
        of_steps = {step: instance.xcom_pull(task_ids=step) for step in STEPS}
        for step, lines in of_steps.items():
            for line in lines if lines is not None else ["failed; see its log"]:
                self.log.info("%-10s %s", step, line)
        report = {step: list(lines) for step, lines in of_steps.items() if lines is not None}
        failed = [step for step, lines in of_steps.items() if lines is None]
        if failed:
            instance.xcom_push(key="return_value", value=report)
            message = (
                f"Failed steps: {', '.join(failed)}. Nothing of them was activated. Their logs show the"
                " cause; clear them to run them again."
            )
            self.log.error(message)
            raise AirflowFailException(message)
        return report


def _nightly_run(params: Mapping[str, Any], began: datetime, log: Callable[[str], None]) -> NightlyRun:
    folder = config_folder()
    config = load_config(folder)
    learning = load_learning(folder, config.categories)
    return NightlyRun(read_addresses(Connection.get), folder, config, learning, params, began, log)
