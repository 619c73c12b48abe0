"""Processes that end by themselves start again, with growing delays, and not for ever."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from local import restarts
from local.processes import ProcessDied, ProcessSpec
from local.restarts import MAX_DEATHS, MAX_DELAY_SECONDS, WINDOW_SECONDS, RestartPolicy
from local.stack import Stack


def test_delays_grow_and_end() -> None:
    policy = RestartPolicy()
    delays = [policy.died("one", float(second)) for second in range(MAX_DEATHS)]
    assert delays == [0.0, 1.0, 2.0, 4.0, 8.0, None]
    assert MAX_DELAY_SECONDS == 8.0
    assert policy.died("another", 5.0) == 0.0


def test_deaths_long_ago_do_not_count() -> None:
    policy = RestartPolicy()
    times = [number * (WINDOW_SECONDS / 3 + 1) for number in range(50)]
    assert [policy.died("one", now) for now in times].count(None) == 0


def test_a_killed_process_starts_again_until_it_ended_too_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "MAX_DELAY_SECONDS", 0.0)
    reported: list[str] = []
    stack = Stack(tmp_path, report=lambda name, step: reported.append(f"{name}: {step}"))
    stack._run(ProcessSpec("sleeper", ["sleep", "600"], dict(os.environ)))
    pids: list[int] = []

    def kill_and_supervise() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            process = stack.process("sleeper")
            with suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.guard.pid).children():
                    pids.append(child.pid)
                    child.kill()
            stack.supervise()
            time.sleep(0.02)

    try:
        with pytest.raises(ProcessDied, match=rf"sleeper ended {MAX_DEATHS} times within 120 s and is"):
            kill_and_supervise()
    finally:
        stack.stop()
    assert len(set(pids)) == MAX_DEATHS
    assert reported.count("sleeper: ended by itself (SIGKILL), starts again") == MAX_DEATHS - 1
