"""As root, PostgreSQL runs as a user that the first who starts one makes."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from local import postgres


def test_of_many_who_start_at_once_one_makes_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[str]] = []

    def look_up(name: str) -> None:
        if not made:
            raise KeyError(name)

    def run(command: list[str], **_: Any) -> None:
        time.sleep(0.1)  # as long as it takes to see it missing
        made.append(command)

    monkeypatch.setattr(postgres.pwd, "getpwnam", look_up)
    monkeypatch.setattr(postgres.subprocess, "run", run)
    with ThreadPoolExecutor(4) as threads:
        users = {
            started.result() for started in [threads.submit(postgres._unprivileged_user) for _ in range(4)]
        }
    assert users == {postgres.ROOT_USER}
    assert [command[0] for command in made] == ["useradd"]
