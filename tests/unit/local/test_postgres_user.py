"""As root, PostgreSQL runs as a user that is created once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from local import postgres


def test_concurrent_starts_create_the_user_once(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def look_up(name: str) -> None:
        if not commands:
            raise KeyError(name)

    def run(command: list[str], **_: Any) -> None:
        time.sleep(0.1)  # long enough for others to find the user missing
        commands.append(command)

    monkeypatch.setattr(postgres.pwd, "getpwnam", look_up)
    monkeypatch.setattr(postgres.subprocess, "run", run)
    with ThreadPoolExecutor(4) as threads:
        users = {
            started.result() for started in [threads.submit(postgres._unprivileged_user) for _ in range(4)]
        }
    assert users == {postgres.ROOT_USER}
    assert [command[0] for command in commands] == ["useradd"]
