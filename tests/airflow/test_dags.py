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
from router_console import RouterConsole, _build
def address(kind, fields):
    usual = {"database_url": "postgres://b/c", "redis_url": "redis://d/0", "backend_url": "http://e"}
    found = {name: Connection(conn_id=name, uri=uri) for name, uri in usual.items()}
    found[kind.replace("backend_token", "backend_url")] = Connection(conn_id=kind, **fields)
    try:
        return getattr(addresses_of(*found.values()), kind)
    except ConfigError as error:
        return str(error)
from router.errors import ConfigError
json.dump({
    "page": RouterConsole.external_views[0]["href"],
    "errors": bag.import_errors, "console": type(_build()).__name__, "tried": tried,
    "addresses": [address(*case) for case in json.loads(sys.argv[3])],
    "seconds": {stat.file: stat.duration.total_seconds() for stat in bag.dagbag_stats},
    "dags": {name: {"doc": dag.doc_md, "tasks": dag.task_ids} for name, dag in bag.dags.items()},
}, open(sys.argv[2], "w"))
"""

DATABASE = {"conn_type": "postgres", "host": "h", "login": "u", "password": "p/@", "schema": "d"}
REDIS = {"conn_type": "redis", "host": "h", "password": "p/@"}
BACKEND = {"conn_type": "http", "host": "h"}
AT = "postgresql://u:p%2F%40@h:5432/d"
# Which address, fields of its Connection, the address or a part of the error.
CONNECTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("database_url", DATABASE, AT),
    ("database_url", {**DATABASE, "port": 5433}, "postgresql://u:p%2F%40@h:5433/d"),
    ("database_url", {**DATABASE, "extra": '{"keepalives_idle": 30}'}, f"{AT}?keepalives_idle=30"),
    ("database_url", {**DATABASE, "extra": '{"keepalives": true}'}, f"{AT}?keepalives=1"),
    ("database_url", {**DATABASE, "extra": '{"sslmode": "require", "cursor": "x"}'}, f"{AT}?sslmode=require"),
    ("database_url", {**DATABASE, "extra": '{"iam": true}'}, "Connection router_db has a parameter 'iam'"),
    (
        "database_url",
        {**DATABASE, "extra": '{"options": {"a": 1}}'},
        "router_db: the extra 'options' must",
    ),
    (
        "database_url",
        {**DATABASE, "extra": '{"channel_binding": "require"}'},
        "router_db: channel_binding",
    ),
    ("database_url", {**DATABASE, "host": "/run/pg"}, "postgresql://u:p%2F%40@%2Frun%2Fpg:5432/d"),
    ("database_url", {**DATABASE, "host": "::1"}, "postgresql://u:p%2F%40@[::1]:5432/d"),
    ("database_url", {**DATABASE, "host": "a,b"}, "postgresql://u:p%2F%40@a:5432,b:5432/d"),
    ("database_url", {"uri": "postgresql://u:p%2F%40@h/d?connect_timeout=5"}, f"{AT}?connect_timeout=5"),
    ("redis_url", REDIS, "redis://:p%2F%40@h:6379/0"),
    ("redis_url", {**REDIS, "extra": '{"db": 0}'}, "redis://:p%2F%40@h:6379/0"),
    ("redis_url", {**REDIS, "extra": '{"db": 7}', "login": "u"}, "redis://u:p%2F%40@h:6379/7"),
    ("redis_url", {**REDIS, "extra": '{"ssl": true, "db": "2"}'}, "rediss://:p%2F%40@h:6379/2"),
    (
        "redis_url",
        {**REDIS, "extra": '{"ssl": true, "ssl_cert_reqs": "none", "ssl_check_hostname": false}'},
        "rediss://:p%2F%40@h:6379/0?ssl_cert_reqs=none&ssl_check_hostname=false",
    ),
    ("redis_url", {**REDIS, "extra": '{"decode_responses": true}'}, "router_redis has a parameter 'decode"),
    ("redis_url", {**REDIS, "extra": '{"db": "x"}'}, "Connection router_redis: db must be a whole number"),
    ("redis_url", {"uri": "rediss://:p%2F%40@h:6380/3"}, "rediss://:p%2F%40@h:6380/3"),
    ("redis_url", {"uri": "valkey://h/1"}, "redis://h:6379/1"),
    ("redis_url", {**REDIS, "host": "/tmp/redis.sock", "password": None}, "unix:///tmp/redis.sock?db=0"),
    ("backend_url", {"uri": "https://a"}, "https://a"),
    ("backend_url", {"uri": "https://a:8443"}, "https://a:8443"),
    ("backend_url", {"uri": "http://a:80"}, "http://a:80"),
    ("backend_url", {"uri": "http://a/api"}, "http://a/api"),
    ("backend_url", {"uri": "http://a/api/v1/"}, "http://a/api/v1"),
    ("backend_url", {**BACKEND, "schema": "https", "port": 443}, "https://h:443"),
    ("backend_url", {**BACKEND, "host": "https://h/base/"}, "https://h/base"),
    ("backend_url", {**BACKEND, "host": "http://h:81", "schema": "http"}, "http://h:81"),
    ("backend_url", {**BACKEND, "host": "::1", "port": 8100}, "http://[::1]:8100"),
    ("backend_url", {**BACKEND, "host": "[fe80::1]"}, "http://[fe80::1]"),
    ("backend_url", {**BACKEND, "login": "u"}, "Connection models_backend has login."),
    ("backend_token", {**BACKEND, "password": "t0ken"}, "t0ken"),
    ("backend_token", {**BACKEND, "password": "p q"}, "MODELS_BACKEND_TOKEN must be printable ASCII"),
    ("backend_url", {**BACKEND, "extra": '{"Authorization": "p/@"}'}, "models_backend has Authorization."),
]


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
        "AIRFLOW__API__BASE_URL": "https://host/some/airflow/",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": "postgresql+psycopg2://nobody@127.0.0.1:1/none",
    }
    found = folder / "found.json"
    cases = json.dumps([case[:2] for case in CONNECTIONS])
    subprocess.run(
        [sys.executable, "-c", PARSE, str(ROOT / "dags"), str(found), cases],
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


def test_addresses_in_connections(parsed: dict[str, Any]) -> None:
    for (kind, fields, expected), found in zip(CONNECTIONS, parsed["addresses"], strict=True):
        if expected.partition(":")[0] in {"postgresql", "redis", "rediss", "unix", "http", "https"}:
            assert found == expected, (kind, fields)
        else:
            assert expected in found, (kind, fields)
            assert "p/@" not in found


def test_the_console_is_below_the_path_of_airflow(parsed: dict[str, Any]) -> None:
    assert parsed["page"] == "/some/airflow/router/page"


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
