"""The search in the model list of a third-party OpenAI-compatible provider, `llmock serve`.

The Models Backend forwards the calls of one of its models to it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import yaml

from local.redis import RedisServer
from models_backend.process import BackendServer, free_port, start_backend
from router.database import connect, rows
from router.settings.environment import Addresses
from tests.support.discovery import (
    FIRST,
    Searching,
    models_yaml,
    references,
    verdicts,
    write_catalog,
    write_config,
)
from tests.support.waiting import until

THEIRS = "llama-3.3-70b-versatile"
KEY = "sk-very-secret-key"


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a provider that echoes prompts."""
    port = free_port()
    program = Path(sys.executable).with_name("llmock")
    with (tmp_path_factory.mktemp("llmock") / "llmock.log").open("wb") as log:
        command = [program, "serve", "--port", str(port), "--response-style", "echo"]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        url = f"http://127.0.0.1:{port}"
        until(lambda: process.poll() is not None or is_up(url))
        yield url
        process.terminate()
        process.wait(10)


def is_up(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=1).ok
    except requests.ConnectionError:
        return False


@pytest.fixture(scope="module")
def backend(provider: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendServer]:
    folder = tmp_path_factory.mktemp("backend")
    (folder / "models.yaml").write_text(yaml.safe_dump(models_yaml()))
    with pytest.MonkeyPatch.context() as environment:
        for name, value in named(provider).items():
            environment.setenv(name, value)
        server = start_backend(
            folder, "--models", str(folder / "models.yaml"), "--time-scale", "2000",
            "--references", str(references(folder)),
        )  # fmt: skip
    yield server
    server.stop()


def named(provider: str) -> dict[str, str]:
    base = f"{provider}/groq/openai/v1"
    return {"LLAMA_API_BASE": base, "LLAMA_API_KEY": KEY, "LLAMA_MODELS": f"{THEIRS}={THEIRS}"}


@pytest.fixture
def world(  # noqa: PLR0917 - fixtures
    database: str,
    redis_server: RedisServer,
    redis_client: object,
    backend: BackendServer,
    provider: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Searching:
    requests.post(f"{provider}/_llmock/reset", timeout=5).raise_for_status()
    for name, value in named(provider).items():
        monkeypatch.setenv(name, value)
    write_config(tmp_path)
    settings = yaml.safe_load((tmp_path / "search.yaml").read_text())
    settings["catalogs"] = [{"kind": "provider", "name": "groq"}]
    unknown = ["license", "parameters", "context", "price", "score", "age"]
    settings["criteria"] = {"candidates": 10, "benchmarks": {}, "may_be_unknown": unknown}
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(settings))
    where = Addresses(database_url=database, redis_url=redis_server.url, backend_url=backend.url)
    world = Searching(where, tmp_path, backend)
    with connect(database) as connection:
        rows(connection, "DELETE FROM roster")
    world.sync()
    world.set_conditions({"model": FIRST, "quality": 0.3})
    return world


def test_a_better_listed_model_is_admitted_and_unserved_ones_are_unreachable(
    world: Searching, provider: str
) -> None:
    report = world.search("creative")
    found = verdicts(report, "creative")
    assert found.pop(THEIRS) == "taken"
    assert found
    assert set(found.values()) == {"unreachable"}
    assert world.discovered()[THEIRS]["history"][0]["why"].endswith("(catalog groq)")
    requests_seen = requests.get(f"{provider}/_llmock/requests", timeout=5).json()["requests"]
    assert {one.get("model") for one in requests_seen if one["path"].endswith("/chat/completions")} == {
        THEIRS
    }


def test_a_refused_key_makes_the_model_unreachable_and_is_not_shown(world: Searching, provider: str) -> None:
    write_catalog(world.folder, {"name": THEIRS})
    settings = yaml.safe_load((world.folder / "search.yaml").read_text())
    settings["catalogs"] = [{"kind": "file", "name": "mock", "path": "catalogue.json"}]
    (world.folder / "search.yaml").write_text(yaml.safe_dump(settings))
    fault = {"behaviors": [{"type": "fail", "status": 401, "message": f"no {KEY}"}] * 40}
    requests.post(f"{provider}/_llmock/scenario", json=fault, timeout=5).raise_for_status()
    report = world.search("creative")
    (finding,) = report.findings
    assert finding.verdict == "unreachable"
    assert "check LLAMA_API_KEY" in finding.reason
    assert KEY not in str(world.query("SELECT * FROM candidates")) + str(report)
    assert THEIRS not in world.roster()
