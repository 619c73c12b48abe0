"""The DAG files parse fast, without errors and without connections."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.stack import say

pytestmark = pytest.mark.airflow
ROOT = Path(__file__).parents[2]
DAG_FILES = sorted((ROOT / "dags").glob("*.py"))
MAX_LINES = 60
PARSE_SECONDS = 1.0

PARSE = """
import json, socket, sys
tried = []
def refuse(*arguments, **_):
    tried.append(repr(arguments))
    raise OSError("a DAG file must not connect while it is parsed")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
import psycopg2
psycopg2.connect = refuse
from airflow.dag_processing.dagbag import DagBag
DagBag(sys.argv[1])  # a DAG processor has imported everything, too, once it has loaded the plugins
bag = DagBag(sys.argv[1])
from airflow.models.connection import Connection
from connections import addresses_of
from router_console import _build
urls = ["https://a", "https://a:8443", "http://a:80", "http://a/api"]
connections = [Connection(uri=url) for url in urls]
connections.append(Connection(conn_type="http", host="a", schema="https", port=443))
database, redis = Connection(uri="postgres://b/c"), Connection(uri="redis://d/0")
json.dump({
    "errors": bag.import_errors, "console": type(_build()).__name__,
    "backends": [addresses_of(database, redis, found).backend_url for found in connections], "tried": tried,
    "seconds": {stat.file: stat.duration.total_seconds() for stat in bag.dagbag_stats},
    "dags": {name: {"doc": dag.doc_md, "tasks": dag.task_ids} for name, dag in bag.dags.items()},
}, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def parsed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Airflow's view of dags/ without a database; its plugins are links."""
    folder = tmp_path_factory.mktemp("parse")
    (folder / "plugins").mkdir()
    for plugin in (ROOT / "plugins").glob("*.py"):
        (folder / "plugins" / plugin.name).symlink_to(plugin)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW_")}
    environment |= {
        "AIRFLOW_HOME": str(folder),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(folder / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": "postgresql+psycopg2://nobody@127.0.0.1:1/none",
    }
    found = folder / "found.json"
    subprocess.run(
        [sys.executable, "-c", PARSE, str(ROOT / "dags"), str(found)],
        env=environment, check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    answer: dict[str, Any] = json.loads(found.read_text())
    return answer


def test_every_dag_file_parses(parsed: dict[str, Any]) -> None:
    assert parsed["errors"] == {}
    assert {Path(file).name for file in parsed["seconds"]} == {file.name for file in DAG_FILES}
    assert set(parsed["dags"]) == {file.stem for file in DAG_FILES}


def test_parsing_opens_no_connection(parsed: dict[str, Any]) -> None:
    assert parsed["tried"] == []


def test_parsing_is_fast(parsed: dict[str, Any]) -> None:
    say(f"parsed in {parsed['seconds']} s")
    assert max(parsed["seconds"].values()) < PARSE_SECONDS


def test_the_scheme_of_the_models_backend(
    parsed: dict[str, Any],
) -> None:
    assert parsed["backends"] == ["https://a", "https://a:8443", "http://a:80", "http://a", "https://a:443"]


def test_the_console_loads_through_a_linked_plugin(parsed: dict[str, Any]) -> None:
    assert parsed["console"] == "Console"


def test_every_dag_has_documentation(parsed: dict[str, Any]) -> None:
    for name, dag in parsed["dags"].items():
        assert dag["doc"], f"{name} has no doc_md"


def test_tasks_of_solve_tasks(parsed: dict[str, Any]) -> None:
    assert set(parsed["dags"]["solve_tasks"]["tasks"]) == {"wait_for_work", "assign_models", "work", "report"}


@pytest.mark.parametrize("file", DAG_FILES, ids=lambda file: file.name)
def test_a_dag_file_is_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) < MAX_LINES
