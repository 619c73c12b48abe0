"""One embedded stack per session for tests that need Airflow, with helpers.

Loaded as a plugin by `tests/conftest.py`. The stack's config is a copy of `config/` with shorter leases and
idle times; its backend serves two models that are not on the roster.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psycopg2
import pytest

from bench.judge import Arrival, TargetChange, Verdict, judge
from local.airflow_api import AirflowApi
from local.processes import ProcessDied
from local.stack import Stack
from local.stack_plan import AIRFLOW_PROCESSES, StackOptions
from router.settings.environment import DEFAULT_CONFIG_FOLDER
from router.settings.models import DISCOVERED
from router.settings.router import load_config
from router.traffic import TrafficTarget

T = TypeVar("T")

DAG = "solve_tasks"
NEWCOMER = "llama-4-scout"  # served by the backend, not in any config
FOUND = "llama-found-9b"  # served by the backend, for a search to find
IDLE_LEAVE_SECONDS = 4.0
FLUSH_SECONDS = 0.3  # delay until a finished call is in the arrival log
LEASE_SECONDS = 5.0
HEARTBEAT_SECONDS = 1.0
WORKER_SETTINGS = {
    "idle_leave_seconds": IDLE_LEAVE_SECONDS,
    "lease_seconds": LEASE_SECONDS,
    "heartbeat_seconds": HEARTBEAT_SECONDS,
}
AIRFLOW = {
    "TRIGGERER__JOB_HEARTBEAT_SEC": "1",
    "TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": str(int(LEASE_SECONDS)),
}
# Calls of 0.05 to 1 s, half of them under 0.2 s.
LATENCY = ("--time-scale", "20", "--latency", "lognormal:4:0.6:1:20")


class Edit(NamedTuple):
    """A change of a Variable through Airflow's REST API, in monotonic times."""

    model: str
    line: str
    began: float
    returned: float


@dataclass
class Solving:
    """The stack under test. Times are monotonic seconds, as in the arrival log."""

    stack: Stack
    config_folder: Path
    api: AirflowApi
    database: Any
    changes: list[TargetChange] = field(default_factory=list)
    slowest_edit_seconds: float = 0.0
    _read_to: int = 0
    _arrivals: list[Arrival] = field(default_factory=list)

    @property
    def models(self) -> list[str]:
        """Active models in the order of their workers' map indexes."""
        return [row[0] for row in self.rows("SELECT model FROM roster WHERE state = 'active' ORDER BY model")]

    def rows(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        with self.database.cursor() as cursor:
            cursor.execute(statement, values)
            return [] if cursor.description is None else list(cursor.fetchall())

    def value(self, statement: str, *values: Any) -> Any:
        return self.rows(statement, *values)[0][0]

    # Actions of an operator

    def set_target(self, model: str, line: str) -> Edit:
        began = time.monotonic()
        self.api.set_variable(f"traffic.{model}", line)
        edit = Edit(model, line, began, time.monotonic())
        self.changes.append(TargetChange(began, model, TrafficTarget.parse(line)))
        self.slowest_edit_seconds = max(self.slowest_edit_seconds, edit.returned - began)
        return edit

    def set_targets(self, line: str) -> None:
        """Sets the same target for every model and waits until it is active."""
        target = str(TrafficTarget.parse(line))
        for model in self.models:
            self.set_target(model, line)
        wait_until(lambda: set(self._active_targets()) == {target}, 5, f"{line} applies to all models")

    def _active_targets(self) -> list[str]:
        in_use = "SELECT model FROM roster WHERE state = 'active'"
        return [row[0] for row in self.rows(f"SELECT target FROM newest_targets WHERE model IN ({in_use})")]

    def insert(self, number: int, about: str = "task") -> None:
        """Inserts unsolved tasks with distinct prompts."""
        self.rows(
            "INSERT INTO tasks (prompt) SELECT %s || ' ' || n || ' of ' || clock_timestamp()"
            " FROM generate_series(1, %s) AS n",
            about,
            number,
        )

    def clear(self, task_id: str, map_index: int, run: str) -> None:
        """Clears one Airflow task, as the UI does."""
        body = {"dry_run": False, "only_failed": False, "dag_run_id": run, "task_ids": [[task_id, map_index]]}
        self.api.call("POST", f"/dags/{DAG}/clearTaskInstances", json=body)

    # Observations

    @property
    def arrivals(self) -> list[Arrival]:
        """All calls that ended at the backend, in order of arrival."""
        with self.stack.arrival_log.open("rb") as log:
            log.seek(self._read_to)
            text = log.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read_to += len(whole)
        if whole:
            self._arrivals += [Arrival(**json.loads(line)) for line in whole.splitlines()]
            self._arrivals.sort(key=lambda arrival: arrival.at)
        return self._arrivals

    def arrived(self, since: float, model: str | None = None) -> list[float]:
        """Returns the arrival times after `since`, of one model or all."""
        return [a.at for a in self.arrivals if a.at > since and model in (None, a.model)]

    def unsolved(self) -> int:
        return int(self.value("SELECT count(*) FROM tasks WHERE status = 'unsolved'"))

    def run(self) -> dict[str, Any]:
        """Returns the newest run of solve_tasks."""
        return self.api.runs(DAG, limit=1)[0]

    def airflow_tasks(self, run: str, task_id: str = "work") -> list[dict[str, Any]]:
        """Returns the Airflow tasks of a run with this id, by map index."""
        found = [entry for entry in self.api.task_instances(DAG, run) if entry["task_id"] == task_id]
        return sorted(found, key=lambda entry: int(entry["map_index"]))

    # Waiting

    def until_all_send(self, since: float, seconds: float = 30.0) -> None:
        """Waits until every model was called after `since`."""
        wanted = set(self.models)
        wait_until(
            lambda: wanted <= {a.model for a in self.arrivals if a.at > since}, seconds, "all models at work"
        )

    def until_drained(self, seconds: float) -> None:
        wait_until(lambda: self.unsolved() == 0, seconds, "all tasks solved")
        self.until_quiet()

    def until_quiet(self, seconds: float = 30.0) -> None:
        """Waits until no call is in flight and all are in the arrival log."""
        open_calls = "SELECT count(*) FROM model_calls WHERE outcome IS NULL"
        open_calls += " OR finished_at > clock_timestamp() - make_interval(secs => %s)"
        wait_until(lambda: self.value(open_calls, FLUSH_SECONDS) == 0, seconds, "no call is open")

    def until_run_is_over(self, run: str, seconds: float) -> dict[str, Any]:
        """Waits until a run has ended and returns it."""
        path = f"/dags/{DAG}/dagRuns/{run}"
        return wait_for(lambda: _ended(self.api.call("GET", path)), seconds, f"the end of {run}")

    def stop_backlog(self) -> None:
        """Deletes unsolved tasks and waits for calls in flight."""
        self.rows("DELETE FROM tasks WHERE status = 'unsolved'")
        self.until_quiet()

    def ready(self, line: str = "4/s") -> None:
        """Unpauses the DAG and sets every model's target."""
        self.api.pause(DAG, paused=False)
        self.set_targets(line)

    # Invariants

    def judged(self, since: float | None = None, until: float | None = None) -> Verdict:
        """Checks all arrivals of the session against the targets; measures usage in the given period."""
        return judge(
            self.arrivals,
            self.changes,
            backlog_from=since,
            backlog_until=until,
            settle_seconds=1.0 + self.slowest_edit_seconds,
        )

    def assert_nothing_lost_or_doubled(self) -> None:
        """Checks that every task has one answer from a logged call, and that no call arrived twice."""
        assert self.unsolved() == 0
        assert self.value("SELECT count(*) FROM queue") == 0
        assert self.rows("SELECT id, failure FROM tasks WHERE status <> 'solved'") == []
        wrong_answers = (
            "SELECT t.id FROM tasks t LEFT JOIN model_calls c ON c.task_id = t.id AND c.settlement = 'solved'"
            " GROUP BY t.id HAVING count(c.call_id) <> 1 OR bool_or(c.call_id <> t.answer_call_id)"
        )
        assert self.rows(wrong_answers) == []
        requests = [arrival.request_id for arrival in self.arrivals]
        assert len(requests) == len(set(requests)), "a call arrived twice"
        logged = {str(row[0]) for row in self.rows("SELECT call_id FROM model_calls")}
        assert set(requests) <= logged, "a call arrived that is not in the log"
        answered = "SELECT call_id::text, to_jsonb(c) FROM model_calls c"
        answered += " WHERE outcome = 'answered' AND role IS DISTINCT FROM 'passages'"
        arrived = set(requests)
        missing = [call for call_id, call in self.rows(answered) if call_id not in arrived]
        assert not missing, "an answered call never arrived"


def _ended(run: dict[str, Any]) -> dict[str, Any] | None:
    return run if run["state"] in ("success", "failed") else None


def wait_for(read: Callable[[], T | None], seconds: float, what: str) -> T:
    """Returns the first true result of `read`."""
    deadline = time.monotonic() + seconds
    while not (found := read()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.05)
    return found


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    wait_for(condition, seconds, what)


def crowding() -> float:
    """Returns the load per core, at least 1, by which Airflow's actions take longer."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def say(figures: str) -> None:
    """Prints measurements (shown by `pytest -s`, or if the test fails)."""
    print(figures)  # noqa: T201


def spread(seconds: Sequence[float]) -> str:
    """Formats a distribution as `median 0.2 s, p99 0.7 s, max 0.8 s`."""
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    return f"median {statistics.median(ordered):.2f} s, p99 {p99:.2f} s, max {ordered[-1]:.2f} s"


def config_for_tests(folder: Path) -> Path:
    """Copies `config/` with shorter leases and idle times."""
    shutil.copytree(DEFAULT_CONFIG_FOLDER, folder, ignore=shutil.ignore_patterns(DISCOVERED))
    file = folder / "models.yaml"
    text = file.read_text()
    for key, seconds in WORKER_SETTINGS.items():
        text, number = re.subn(rf"(?m)^  {key}: .*$", f"  {key}: {seconds}", text)
        assert number == 1, f"{file} has no line for {key}"
    file.write_text(text)
    return folder


def start_solving(folder: Path) -> Solving:
    """Starts a stack in `folder`; the caller stops `solving.stack`."""
    config_folder = config_for_tests(folder / "config")
    arguments = (
        "--models",
        str(config_folder / "models.yaml"),
        "--also",
        NEWCOMER,
        "--also",
        FOUND,
        *LATENCY,
    )
    stack = Stack(folder / "stack", StackOptions(backend_arguments=arguments, airflow_settings=AIRFLOW))
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROUTER_CONFIG", str(config_folder))
        stack.start()
    database = psycopg2.connect(stack.database_url)
    database.autocommit = True
    models = load_config(config_folder).models
    changes = [TargetChange(began, name, TrafficTarget.parse(model.target)) for name, model in models.items()]
    return Solving(stack, config_folder, stack.api("admin"), database, changes)


@pytest.fixture(scope="session")
def solving_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Solving]:
    solving = start_solving(tmp_path_factory.mktemp("solving"))
    with closing(solving.database), solving.api:
        yield solving
    for name in AIRFLOW_PROCESSES:  # an orderly stop takes half a minute; `test_stack.py` tests it
        with suppress(ProcessDied):
            solving.stack.process(name).kill()
    solving.stack.stop()


@pytest.fixture
def solving(solving_stack: Solving) -> Iterator[Solving]:
    """The session's stack with an empty queue and every model at 4/s; checks the limits after the test."""
    solving_stack.stack.check()
    solving_stack.ready()
    yield solving_stack
    solving_stack.stop_backlog()
    verdict = solving_stack.judged()
    assert verdict.breach_count == 0, verdict.as_json()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs tests that share the stack last, because it slows down the others."""
    items.sort(key=lambda item: "solving_stack" in getattr(item, "fixturenames", ()))
