"""The DAG nightly_review in real Airflow: changes with reasons, crashes, and secrets."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import psycopg2
import pytest
import requests
import yaml

from bench.judge import TargetChange
from router.discovery.probation import undo_search
from router.traffic import TrafficTarget
from tests.support.discovery import write_catalog
from tests.support.reviews import Log
from tests.support.stack import FOUND, Solving, crowding, say, wait_for, wait_until

pytestmark = [pytest.mark.airflow, pytest.mark.alone, pytest.mark.timeout(240)]

DAG = "nightly_review"
STEPS = ("grade", "judge", "sum_up", "rank", "search", "probation", "retention", "report")
CATEGORIES = ("technical", "creative", "general")
FIRST = "llama-3.3-70b"  # for general, as shipped
JUDGING_CALLS = 12
TRIAL_TARGET = "20/s"


class NightlyRuns:
    """The DAG on the shared stack, and the call log that it reviews."""

    def __init__(self, solving: Solving) -> None:
        self.solving = solving
        self.api = solving.api
        self.log = Log(solving.stack.database_url)

    def fill(self, calls: int) -> None:
        """Fills yesterday's log: all models are equal, except that the first for general fails.

        It fails today as well, so that calls of other tests on this stack do not look like a recovery.
        """
        models = self.solving.models
        each = calls // (len(models) * len(CATEGORIES))
        for model in models:
            for category in CATEGORIES:
                self.log.add(model, each, category=category, days_ago=1, seconds=80_000)
        self.log.add(FIRST, 4 * each, days_ago=1, seconds=80_000, outcome="error")
        self.log.add(FIRST, 4 * each, seconds=600, outcome="error")
        self.log.query("ANALYZE model_calls")

    def offer(self, model: str) -> None:
        """Writes a catalog that lists one model, with good and fast answers at the backend."""
        folder, solving = self.solving.config_folder, self.solving
        write_catalog(folder, {"name": model})
        settings = {
            "catalogs": [{"kind": "file", "name": "mock", "path": "catalogue.json"}],
            "criteria": {"licenses": ["apache-2.0"], "benchmarks": {"mmlu-pro": 1}},
            "trials": {
                "prompts": 12,
                "target": TRIAL_TARGET,
                "judged": 0,
                "max_concurrency": 8,
                "margin": 0,
                "margin_errors": 0,
                "retry_after_days": 0,
            },
            "probation": {"target": TRIAL_TARGET},
        }
        (folder / "search.yaml").write_text(yaml.safe_dump(settings))
        order = [{"model": model, "quality": 1.0, "latency_factor": 0.5}]
        requests.put(f"{solving.stack.backend_url}/conditions", json=order, timeout=5).raise_for_status()
        solving.changes.append(TargetChange(time.monotonic(), model, TrafficTarget.parse(TRIAL_TARGET)))

    def undo_search(self) -> None:
        undo_search(self.log.url, self.solving.config_folder, by="a test", variables=self.api)
        self.solving.changes.append(TargetChange(time.monotonic(), FOUND, TrafficTarget.parse("0")))

    def begin(self, **params: Any) -> str:
        return self.api.trigger(DAG, params)

    def wait_for_end(self, run: str, seconds: float = 120.0) -> tuple[str, float]:
        """The final state of the run and its duration in seconds, as Airflow reports them."""
        path = f"/dags/{DAG}/dagRuns/{run}"
        ended = ("success", "failed")
        over = wait_for(
            lambda: found if (found := self.api.call("GET", path))["state"] in ended else None,
            seconds, f"the end of {run}",
        )  # fmt: skip
        return over["state"], over["duration"]

    def states(self, run: str) -> dict[str, str]:
        return {entry["task_id"]: entry["state"] for entry in self.api.task_instances(DAG, run)}

    def seconds(self, run: str) -> str:
        """The duration of each step, as text."""
        durations = {entry["task_id"]: entry["duration"] for entry in self.api.task_instances(DAG, run)}
        return ", ".join(f"{step} {durations[step] or 0:.1f} s" for step in STEPS)

    def report(self, run: str) -> dict[str, list[str]]:
        path = f"/dags/{DAG}/dagRuns/{run}/taskInstances/report/xcomEntries/return_value"
        value = self.api.call("GET", path)["value"]
        found: dict[str, list[str]] = json.loads(value) if isinstance(value, str) else value
        return found

    def clear(self, run: str, *tasks: str) -> None:
        """Clears these Airflow tasks and all later ones, as in the UI."""
        body = {
            "dry_run": False, "only_failed": False, "dag_run_id": run, "task_ids": list(tasks),
            "include_downstream": True, "reset_dag_runs": True,
        }  # fmt: skip
        self.api.call("POST", f"/dags/{DAG}/clearTaskInstances", json=body)


@pytest.fixture
def runs(solving: Solving) -> Iterator[NightlyRuns]:
    """The unpaused DAG with a small budget for judging; everything is restored afterwards."""
    files = {name: solving.config_folder / f"{name}.yaml" for name in ("learning", "search")}
    shipped = {name: file.read_text() for name, file in files.items()}
    files["learning"].write_text(shipped["learning"].replace("  calls: 300\n", f"  calls: {JUDGING_CALLS}\n"))
    runs = NightlyRuns(solving)
    runs.api.pause(DAG, paused=False)
    yield runs
    runs.api.pause(DAG)
    for name, file in files.items():
        file.write_text(shipped[name])
    requests.put(f"{solving.stack.backend_url}/conditions", json=[], timeout=5).raise_for_status()
    for statement in (
        (
            "UPDATE rankings SET place = starting_place, standing = 'ranked', quality = NULL,"
            " least_share = 0, most_share = 1, review = NULL"
        ),
        "DELETE FROM review_places", "DELETE FROM reviews", "DELETE FROM evidence",
        "DELETE FROM evidence_periods", "DELETE FROM call_scores", "DELETE FROM judgements",
        "DELETE FROM model_calls WHERE task_id IN (SELECT id FROM tasks WHERE prompt LIKE 'Who painted%%')",
        "DELETE FROM model_calls WHERE task_id IS NULL AND purpose IS NULL",
        "DELETE FROM tasks WHERE prompt LIKE 'Who painted%%'",
    ):  # fmt: skip
        runs.log.query(statement)


def test_a_crashed_run_keeps_the_old_ranking_and_a_completed_run_changes_it(
    runs: NightlyRuns,
) -> None:
    runs.fill(20_000)
    reviews = "SELECT coalesce(max(review), 0) AS newest FROM reviews"
    before, newest, version = runs.log.rankings(), runs.log.value(reviews), runs.log.version()
    with closing(psycopg2.connect(runs.log.url)) as blocker:
        blocker.cursor().execute("LOCK TABLE rankings IN SHARE ROW EXCLUSIVE MODE")
        run = runs.begin(search=False)
        cut = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE query LIKE 'LOCK TABLE rankings%%' AND wait_event_type = 'Lock'"
        )
        wait_until(
            lambda: bool(runs.log.query(cut)), 90, "the connection of rank to be cut in its transaction"
        )
        wait_until(lambda: runs.states(run)["rank"] == "up_for_retry", 30, "rank to be scheduled for a retry")
        runs.api.set_task_state(DAG, run, "rank", "failed")  # without waiting for the retry
    state, _ = runs.wait_for_end(run)
    assert state == "failed"
    states = runs.states(run)
    assert [states[step] for step in STEPS] == [
        "success", "success", "success", "failed", "upstream_failed", "success", "success", "failed",
    ]  # fmt: skip
    assert runs.log.rankings() == before
    assert runs.log.value(reviews) == newest  # the roster's version may grow: workers learn tokens per byte
    report = runs.report(run)
    assert set(report) == set(STEPS) - {"rank", "search", "report"}
    assert "Failed steps: rank, search" in runs.api.task_log(DAG, run, "report")

    began = time.monotonic()
    runs.clear(run, "rank")
    state, _ = runs.wait_for_end(run)
    say(f"cleared; ended after {time.monotonic() - began:.1f} s")
    assert state == "success"
    places = runs.log.places()
    assert places[FIRST] == len(places)  # the others are equal, and the judge may decide their order
    assert runs.log.version() > version
    report = runs.report(run)
    (change,) = [line for line in report["rank"] if line.startswith(f"general: {FIRST} ")]
    assert "below the floor" in change
    assert f"general: {FIRST} 1 -> {len(places)}" in runs.api.task_log(DAG, run, "report", attempt=2)
    assert sum(report["judge"][0].count(word) for word in ("wins", "ties", "losses")) == 3
    judged = runs.log.value(
        "SELECT count(*) FROM model_calls WHERE purpose = 'judge' AND outcome = 'answered'"
    )
    assert 0 < judged <= JUDGING_CALLS

    rankings = runs.log.rankings()
    runs.offer(FOUND)
    run = runs.begin(categories=["creative"])
    state, seconds = runs.wait_for_end(run)
    say(f"again, with 20,000 calls and a search: {seconds:.1f} s; {runs.seconds(run)}")
    assert state == "success"
    report = runs.report(run)
    assert "0 changes" in report["rank"][0]
    assert [{**row, "review": None} for row in runs.log.rankings() if row["model"] != FOUND] == [
        {**row, "review": None} for row in rankings
    ]
    assert any(line.startswith(f"{FOUND}, creative: admitted") for line in report["search"]), report["search"]
    assert runs.api.variables(f"traffic.{FOUND}") == {f"traffic.{FOUND}": TRIAL_TARGET}
    progress = runs.api.task_log(DAG, run, "search")
    assert f"creative: {FOUND}: admitted: better than" in progress
    assert "calling 2 models with the trial prompts of creative" in progress
    assert_no_secrets(runs, run)
    runs.undo_search()
    assert runs.api.variables(f"traffic.{FOUND}") == {}


def test_the_console_starts_follows_and_undoes_a_search(runs: NightlyRuns) -> None:
    runs.offer(FOUND)
    stack = runs.solving.stack
    with requests.Session() as browser:
        browser.trust_env = False
        login = {"username": "admin", "password": stack.passwords["admin"]}
        token = browser.post(f"{stack.airflow_url}/auth/token", json=login, timeout=10).json()
        browser.headers["X-Router-Console"] = "1"

        def call(method: str, path: str, body: Any = None) -> requests.Response:
            url = f"{stack.airflow_url}/router/api/{path}"
            return browser.request(method, url, json=body, timeout=60)

        browser.cookies.set("_token", token["access_token"])
        assert call("POST", "search", {"categories": ["poetry"]}).status_code == 422
        started = call("POST", "search", {"categories": ["creative"]})
        assert started.status_code == 200, started.text
        second = call("POST", "search", {})
        assert second.status_code == 409
        assert f"Search {started.json()['search']}, started" in second.json()["error"]

        def trial() -> dict[str, Any] | None:
            running = call("GET", "search/progress").json()["running"]
            trials = (running or {}).get("progress") or {"trials": []}
            return next((one for one in trials["trials"] if one["model"] == FOUND and one["calls"]), None)

        wait_for(trial, 60, "the first calls of the trial")
        wait_until(
            lambda: call("GET", "search/progress").json()["running"] is None, 90, "the end of the search"
        )
        assert runs.api.variables(f"traffic.{FOUND}") == {f"traffic.{FOUND}": TRIAL_TARGET}
        (admitted,) = call("GET", "search").json()["probation"]
        assert (admitted["model"], admitted["by"]) == (FOUND, "admin")
        undone = call("POST", "search/undo", {"model": FOUND})
        assert undone.json() == {"undone": [{"model": FOUND, "what": "taken", "notes": []}]}
    runs.solving.changes.append(TargetChange(time.monotonic(), FOUND, TrafficTarget.parse("0")))
    assert runs.api.variables(f"traffic.{FOUND}") == {}
    assert runs.log.query("SELECT FROM roster WHERE model = %s", FOUND) == []


def assert_no_secrets(runs: NightlyRuns, run: str) -> None:
    """Checks that neither XComs nor task logs contain an address."""
    texts = [json.dumps(runs.report(run))]
    texts += [runs.api.task_log(DAG, run, step) for step in STEPS]
    for text in texts:
        assert "postgresql://" not in text
        assert "redis://" not in text
    assert len(texts[0]) < 20_000


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_run_on_a_million_calls_takes_at_most_a_minute(runs: NightlyRuns) -> None:
    runs.fill(1_000_000)
    run = runs.begin(search=False)
    state, seconds = runs.wait_for_end(run, 600)
    say(f"a million calls: {seconds:.1f} s; {runs.seconds(run)}")
    assert state == "success"
    assert runs.log.places()[FIRST] == len(runs.log.places())
    assert seconds <= 60 * crowding()
    rankings = runs.log.rankings()
    run = runs.begin(search=False)
    state, seconds = runs.wait_for_end(run, 600)
    say(f"again: {seconds:.1f} s; {runs.seconds(run)}")
    assert "0 changes" in runs.report(run)["rank"][0]
    assert [row["place"] for row in runs.log.rankings()] == [row["place"] for row in rankings]
