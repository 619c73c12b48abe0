"""The DAG ask_prompt: without scheduler and triggerer, in an Airflow that `local.first_start` prepared; and
an invalid request in a running Airflow.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from local import first_start
from local.airflow_environment import clean_environment
from local.postgres import PostgresServer
from local.redis import RedisServer
from models_backend.process import BackendServer, start_backend
from router.database import connect, rows
from router.settings.router import load_config
from router.traffic import GRAMMAR
from tests.support.stack import Solving, wait_until

pytestmark = pytest.mark.airflow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendServer]:
    server = start_backend(tmp_path_factory.mktemp("backend"), "--time-scale", "20", "--latency", "even:2:4")
    yield server
    server.stop()


@dataclass(frozen=True)
class Deployment:
    """An Airflow whose processes are not started: its folder, database and passwords."""

    home: Path
    database_url: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            **clean_environment(),
            "AIRFLOW_HOME": str(self.home),
            "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
            "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "plugins"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": self.database_url.replace(
                "postgresql", "postgresql+psycopg2", 1
            ),
            first_start.PASSWORDS_FILE: str(self.home / "passwords.json"),
        }


@pytest.fixture(scope="module")
def deployment(postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    made = Deployment(tmp_path_factory.mktemp("airflow"), postgres.create_database(f"airflow_{os.getpid()}"))
    needed = {
        "ROUTER_DATABASE_URL": postgres.create_database(f"router_{os.getpid()}"),
        "ROUTER_REDIS_URL": "redis://127.0.0.1:1/0",
        "MODELS_BACKEND_URL": "http://127.0.0.1:1",
        **{name: f"password of {user}" for user, name in first_start.PASSWORDS.items()},
    }
    command = [sys.executable, "-m", "local.first_start"]
    subprocess.run(command, cwd=ROOT, env={**made.environment, **needed}, check=True, capture_output=True)
    return made


@pytest.fixture
def environment(
    database: str, redis_server: RedisServer, redis_client: Any, backend: BackendServer, trained_data: Path
) -> dict[str, str]:
    return {
        "AIRFLOW_CONN_ROUTER_DB": database,
        "AIRFLOW_CONN_ROUTER_REDIS": redis_server.url,
        "AIRFLOW_CONN_MODELS_BACKEND": backend.url,
        "ROUTER_DATA": str(trained_data),
    }


def run_airflow(
    deployment: Deployment, environment: dict[str, str], *arguments: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "airflow", *arguments],
        env={**deployment.environment, **environment},
        capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip


def task(database_url: str) -> dict[str, Any]:
    with connect(database_url) as connection:
        (found,) = rows(connection, "SELECT * FROM tasks")
    return found


def test_first_start_creates_variables_and_passwords(deployment: Deployment) -> None:
    with connect(deployment.database_url) as connection:
        made = {row["key"]: row["description"] for row in rows(connection, "SELECT * FROM variable")}
    assert set(made) == {f"traffic.{name}" for name in load_config().models}
    assert all(GRAMMAR in description for description in made.values())
    assert json.loads((deployment.home / "passwords.json").read_text())["admin"] == "password of admin"


def test_dags_test_answers_a_prompt(deployment: Deployment, environment: dict[str, str]) -> None:
    asked = json.dumps({"prompt": "Explain how a B-tree stays balanced"})
    done = run_airflow(deployment, environment, "dags", "test", "ask_prompt", "-c", asked)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    solved = task(environment["AIRFLOW_CONN_ROUTER_DB"])
    assert solved["status"] == "solved"
    assert solved["client"] == "dag_test"  # Airflow's name of the user in `dags test`
    assert solved["answer"] in output  # the log of the Airflow task shows the answer
    assert "calling deepseek-v3 (preferred model)" in output
    assert '"event": "answered"' in output  # the JSON line


@pytest.mark.soak
def test_tasks_test_answers_the_default_prompt(deployment: Deployment, environment: dict[str, str]) -> None:
    done = run_airflow(deployment, environment, "tasks", "test", "ask_prompt", "ask", "2024-01-01")
    assert done.returncode == 0, done.stdout + done.stderr
    assert task(environment["AIRFLOW_CONN_ROUTER_DB"])["prompt"] == "Why is the sky blue?"


@pytest.mark.alone  # it uses the shared stack
def test_an_invalid_request_fails_without_retry(solving: Solving) -> None:
    solving.api.pause("ask_prompt", paused=False)
    run = solving.api.trigger("ask_prompt", {"prompt": "Why is it secret?", "category": "poetry"})

    def ended() -> bool:
        (ask,) = solving.api.task_instances("ask_prompt", run)
        return (ask["state"], ask["try_number"]) == ("failed", 1)

    wait_until(ended, 30, "it failed on the first try")
    log = solving.api.call("GET", f"/dags/ask_prompt/dagRuns/{run}/taskInstances/ask/logs/1")
    assert "There is no category 'poetry'" in json.dumps(log)  # in the exception of the log line
    audit = {"event": "trigger_dag_run", "order_by": "-event_log_id", "limit": 1}
    (entry,) = solving.api.call("GET", "/eventLogs", params=audit)["event_logs"]
    assert "poetry" in entry["extra"], "Airflow's audit log has the parameters"
    assert "secret" not in entry["extra"], "without the prompt"


def test_a_prompt_that_no_model_answers_fails_the_airflow_task(
    deployment: Deployment, environment: dict[str, str], backend: BackendServer
) -> None:
    order = {"kind": "error", "model": "*", "share": 1, "seconds": 600}
    requests.post(f"{backend.url}/faults", json=order, timeout=5).raise_for_status()
    asked = json.dumps({"prompt": "qqqq zzzz?", "category": "general"})
    done = run_airflow(deployment, environment, "dags", "test", "ask_prompt", "-c", asked)
    requests.delete(f"{backend.url}/faults", timeout=5).raise_for_status()
    output = done.stdout + done.stderr
    assert "No model answered, and no relevant passages were found." in output
    assert "state=failed" in output
