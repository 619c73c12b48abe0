"""nightly_review in real Airflow: what a night on a log moves and why, and what one that dies leaves."""

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
from tests.support.discovery import write_catalogue
from tests.support.reviews import Log
from tests.support.stack import FOUND, Solving, crowding, say, wait_for, wait_until

pytestmark = [pytest.mark.airflow, pytest.mark.alone, pytest.mark.timeout(240)]

DAG = "nightly_review"
STEPS = ("grade", "judge", "sum_up", "rank", "search", "probation", "retention", "report")
CATEGORIES = ("technical", "creative", "general")
FIRST = "llama-3.3-70b"  # for general, as shipped
JUDGING_CALLS = 12
TRIAL_TARGET = "20/s"


class Nights:
    """The night's DAG on the stack that all share, and the log that it reviews."""

    def __init__(self, solving: Solving) -> None:
        self.solving = solving
        self.api = solving.api
        self.log = Log(solving.stack.database_url)

    def fill(self, calls: int) -> None:
        """Yesterday's log: all models alike everywhere, but for one that fails where it is the first.

        It still does today: what other tests called on this stack must not look like a recovery.
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
        """A catalogue that lists one model, which the backend answers well and at once."""
        folder, solving = self.solving.config_folder, self.solving
        write_catalogue(folder, {"name": model})
        settings = {
            "catalogs": [{"kind": "file", "name": "mock", "path": "catalogue.json"}],
            "criteria": {"licenses": ["apache-2.0"], "benchmarks": {"mmlu-pro": 1}},
            "trials": {"prompts": 12, "judged": 0, "max_concurrency": 8, "margin": 0, "margin_errors": 0},
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

    def until_over(self, run: str, seconds: float = 120.0) -> tuple[str, float]:
        """The state in which the run ended, and how many seconds it took, as Airflow has it."""
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
        """What each step took, for people."""
        told = {entry["task_id"]: entry["duration"] for entry in self.api.task_instances(DAG, run)}
        return ", ".join(f"{step} {told[step] or 0:.1f} s" for step in STEPS)

    def report(self, run: str) -> dict[str, list[str]]:
        path = f"/dags/{DAG}/dagRuns/{run}/taskInstances/report/xcomEntries/return_value"
        value = self.api.call("GET", path)["value"]
        found: dict[str, list[str]] = json.loads(value) if isinstance(value, str) else value
        return found

    def clear(self, run: str, *tasks: str) -> None:
        """Clear these Airflow tasks and all after them, as a person does in the UI."""
        body = {
            "dry_run": False, "only_failed": False, "dag_run_id": run, "task_ids": list(tasks),
            "include_downstream": True, "reset_dag_runs": True,
        }  # fmt: skip
        self.api.call("POST", f"/dags/{DAG}/clearTaskInstances", json=body)


@pytest.fixture
def nights(solving: Solving) -> Iterator[Nights]:
    """The DAG unpaused and a small budget for judging; afterwards all is as it was."""
    files = {name: solving.config_folder / f"{name}.yaml" for name in ("learning", "search")}
    shipped = {name: file.read_text() for name, file in files.items()}
    files["learning"].write_text(shipped["learning"].replace("  calls: 300\n", f"  calls: {JUDGING_CALLS}\n"))
    nights = Nights(solving)
    nights.api.pause(DAG, paused=False)
    yield nights
    nights.api.pause(DAG)
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
        nights.log.query(statement)


def test_a_night_that_dies_leaves_the_old_order_and_one_that_ends_moves_what_it_should(
    nights: Nights,
) -> None:
    nights.fill(20_000)
    before, version = nights.log.rankings(), nights.log.version()
    with closing(psycopg2.connect(nights.log.url)) as blocker:
        blocker.cursor().execute("LOCK TABLE rankings IN SHARE ROW EXCLUSIVE MODE")
        run = nights.begin(search=False)
        cut = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE query LIKE 'LOCK TABLE rankings%%' AND wait_event_type = 'Lock'"
        )
        wait_until(lambda: bool(nights.log.query(cut)), 90, "the ranking is cut off in its transaction")
        wait_until(lambda: nights.states(run)["rank"] == "up_for_retry", 30, "it is to be tried again")
        nights.api.set_task_state(DAG, run, "rank", "failed")  # nobody waits for that
    state, _ = nights.until_over(run)
    assert state == "failed"
    states = nights.states(run)
    assert [states[step] for step in STEPS] == [
        "success", "success", "success", "failed", "upstream_failed", "success", "success", "failed",
    ]  # fmt: skip
    assert nights.log.rankings() == before
    assert nights.log.version() == version
    told = nights.report(run)
    assert set(told) == set(STEPS) - {"rank", "search", "report"}
    assert "did not end well: rank, search" in nights.api.task_log(DAG, run, "report")

    began = time.monotonic()
    nights.clear(run, "rank")
    state, _ = nights.until_over(run)
    say(f"cleared and over after {time.monotonic() - began:.1f} s")
    assert state == "success"
    places = nights.log.places()
    assert places[FIRST] == len(places)  # who follows it a judge's word may decide: the others are alike
    assert nights.log.version() > version  # by which workers hear of it
    told = nights.report(run)
    (moved,) = [line for line in told["rank"] if line.startswith(f"general: {FIRST} ")]
    assert "below the floor" in moved
    assert f"general: {FIRST} 1 -> {len(places)}" in nights.api.task_log(DAG, run, "report", attempt=2)
    assert sum(told["judge"][0].count(word) for word in ("wins", "ties", "losses")) == 3
    judged = nights.log.value(
        "SELECT count(*) FROM model_calls WHERE purpose = 'judge' AND outcome = 'answered'"
    )
    assert 0 < judged <= JUDGING_CALLS

    rankings = nights.log.rankings()
    nights.offer(FOUND)
    run = nights.begin(categories=["creative"])
    state, seconds = nights.until_over(run)
    say(f"again, with 20,000 calls and a search: {seconds:.1f} s; {nights.seconds(run)}")
    assert state == "success"
    told = nights.report(run)
    assert "0 moved" in told["rank"][0]
    assert [{**row, "review": None} for row in nights.log.rankings() if row["model"] != FOUND] == [
        {**row, "review": None} for row in rankings
    ]
    assert any(line.startswith(f"{FOUND}, creative: taken") for line in told["search"]), told["search"]
    assert nights.api.variables(f"traffic.{FOUND}") == {f"traffic.{FOUND}": TRIAL_TARGET}
    assert_no_secrets(nights, run)
    nights.undo_search()
    assert nights.api.variables(f"traffic.{FOUND}") == {}


def assert_no_secrets(nights: Nights, run: str) -> None:
    """Neither what is passed on between Airflow tasks nor their logs hold an address."""
    texts = [json.dumps(nights.report(run))]
    texts += [nights.api.task_log(DAG, run, step) for step in STEPS]
    for text in texts:
        assert "postgresql://" not in text
        assert "redis://" not in text
    assert len(texts[0]) < 20_000


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_night_on_a_million_calls_takes_a_minute_at_most(nights: Nights) -> None:
    nights.fill(1_000_000)
    run = nights.begin(search=False)
    state, seconds = nights.until_over(run, 600)
    say(f"a million calls: {seconds:.1f} s; {nights.seconds(run)}")
    assert state == "success"
    assert nights.log.places()[FIRST] == len(nights.log.places())
    assert seconds <= 60 * crowding()
    rankings = nights.log.rankings()
    run = nights.begin(search=False)
    state, seconds = nights.until_over(run, 600)
    say(f"again: {seconds:.1f} s; {nights.seconds(run)}")
    assert "0 moved" in nights.report(run)["rank"][0]
    assert [row["place"] for row in nights.log.rankings()] == [row["place"] for row in rankings]
