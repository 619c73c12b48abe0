"""Airflow's side of the nightly review: an operator whose task_id names the step, and one that reports.

Each step can be run again, and then changes nothing more. A step says in a few lines what it did; only these
lines go on to the report, never an answer, an address or a password.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from airflow.sdk import BaseOperator, Connection, Variable
from airflow.sdk.definitions.context import Context
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowRuntimeError
from connections import read_addresses

from router.errors import AirflowError, ConfigError, InputError, RouterError, SchemaError
from router.settings import (
    Addresses,
    LearningSettings,
    RouterConfig,
    config_folder,
    load_config,
    load_learning,
)

BY = "nightly_review"
MOST_LINES = 60  # of one step in the report; its own log has them all
LONGEST_LINE = 400
HOPELESS = (ConfigError, InputError, SchemaError)  # another try would bring the same
NOT_IN_A_DRY_RUN = "a dry run: nothing is kept, so this step does nothing"


@dataclass(frozen=True)
class Night:
    """What a step works with. `params` are those of the run's form."""

    addresses: Addresses
    folder: Path
    config: RouterConfig
    learning: LearningSettings
    params: Mapping[str, Any]
    began: datetime  # the same for every try of a step

    @property
    def url(self) -> str:
        return self.addresses.database_url

    @property
    def dry_run(self) -> bool:
        return bool(self.params.get("dry_run"))


# The steps. What they need is imported when they run: this file is read in every process of Airflow.


def grade(night: Night) -> list[str]:
    """Cheap checks of a sample of the answers."""
    from router.learning import grade_answers  # noqa: PLC0415 - see above

    return [f"{grade_answers(night.url, night.learning):,} answers graded by cheap checks"]


def judge(night: Night) -> list[str]:
    """Another model judges some of them, within the night's budget."""
    from router.learning import Judged, judge_answers  # noqa: PLC0415 - see above
    from router.models import DirectCaller  # noqa: PLC0415 - see above

    async def judged() -> Judged:
        async with DirectCaller(night.addresses, night.config) as caller:
            return await judge_answers(caller, night.learning)

    if not night.params.get("judge", True):
        return ["not asked for"]
    said = asyncio.run(judged())
    return [str(said), *said.notes]


def sum_up(night: Night) -> list[str]:
    """The log becomes evidence."""
    from router.learning import sum_evidence  # noqa: PLC0415 - see above

    return [f"{sum_evidence(night.url, night.learning):,} calls summed up"]


def rank(night: Night) -> list[str]:
    """Evidence becomes an order, in force in one transaction; a dry run does all that, and keeps nothing."""
    from router.learning import rank_models, run_review  # noqa: PLC0415 - see above

    if night.dry_run:
        done = run_review(night.url, night.learning, by=BY, dry_run=True)
    else:
        done = rank_models(night.url, night.learning, by=BY)
    name = "dry run" if done.review is None else f"review {done.review}"
    return [f"{name}: {len(done.news)} moved", *map(str, done.news), *done.notes]


def search(night: Night) -> list[str]:
    """Look for better models, try them, take on what wins."""
    from router.discovery import run_search  # noqa: PLC0415 - see above
    from router.settings import load_discovery  # noqa: PLC0415 - see above

    if not night.params.get("search", True):
        return ["not asked for"]
    done = run_search(
        night.addresses, night.config, night.learning, load_discovery(night.folder, night.config.categories),
        night.folder, categories=night.params.get("categories") or None, by=BY, dry_run=night.dry_run,
        variables=AirflowVariables(), since=night.began,
    )  # fmt: skip
    name = "dry run" if done.search is None else f"search {done.search}"
    counts = Counter(finding.verdict for finding in done.findings)
    told = ", ".join(f"{number} {verdict}" for verdict, number in sorted(counts.items()))
    tried = [finding for finding in done.findings if finding.verdict in {"taken", "lost", "unreachable"}]
    return [
        f"{name}: {told or 'nothing found'}",
        *(f"{found.model}, {found.category}: {found.verdict}: {found.reason}" for found in tried),
        *done.notes,
    ]


def probation(night: Night) -> list[str]:
    """Models that the search took are promoted or retired by their log."""
    from router.discovery import review_probation  # noqa: PLC0415 - see above
    from router.settings import load_discovery  # noqa: PLC0415 - see above

    decisions = review_probation(
        night.url, night.folder, night.config, night.learning,
        load_discovery(night.folder, night.config.categories), by=BY, variables=AirflowVariables(),
        dry_run=night.dry_run,
    )  # fmt: skip
    told = [f"{decision.model}: {decision.step.value}: {decision.reason}" for decision in decisions]
    notes = dict.fromkeys(note for decision in decisions for note in decision.notes)
    return [*told, *notes] or ["no model is on probation"]


def retention(night: Night) -> list[str]:
    """Old days of the log go, once they are summed up."""
    from router.learning import drop_old_calls  # noqa: PLC0415 - see above

    done = drop_old_calls(night.url, night.learning, dry_run=night.dry_run)
    return [str(done), *done.days, *(f"kept {kept}" for kept in done.kept)]


STEPS: Mapping[str, Callable[[Night], list[str]]] = {
    step.__name__: step for step in (grade, judge, sum_up, rank, search, probation, retention)
}
WITHOUT_DRY_RUN = frozenset({"grade", "judge", "sum_up"})


class AirflowVariables:
    """`router.publishing.Variables` inside an Airflow task, which needs no address and no password for it."""

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
        raise AirflowError(f"Airflow did not take it: {error}") from error


class NightStep(BaseOperator):
    """Does the step that its task_id names, and says what it did."""

    def execute(self, context: Context) -> list[str]:
        try:
            lines = self._do(_night(dict(context["params"]), context["dag_run"].run_after))
        except HOPELESS as error:
            raise AirflowFailException(str(error)) from None
        except RouterError as error:  # another review runs, Postgres or Redis is away: tried again
            raise AirflowException(str(error)) from None
        for line in lines:
            self.log.info("%s", line)
        return [line[:LONGEST_LINE] for line in lines[:MOST_LINES]]

    def _do(self, night: Night) -> list[str]:
        if night.dry_run and self.task_id in WITHOUT_DRY_RUN:
            return [NOT_IN_A_DRY_RUN]
        return STEPS[self.task_id](night)


class NightReport(BaseOperator):
    """Says what the night did, and fails if one of its steps did."""

    def execute(self, context: Context) -> dict[str, list[str]]:
        instance = context["ti"]
        said = {step: instance.xcom_pull(task_ids=step) for step in STEPS}
        for step, lines in said.items():
            for line in lines if lines is not None else ["did not end well: see its log"]:
                self.log.info("%-10s %s", step, line)
        report = {step: list(lines) for step, lines in said.items() if lines is not None}
        lost = [step for step, lines in said.items() if lines is None]
        if lost:
            instance.xcom_push(key="return_value", value=report)
            words = (
                f"These steps did not end well: {', '.join(lost)}. What they would have put in force is as it"
                " was before. Their logs say why; clear them to run them again."
            )
            self.log.error(words)
            raise AirflowFailException(words)
        return report


def _night(params: Mapping[str, Any], began: datetime) -> Night:
    folder = config_folder()
    config = load_config(folder)
    learning = load_learning(folder, config.categories)
    return Night(read_addresses(Connection.get), folder, config, learning, params, began)
