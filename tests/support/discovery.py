"""Helpers for tests of the search.

A config folder with a catalog, a backend with simulated conditions, a stand-in for Airflow's Variables, and
the results of a search.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import requests
import yaml

from models_backend.process import BackendServer
from router.database import connect, rows
from router.discovery.search import SearchReport, run_search
from router.models.airflow_api import AirflowApi
from router.models.roster import sync_roster
from router.settings.discovery import load_discovery
from router.settings.environment import Addresses
from router.settings.learning import load_learning
from router.settings.models import DISCOVERED
from router.settings.router import RouterConfig, load_config
from tests.support.queue import without_classification

FIRST, SECOND = "steady-7b", "quiet-7b"  # of the roster
CANDIDATES = ("bright-9b", "dull-9b", "broken-9b", "gone-9b", "par-9b")
CATEGORIES = ("technical", "creative", "general")
ENTRY = {
    "license": "apache-2.0", "parameters": 9, "context": 32768, "input_price": 0.1, "output_price": 0.1,
    "released": "2026-01-01", "scores": {"mmlu-pro": 0.7, "ifeval": 0.8},
}  # fmt: skip


def models_yaml(*names: str, **more: Any) -> dict[str, Any]:
    """Content of models.yaml; the first model is first in every category."""
    ranks = {name: dict.fromkeys(CATEGORIES, place) for place, name in enumerate(names or (FIRST, SECOND), 1)}
    return {
        "models": {
            name: {"target": "60000/min, burst", "ranks": places, "input_price": 0.1, "output_price": 0.1}
            for name, places in ranks.items()
        },
        **more,
    }


def write_config(folder: Path, *entries: dict[str, Any], **trials: Any) -> None:
    """Writes models.yaml, a catalog of `entries`, and a search.yaml that tries them all quickly."""
    (folder / "models.yaml").write_text(yaml.safe_dump(models_yaml()))
    write_catalog(folder, *entries)
    settings = {
        "catalogs": [{"kind": "file", "name": "mock", "path": "catalogue.json"}],
        "criteria": {"candidates": 10, "licenses": ["apache-2.0"], "benchmarks": {"mmlu-pro": 1}},
        "trials": {
            "target": "60000/min, burst",
            "max_concurrency": 10,
            "timeout_seconds": 10,
            "budget_usd": 100,
            **trials,
        },
        "probation": {"target": "60000/min, burst"},
    }
    (folder / "search.yaml").write_text(yaml.safe_dump(settings))


def write_catalog(folder: Path, *entries: dict[str, Any]) -> None:
    """Writes a catalog of these models, with defaults from ENTRY."""
    models = [{**ENTRY, **entry} for entry in entries or ({"name": name} for name in CANDIDATES)]
    (folder / "catalogue.json").write_text(json.dumps(models, default=str))


def references(folder: Path) -> Path:
    """A file with the categories and right answers of the shipped trial prompts, for the stand-in."""
    path = folder / "references.jsonl"
    shipped = Path(__file__).parents[2] / "config" / "trials"
    with path.open("w") as file:
        for category in CATEGORIES:
            for line in (shipped / f"{category}.jsonl").read_text().splitlines():
                file.write(json.dumps({**json.loads(line), "category": category}) + "\n")
    return path


class FakeAirflow(ThreadingHTTPServer):
    """Stand-in for the Variables of Airflow's REST API."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.variables: dict[str, str] = {}
        self.is_down = False
        self.is_masked = False  # as for keys that contain `token`, `secret` and the like

    @property
    def api(self) -> AirflowApi:
        return AirflowApi(f"http://127.0.0.1:{self.server_address[1]}", "router", "secret", timeout_seconds=5)


class _Handler(BaseHTTPRequestHandler):
    server: FakeAirflow

    def log_message(self, *_: Any) -> None:
        pass

    def _do(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        status, value = (503, {}) if self.server.is_down else self._answer(body)
        data = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PATCH = do_DELETE = _do  # noqa: N815 - the base class calls them so

    def _answer(self, body: dict[str, Any]) -> tuple[int, Any]:  # noqa: PLR0911 - one for each verb
        variables, url = self.server.variables, urlsplit(self.path)
        key = unquote(url.path.rpartition("/")[2])
        if url.path == "/auth/token":
            return 201, {"access_token": "t"}
        if self.command == "GET":
            prefix = parse_qs(url.query)["variable_key_pattern"][0].removesuffix("%")
            shown = {k: "***" if self.server.is_masked else v for k, v in sorted(variables.items())}
            found = [{"key": k, "value": v} for k, v in shown.items() if k.startswith(prefix)]
            return 200, {"variables": found, "total_entries": len(found)}
        if self.command == "POST":
            if body["key"] in variables:
                return 409, {"detail": "it is there"}
            variables[body["key"]] = body["value"]
            return 201, body
        if key not in variables:
            return 404, {"detail": "not found"}
        if self.command == "DELETE":
            del variables[key]
            return 204, None
        variables[key] = body["value"]
        return 200, body


@contextmanager
def fake_airflow() -> Iterator[FakeAirflow]:
    """Serves during the block."""
    with FakeAirflow() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@dataclass
class Searching:
    """The services and files of a search, and their state."""

    addresses: Addresses
    folder: Path
    backend: BackendServer
    airflow: FakeAirflow | None = None
    orders: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def config(self) -> RouterConfig:
        return without_classification(load_config(self.folder))

    def sync(self) -> None:
        """Syncs the roster, as every start of the stack does."""
        with connect(self.addresses.database_url) as connection:
            sync_roster(connection, self.config)

    def set_conditions(self, *orders: dict[str, Any], **quality: float) -> None:
        """Sets the quality or other conditions of these models; the others stay unchanged."""
        named = [{"model": name.replace("_", "-"), "quality": share} for name, share in quality.items()]
        self.orders |= {order["model"]: order for order in [*named, *orders]}
        reply = requests.put(f"{self.backend.url}/conditions", json=list(self.orders.values()), timeout=5)
        assert reply.ok, reply.text

    def search(self, *categories: str, **options: Any) -> SearchReport:
        """Searches for these categories, or for `general`."""
        return self.prepared(self.folder, *categories, **options)()

    def prepared(self, folder: Path, *categories: str, **options: Any) -> Callable[[], SearchReport]:
        """The same search, to be started later; it writes its file to `folder`."""
        config = self.config
        return partial(
            run_search, self.addresses, config, load_learning(self.folder, config.categories),
            load_discovery(self.folder, config.categories), folder,
            **{"categories": categories or ("general",), "by": "a test",
               "variables": self.airflow and self.airflow.api, **options},
        )  # fmt: skip

    def query(self, statement: str, *arguments: Any) -> list[dict[str, Any]]:
        with connect(self.addresses.database_url) as connection:
            return rows(connection, statement, arguments)

    def value(self, statement: str, *arguments: Any) -> Any:
        (row,) = self.query(statement, *arguments)
        return next(iter(row.values()))

    def roster(self) -> dict[str, str]:
        """model -> state."""
        return {row["model"]: row["state"] for row in self.query("SELECT model, state FROM roster")}

    def everything(self) -> dict[str, Any]:
        """Everything that a search changes and an undo restores."""
        file = self.folder / DISCOVERED
        return {
            "roster": self.query("SELECT * FROM roster ORDER BY model"),
            "rankings": self.query("SELECT * FROM rankings ORDER BY category, model"),
            "file": file.read_bytes() if file.exists() else None,
            "variables": dict(self.airflow.variables) if self.airflow else None,
        }

    def discovered(self) -> dict[str, Any]:
        """The models of discovered.yaml."""
        found: dict[str, Any] = yaml.safe_load((self.folder / DISCOVERED).read_text())["models"]
        return found

    def calls_of(self, model: str) -> int:
        """The number of logged calls of this model."""
        return int(self.value("SELECT count(*) FROM model_calls WHERE model = %s", model))


def verdicts(report: SearchReport, category: str | None = "general") -> dict[str, str]:
    """model -> verdict."""
    return {f.model: f.verdict for f in report.findings if f.category == category}
