"""The DAG ask_prompt without scheduler and triggerer: only Postgres, Redis and the Models Backend are up."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from local.airflow_environment import clean_environment
from local.redis import RedisServer
from models_backend.process import BackendServer, start_backend
from router.database import connect, rows

pytestmark = pytest.mark.airflow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendServer]:
    server = start_backend(tmp_path_factory.mktemp("backend"), "--time-scale", "20", "--latency", "even:2:4")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def airflow_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("airflow")
    run_airflow(home, {}, "db", "migrate")
    return home


@pytest.fixture
def environment(
    database: str, redis_server: RedisServer, redis_client: Any, backend: BackendServer, tmp_path: Path
) -> dict[str, str]:
    return {
        "AIRFLOW_CONN_ROUTER_DB": database,
        "AIRFLOW_CONN_ROUTER_REDIS": redis_server.url,
        "AIRFLOW_CONN_MODELS_BACKEND": backend.url,
        "ROUTER_DATA": str(tmp_path),
    }


def run_airflow(home: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    settings = {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db",
    }
    return subprocess.run(
        [sys.executable, "-m", "airflow", *arguments],
        env={**clean_environment(), **settings, **environment},
        capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip


def task(database_url: str) -> dict[str, Any]:
    with connect(database_url) as connection:
        (found,) = rows(connection, "SELECT * FROM tasks")
    return found


def test_dags_test_answers_a_prompt(airflow_home: Path, environment: dict[str, str]) -> None:
    asked = json.dumps({"prompt": "Explain how a B-tree stays balanced"})
    done = run_airflow(airflow_home, environment, "dags", "test", "ask_prompt", "-c", asked)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    solved = task(environment["AIRFLOW_CONN_ROUTER_DB"])
    assert solved["status"] == "solved"
    assert solved["answer"] in said  # whoever looks into the Airflow task's log reads the answer there
    assert "deepseek-v3 is asked, as the first for this category" in said
    assert '"event": "answered"' in said  # the JSON line


@pytest.mark.soak
def test_tasks_test_answers_the_forms_own_prompt(airflow_home: Path, environment: dict[str, str]) -> None:
    done = run_airflow(airflow_home, environment, "tasks", "test", "ask_prompt", "ask", "2024-01-01")
    assert done.returncode == 0, done.stdout + done.stderr
    assert task(environment["AIRFLOW_CONN_ROUTER_DB"])["prompt"] == "Why is the sky blue?"


def test_a_prompt_that_cannot_be_asked_fails_in_one_try(
    airflow_home: Path, environment: dict[str, str]
) -> None:
    asked = json.dumps({"prompt": "Why?", "category": "poetry"})
    done = run_airflow(airflow_home, environment, "dags", "test", "ask_prompt", "-c", asked)
    assert "There is no category 'poetry'" in done.stdout + done.stderr
    assert "state=failed" in done.stdout + done.stderr
