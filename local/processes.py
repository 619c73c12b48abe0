"""Processes of a stack, each run by a guard (see `process_guard.py`) so that none outlives the launcher."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil

GUARD = Path(__file__).with_name("process_guard.py")
LOG_TAIL_LINES = 15
GUARD_MARGIN_SECONDS = 12.0  # the guard's last steps after `kill_seconds`


class ProcessDied(RuntimeError):  # noqa: N818 - an event
    """A process of the stack ended by itself; the text has its name and the end of its log."""


@dataclass(frozen=True)
class ProcessSpec:
    """A command and how to stop it. `linger_seconds` applies if the launcher is gone."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    folder: Path | None = None
    stop_signal: str = "TERM"
    again_seconds: float = 1.0
    kill_seconds: float = 12.0
    linger_seconds: float = 0.0
    identity: tuple[int, int] | None = None  # uid and gid to run as; requires root


@dataclass
class GuardedProcess:
    """A process that runs as child of its guard, which is a child of this process."""

    spec: ProcessSpec
    log: Path
    guard: subprocess.Popen[bytes]
    started: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def running(self) -> bool:
        """Whether the guard, and so the process, runs."""
        return self.guard.poll() is None

    @property
    def pid(self) -> int:
        """Process id of the process, not of its guard. Raises ProcessDied if it has ended."""
        children = []
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(self.guard.pid).children()
        if not children:
            raise self.death()
        return int(min(children, key=lambda child: child.create_time()).pid)

    def death(self) -> ProcessDied:
        """Returns the error for a process that ended by itself."""
        return ProcessDied(f"{self.name} {self.end}. End of its log {self.log}:\n{self.log_tail()}")

    @property
    def end(self) -> str:
        """How the process ended by itself, e.g. `ended by itself (SIGKILL)`."""
        code = self.guard.poll()
        return "is not running" if code is None else f"ended by itself ({_exit_reason(code)})"

    def log_tail(self) -> str:
        """Returns the last lines of the log."""
        try:
            with self.log.open(encoding="utf-8", errors="replace") as lines:
                return "".join("  " + line for line in deque(lines, LOG_TAIL_LINES)).rstrip() or "  (empty)"
        except OSError as error:
            return f"  (cannot be read: {error})"

    def request_stop(self) -> None:
        """Signals the guard and returns immediately."""
        if self.running:
            self.guard.terminate()

    def stop_within(self, seconds: float) -> None:
        """Requests a stop and waits up to `seconds`; the process may still run afterwards."""
        self.request_stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.guard.wait(seconds)

    def wait_stopped(self) -> None:
        """Waits until the guard has ended; kills its process group after its time limit."""
        try:
            self.guard.wait(self.spec.kill_seconds + GUARD_MARGIN_SECONDS)
        except subprocess.TimeoutExpired:
            self._kill_everything()
        self._close()

    def kill(self) -> None:
        """Sends SIGKILL to the process, as in a crash; the guard ends its descendants."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait_stopped()

    def _kill_everything(self) -> None:
        with contextlib.suppress(psutil.Error):
            for process in [*psutil.Process(self.guard.pid).children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    process.kill()
        self.guard.kill()
        self.guard.wait()

    def _close(self) -> None:
        if self.guard.stdin is not None:
            with contextlib.suppress(OSError):
                self.guard.stdin.close()
        if self.guard.returncode == -signal.SIGKILL:
            self._end_group()

    def _end_group(self) -> None:
        # A killed guard leaves its process group. On Linux the kernel has signaled the process already
        # (PR_SET_PDEATHSIG in the guard).
        with contextlib.suppress(ProcessLookupError, PermissionError):
            deadline = time.monotonic() + self.spec.kill_seconds
            os.killpg(self.guard.pid, signal.Signals[f"SIG{self.spec.stop_signal}"])
            while time.monotonic() < deadline:
                os.killpg(self.guard.pid, 0)
                time.sleep(0.1)
            os.killpg(self.guard.pid, signal.SIGKILL)


def start_process(spec: ProcessSpec, logs: Path, guard_fds: Sequence[int] = ()) -> GuardedProcess:
    """Starts a process under a guard; its output is appended to `<logs>/<name>.log`.

    The guard, not the process, inherits the descriptors `guard_fds`, e.g. of a lock file.
    """
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{spec.name}.log"
    command = [
        sys.executable, "-I", str(GUARD), "--signal", spec.stop_signal, "--again", str(spec.again_seconds),
        "--kill", str(spec.kill_seconds), "--linger", str(spec.linger_seconds),
    ]  # fmt: skip
    if spec.identity is not None:
        command += ["--user", f"{spec.identity[0]}:{spec.identity[1]}"]
    if spec.folder is not None:
        command += ["--cwd", str(spec.folder)]
    with open(log, "ab", opener=partial(os.open, mode=0o600)) as output:
        guard = subprocess.Popen(
            [*command, "--", *spec.command],
            env=dict(spec.environment),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            pass_fds=tuple(guard_fds),
            start_new_session=True,  # Ctrl-C in the terminal must reach the launcher only
        )
    return GuardedProcess(spec, log, guard)


def stop_processes(processes: Sequence[GuardedProcess]) -> None:
    """Stops processes in parallel and waits for all of them."""
    for process in processes:
        process.request_stop()
    for process in processes:
        process.wait_stopped()


def _exit_reason(code: int) -> str:
    number = -code if code < 0 else code - 128
    if number > 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(number).name
    return f"exit status {code}"
