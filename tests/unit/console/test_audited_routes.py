"""Every route of the console that changes something is authorized as a write and audited."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

PLUGINS = Path(__file__).parents[3] / "plugins"


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Routes for other methods than GET and HEAD."""
    monkeypatch.syspath_prepend(str(PLUGINS))  # as Airflow does
    routes = importlib.import_module("console.routes")
    return [route for route in routes.api.routes if not set(route.methods) <= {"GET", "HEAD"}]


def test_writes_are_audited_and_name_their_user(writes: list[Any]) -> None:
    audited = importlib.import_module("console.audit").AuditedRoute
    auth = importlib.import_module("console.auth")
    assert len(writes) >= 7
    for route in writes:
        assert isinstance(route, audited), route.path
        (authorizes,) = {each.call.__name__ for each in route.dependant.dependencies}
        names = getattr(auth, authorizes).__code__.co_names
        assert "_writer" in names, f"{route.path}: {authorizes} must authorize by auth._writer"
