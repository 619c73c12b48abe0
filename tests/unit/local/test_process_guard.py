"""The guard: whatever happens to whom, nothing of a part is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from local.processes import Part, PartDied, PartSpec, start_part, stop_parts

# A part that never ends by itself: it starts a child in a session of its own and writes both process ids.
FAMILY = """
import os, signal, subprocess, sys, time
for number in {ignored}:
    signal.signal(number, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
with open("pids.new", "w") as file:
    file.write(f"{{os.getpid()}} {{child.pid}}")
os.rename("pids.new", "pids")
time.sleep(600)
"""


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def family_spec(folder: Path, *, ignored: str = "()", kill_seconds: float = 10) -> PartSpec:
    command = [sys.executable, "-c", FAMILY.format(ignored=ignored)]
    return PartSpec("family", command, dict(os.environ), folder, kill_seconds=kill_seconds, again_seconds=0.3)


def pids(folder: Path) -> list[int]:
    wait_until((folder / "pids").exists)
    return [int(pid) for pid in (folder / "pids").read_text().split()]


def started(folder: Path, **choices: float | str) -> tuple[Part, list[int]]:
    part = start_part(family_spec(folder, **choices), folder / "logs")  # type: ignore[arg-type]
    return part, pids(folder)


def test_stopping_a_part_ends_its_whole_tree(tmp_path: Path) -> None:
    part, family = started(tmp_path)
    assert part.pid == family[0]
    stop_parts([part])
    assert not [pid for pid in family if alive(pid)]
    assert not part.running


def test_a_part_that_ignores_signals_is_killed_at_its_bound(tmp_path: Path) -> None:
    part, family = started(tmp_path, ignored="(signal.SIGTERM,)", kill_seconds=1.0)
    begun = time.monotonic()
    stop_parts([part])
    assert 1 <= time.monotonic() - begun < 8
    assert not [pid for pid in family if alive(pid)]


def test_the_signal_is_sent_once_more_to_a_part_that_wants_two(tmp_path: Path) -> None:
    code = """
        import os, signal, sys, time
        seen = []
        def count(*_):
            seen.append(1)
            if len(seen) == 2:
                sys.exit(7)
        signal.signal(signal.SIGTERM, count)
        open("pids", "w").write(str(os.getpid()))
        while True:
            time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    part = start_part(PartSpec("two", command, dict(os.environ), tmp_path, again_seconds=0.3), tmp_path)
    wait_until((tmp_path / "pids").exists)
    stop_parts([part])
    assert part.guard.returncode == 7


def test_what_a_crashed_part_left_behind_is_ended_too(tmp_path: Path) -> None:
    part, family = started(tmp_path)
    part.kill()
    assert not [pid for pid in family if alive(pid)]
    assert part.guard.returncode == 128 + signal.SIGKILL


def test_a_part_that_died_is_named_with_its_exit_and_the_end_of_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('out of luck'); sys.exit(3)"]
    part = start_part(PartSpec("unlucky", command, dict(os.environ)), tmp_path)
    part.guard.wait(20)
    stop_parts([part])
    with pytest.raises(PartDied, match=r"unlucky ended by itself \(exit status 3\)(?s:.*)out of luck"):
        raise part.death()


def test_a_command_that_cannot_be_run_is_said_in_the_log(tmp_path: Path) -> None:
    part = start_part(PartSpec("nothing", ["/nowhere/at-all"], dict(os.environ)), tmp_path)
    assert part.guard.wait(20) == 127
    stop_parts([part])
    assert "cannot run /nowhere/at-all" in part.log_tail()


def test_a_launcher_that_was_killed_leaves_nothing(tmp_path: Path) -> None:
    code = f"""
        import os, sys, time
        from pathlib import Path
        from local.processes import PartSpec, start_part
        command = [sys.executable, "-c", open("family.py").read()]
        spec = PartSpec("family", command, dict(os.environ), Path({str(tmp_path)!r}))
        part = start_part(spec, Path("logs"))
        time.sleep(600)
    """
    (tmp_path / "family.py").write_text(FAMILY.format(ignored="()"))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    launcher = subprocess.Popen(command, cwd=tmp_path, env=environment)
    family = [*pids(tmp_path), *(child.pid for child in psutil.Process(launcher.pid).children())]
    assert all(alive(pid) for pid in family)
    launcher.kill()
    launcher.wait()
    wait_until(lambda: not [pid for pid in family if alive(pid)])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only the launcher sees a guard die")
def test_a_guard_that_was_killed_takes_its_part_along(tmp_path: Path) -> None:
    part, family = started(tmp_path)
    assert all(alive(pid) for pid in family)
    part.guard.kill()
    wait_until(lambda: not alive(family[0]))
    part.wait_stopped()
    psutil.Process(family[1]).kill()  # in a session of its own, and nobody left to know of it


def test_a_part_gets_a_moment_before_it_is_stopped_when_the_launcher_vanished(tmp_path: Path) -> None:
    """So that a database outlives its clients; a wanted stop does not wait."""
    spec = PartSpec("lingering", ["sleep", "600"], dict(os.environ), linger_seconds=1.0)
    part = start_part(spec, tmp_path)
    wait_until(lambda: bool(psutil.Process(part.guard.pid).children()))
    begun = time.monotonic()
    assert part.guard.stdin is not None
    part.guard.stdin.close()
    part.guard.wait(20)
    assert time.monotonic() - begun >= 1
    stop_parts([part])
