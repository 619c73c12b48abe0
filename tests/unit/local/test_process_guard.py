"""The guard ends all processes of a command in every case."""

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

from local.processes import GuardedProcess, ProcessDied, ProcessSpec, start_process, stop_processes

# A process that never ends: it starts a child in another session and writes both process ids.
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
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def family_spec(folder: Path, *, ignored: str = "()", kill_seconds: float = 10) -> ProcessSpec:
    command = [sys.executable, "-c", FAMILY.format(ignored=ignored)]
    return ProcessSpec(
        "family", command, dict(os.environ), folder, kill_seconds=kill_seconds, again_seconds=0.3
    )


def pids(folder: Path) -> list[int]:
    wait_until((folder / "pids").exists)
    return [int(pid) for pid in (folder / "pids").read_text().split()]


def started(folder: Path, **choices: float | str) -> tuple[GuardedProcess, list[int]]:
    process = start_process(family_spec(folder, **choices), folder / "logs")  # type: ignore[arg-type]
    return process, pids(folder)


def test_stopping_ends_the_process_tree(tmp_path: Path) -> None:
    process, family = started(tmp_path)
    assert process.pid == family[0]
    stop_processes([process])
    assert not [pid for pid in family if alive(pid)]
    assert not process.running


def test_a_process_that_ignores_signals_is_killed(tmp_path: Path) -> None:
    process, family = started(tmp_path, ignored="(signal.SIGTERM,)", kill_seconds=1.0)
    started_at = time.monotonic()
    stop_processes([process])
    assert 1 <= time.monotonic() - started_at < 8
    assert not [pid for pid in family if alive(pid)]


def test_the_signal_is_sent_twice(tmp_path: Path) -> None:
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
    process = start_process(
        ProcessSpec("two", command, dict(os.environ), tmp_path, again_seconds=0.3), tmp_path
    )
    wait_until((tmp_path / "pids").exists)
    stop_processes([process])
    assert process.guard.returncode == 7


def test_descendants_of_a_crashed_process_are_ended(tmp_path: Path) -> None:
    process, family = started(tmp_path)
    process.kill()
    assert not [pid for pid in family if alive(pid)]
    assert process.guard.returncode == 128 + signal.SIGKILL


def test_process_died_has_the_exit_status_and_the_end_of_the_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('out of luck'); sys.exit(3)"]
    process = start_process(ProcessSpec("unlucky", command, dict(os.environ)), tmp_path)
    process.guard.wait(20)
    stop_processes([process])
    with pytest.raises(ProcessDied, match=r"unlucky ended by itself \(exit status 3\)(?s:.*)out of luck"):
        raise process.death()


def test_a_command_that_cannot_run_is_logged(tmp_path: Path) -> None:
    process = start_process(ProcessSpec("nothing", ["/nowhere/at-all"], dict(os.environ)), tmp_path)
    assert process.guard.wait(20) == 127
    stop_processes([process])
    assert "cannot run /nowhere/at-all" in process.log_tail()


def test_killing_the_launcher_ends_everything(tmp_path: Path) -> None:
    code = f"""
        import os, sys, time
        from pathlib import Path
        from local.processes import ProcessSpec, start_process
        command = [sys.executable, "-c", open("family.py").read()]
        spec = ProcessSpec("family", command, dict(os.environ), Path({str(tmp_path)!r}))
        process = start_process(spec, Path("logs"))
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


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals a process when its guard dies")
def test_killing_the_guard_ends_the_process(tmp_path: Path) -> None:
    process, family = started(tmp_path)
    assert all(alive(pid) for pid in family)
    process.guard.kill()
    wait_until(lambda: not alive(family[0]))
    process.wait_stopped()
    psutil.Process(family[1]).kill()  # in another session, unknown to any guard


def test_the_guard_lingers_only_if_the_launcher_is_gone(tmp_path: Path) -> None:
    """A database must outlive its clients."""
    spec = ProcessSpec("lingering", ["sleep", "600"], dict(os.environ), linger_seconds=1.0)
    process = start_process(spec, tmp_path)
    wait_until(lambda: bool(psutil.Process(process.guard.pid).children()))
    started_at = time.monotonic()
    assert process.guard.stdin is not None
    process.guard.stdin.close()
    process.guard.wait(20)
    assert time.monotonic() - started_at >= 1
    stop_processes([process])
