"""Traffic Variables from the environment and from secrets backends, in Airflow's order."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.airflow
PLUGINS = Path(__file__).parents[2] / "plugins"


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(PLUGINS))
    import traffic_sources  # noqa: PLC0415 - from the plugins folder

    yield traffic_sources
    sys.modules.pop("traffic_sources", None)


class Vault:
    """A secrets backend with counted reads, which may fail."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.reads = 0
        self.is_down = False

    def get_variable(self, key: str) -> str | None:
        self.reads += 1
        if self.is_down:
            raise RuntimeError("token s3cret has expired")
        return self.values.get(key)


def with_vault(monkeypatch: pytest.MonkeyPatch, vault: Vault) -> None:
    from airflow import configuration  # noqa: PLC0415 - takes seconds

    backends = configuration.ensure_secrets_loaded()
    monkeypatch.setattr(configuration, "ensure_secrets_loaded", lambda: [vault, *backends])


def test_the_environment_precedes_the_database(sources: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW_VAR_TRAFFIC.PHI-4", "7/min")
    reader = sources.EarlierSources()
    found = reader.read(["phi-4", "gemma-2-27b"])
    assert {model: entry.line for model, entry in found.items()} == {"phi-4": "7/min"}
    monkeypatch.setenv("AIRFLOW_VAR_TRAFFIC.PHI-4", "9/min")
    assert reader.read(["phi-4"])["phi-4"].line == "9/min"
    monkeypatch.delenv("AIRFLOW_VAR_TRAFFIC.PHI-4")
    assert reader.read(["phi-4"]) == {}


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        ({}, False),
        ({"phi-4": "7/min"}, False),
        ({"phi-4": "48/min"}, True),
    ],
)
def test_an_edit_that_has_no_effect_is_reported(
    sources: Any, monkeypatch: pytest.MonkeyPatch, stored: dict[str, str], said: bool
) -> None:
    monkeypatch.setenv("AIRFLOW_VAR_TRAFFIC.PHI-4", "7/min")
    report = json.loads(sources.sources_report(sources.EarlierSources().read(["phi-4"]), stored))
    assert report[0]["detail"].startswith("environment variable AIRFLOW_VAR_TRAFFIC.PHI-4")
    assert ("is ignored" in report[0]["detail"]) is said


def test_a_secrets_backend_is_read_seldom_and_keeps_its_answer_while_it_fails(
    sources: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    vault = Vault()
    vault.values["traffic.phi-4"] = "3/min"
    with_vault(monkeypatch, vault)
    reader = sources.EarlierSources()
    assert [reader.read(["phi-4"])["phi-4"].line for _ in range(5)] == ["3/min"] * 5
    assert vault.reads == 1
    vault.is_down = True
    monkeypatch.setattr(sources, "BACKEND_SECONDS", 0.0)
    assert reader.read(["phi-4"])["phi-4"].line == "3/min"
    assert "s3cret" not in caplog.text
    assert reader.read(["phi-4"])["phi-4"].source == "secrets backend Vault"
