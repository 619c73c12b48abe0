"""The parts of a stack as guarded processes: started, watched, stopped, and never left behind."""

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
GUARD_MARGIN_SECONDS = 12.0  # the guard's own sweep and last kill, after the part's bound


class PartDied(RuntimeError):  # noqa: N818 - an event, read as one
    """A part of the stack ended by itself; the text names it and shows its last log lines."""


@dataclass(frozen=True)
class PartSpec:
    """What to run and how to end it. `linger_seconds` holds only when the launcher vanished."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    folder: Path | None = None
    stop_signal: str = "TERM"
    again_seconds: float = 1.0
    kill_seconds: float = 12.0
    linger_seconds: float = 0.0
    identity: tuple[int, int] | None = None  # uid and gid, when we are root and the part must not be


@dataclass
class Part:
    """One running part. Its guard is our child; the part itself is the guard's."""

    spec: PartSpec
    log: Path
    guard: subprocess.Popen[bytes]
    started: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def running(self) -> bool:
        return self.guard.poll() is None

    @property
    def pid(self) -> int:
        """The process id of the part itself (not of its guard). PartDied when it has ended."""
        children = []
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(self.guard.pid).children()
        if not children:
            raise self.death()
        return int(min(children, key=lambda child: child.create_time()).pid)

    def death(self) -> PartDied:
        code = self.guard.poll()
        how = "is not running" if code is None else f"ended by itself ({_how(code)})"
        return PartDied(f"{self.name} {how}. Its log, {self.log}, ends with:\n{self.log_tail()}")

    def log_tail(self) -> str:
        try:
            with self.log.open(encoding="utf-8", errors="replace") as lines:
                return "".join("  " + line for line in deque(lines, LOG_TAIL_LINES)).rstrip() or "  (nothing)"
        except OSError as error:
            return f"  (cannot be read: {error})"

    def ask_to_stop(self) -> None:
        """Tell the guard; returns at once."""
        if self.running:
            self.guard.terminate()

    def stop_within(self, seconds: float) -> None:
        """Ask it to stop, and wait so long at most; it may still be stopping afterwards."""
        self.ask_to_stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.guard.wait(seconds)

    def wait_stopped(self) -> None:
        """Wait for the guard's own bound, then end its process group by force."""
        try:
            self.guard.wait(self.spec.kill_seconds + GUARD_MARGIN_SECONDS)
        except subprocess.TimeoutExpired:
            self._kill_everything()
        self._close()

    def kill(self) -> None:
        """SIGKILL to the part itself, as a crash would be; its guard cleans up after it."""
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
        # A guard that was itself killed left its group behind; the group outlives its leader. On Linux the
        # kernel has told the part already (see PR_SET_PDEATHSIG in the guard).
        with contextlib.suppress(ProcessLookupError, PermissionError):
            deadline = time.monotonic() + self.spec.kill_seconds
            os.killpg(self.guard.pid, signal.Signals[f"SIG{self.spec.stop_signal}"])
            while time.monotonic() < deadline:
                os.killpg(self.guard.pid, 0)
                time.sleep(0.1)
            os.killpg(self.guard.pid, signal.SIGKILL)


def start_part(spec: PartSpec, logs: Path, keep_open: Sequence[int] = ()) -> Part:
    """Start the part under its guard, its output appended to `<logs>/<name>.log`.

    `keep_open` are descriptors that the guard (not the part) holds until it ends, e.g. of a lock file.
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
            pass_fds=tuple(keep_open),
            start_new_session=True,  # a Ctrl-C in the terminal is for the launcher alone
        )
    return Part(spec, log, guard)


def stop_parts(parts: Sequence[Part]) -> None:
    """Stop them at the same time and wait for all; a part that has ended is left alone."""
    for part in parts:
        part.ask_to_stop()
    for part in parts:
        part.wait_stopped()


def _how(code: int) -> str:
    number = -code if code < 0 else code - 128
    if number > 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(number).name
    return f"exit status {code}"
