"""The console shows prompts, answers and error texts to those who may read the task logs of solve_tasks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.airflow
ROOT = Path(__file__).parents[2]
CANARY = "xylophone-7431"
PATHS = ("/tasks/1", "/failures", "/calls", "/status", "/live", "/me")

# The API of the console with permissions as an auth manager of roles gives them, over fixed readings.
SERVE = """
import json, sys
from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity
from fastapi import FastAPI
from fastapi.testclient import TestClient
from console import airflow_links, auth, routes, tasks
from console.live import as_line

canary, paths = sys.argv[1], sys.argv[2].split(",")
call = {"call_id": "0", "task_id": 1, "model": "phi-4", "outcome": "error", "error": f"500 {canary}"}
failure = {"task_id": 1, "category": "general", "failure": f"phi-4: {canary}", "prompt": canary}
task = {**failure, "answer": canary}
models = [{"model": "phi-4", "last_error": canary}]
status = as_line({"tasks": {"unsolved": 3}, "models": models, "error": "slow"})

class Manager:
    logs = True
    def is_authorized_dag(self, *, method, access_entity=None, **_):
        if access_entity is DagAccessEntity.TASK_LOGS:
            return self.logs
        return method == "GET" and access_entity is None
    def is_authorized_variable(self, **_):
        return False

class Live:
    async def newest(self):
        return status
    async def stream(self):
        yield status

class Console:
    live = Live()
    reads = property(lambda self: self)
    async def run(self, read):
        return read(None)

class User:
    def get_name(self):
        return "viewer"

auth.get_auth_manager = Manager
tasks.task_details = lambda *_: {"task": dict(task), "calls": [call], "runs": {}}
tasks.failures = lambda *_: {"failures": [failure]}
tasks.calls = lambda *_: {"calls": [call]}
airflow_links.logs = lambda *_: {}
app = FastAPI()
app.include_router(routes.api, prefix="/api")
app.state.console = Console()
app.dependency_overrides[auth.GetUserDep.__metadata__[0].dependency] = User
found = {}
with TestClient(app) as client:
    for Manager.logs in (True, False):
        found[str(Manager.logs)] = {path: client.get("/api" + path).text for path in paths}
json.dump(found, open(sys.argv[3], "w"))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict[str, Any]]:
    """Answers of every path, with and without permission to read the logs."""
    folder = tmp_path_factory.mktemp("airflow")
    path = os.pathsep.join([str(ROOT / "plugins"), str(ROOT)])
    environment = {**os.environ, "AIRFLOW_HOME": str(folder), "PYTHONPATH": path}
    report = folder / "report.json"
    command = [sys.executable, "-c", SERVE, CANARY, ",".join(PATHS), str(report)]
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    return {True: found["True"], False: found["False"]}


@pytest.mark.parametrize("path", PATHS[:-1])
def test_texts_are_for_who_may_read_the_logs(answers: dict[bool, dict[str, str]], path: str):
    assert CANARY in answers[True][path]
    assert CANARY not in answers[False][path]
    assert "phi-4" in answers[False][path] or "general" in answers[False][path], "the rest is shown"


def test_a_message_of_the_console_itself_stays(answers: dict[bool, dict[str, str]]):
    assert json.loads(answers[False]["/status"])["error"] == "slow"


def test_the_page_is_told(answers: dict[bool, dict[str, str]]):
    assert [json.loads(answers[logs]["/me"])["texts"] for logs in (True, False)] == [True, False]
