"""`make demo` from nothing: prompts are solved within their limits, and a report is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from local.demo import command_started
from router.settings import load_config

pytestmark = [pytest.mark.airflow, pytest.mark.timeout(400)]
ROOT = Path(__file__).parents[2]
TASKS = 40


def test_a_demo_solves_its_tasks_and_says_how(tmp_path: Path) -> None:
    report_file = tmp_path / "report.json"
    command = [
        *(sys.executable, "-m", "local", "demo", "--data", str(tmp_path / "data"), "--time-scale", "60"),
        *("--tasks", str(TASKS), "--exit", "--json", str(report_file), "--timeout", "240"),
    ]
    began = time.time() - 30
    environment = {**os.environ, "ROUTER_DEMO_STARTED_AT": str(began)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(report_file.read_text())
    assert set(report) == {
        *("tasks", "solved", "failed", "seconds", "seconds_to_first_answer", "bound_seconds", "models")
    }
    assert report["tasks"] == TASKS
    assert report["solved"] + report["failed"] == TASKS
    assert report["solved"] >= TASKS - 4  # the stand-in gives bad answers now and then
    assert 0 < report["bound_seconds"] <= report["seconds"]
    assert report["seconds_to_first_answer"] > 30  # set-up before Python counts
    assert set(report["models"]) == set(load_config().models)
    for model in report["models"].values():
        assert set(model) == {"target", "sent", "worst_window_ratio", "use"}
        assert model["worst_window_ratio"] <= 1
    assert sum(model["sent"] for model in report["models"].values()) >= report["solved"]


def test_the_demo_counts_from_the_command() -> None:
    assert command_started({"ROUTER_DEMO_STARTED_AT": "1700000000"}) == 1_700_000_000
    assert command_started({}) == psutil.Process().create_time()
