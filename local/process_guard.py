"""Runs one command and ends all of its processes, even if the launcher is killed.

    python process_guard.py --signal TERM --again 1 --kill 10 --linger 0 -- command argument ...

The guard ends the command's process tree on SIGTERM, when its standard input (a pipe that only the launcher
holds) closes, or when its parent is gone, so `kill -9` of the launcher leaves nothing running. The command
gets `--signal`, the same again after `--again` seconds, and SIGKILL after `--kill` seconds; then remaining
descendants are ended. If the launcher is gone, the guard waits `--linger` seconds first, so that a database
outlives its clients. The exit status is that of the command, or 128 + the signal that ended it.

The guard imports nothing of the project, because it must start in milliseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from typing import Any

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
TICK_SECONDS = 0.5


def main() -> int:
    options = _options()
    os.close(os.dup(0))  # fails if standard input is missing
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: received.append(number))
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans of the command become children of this process
    guard = _Guard(options, parent=os.getppid(), wake=wake_read)
    while guard.status is None:
        vanished = guard.wait(TICK_SECONDS)
        if received or vanished:
            guard.stop(linger=vanished and not received)
            break
    guard.sweep()
    return guard.status if guard.status is not None else 1


class _Guard:
    def __init__(self, options: argparse.Namespace, parent: int, wake: int) -> None:
        self._options = options
        self._parent = parent
        self._wake = wake
        self._signal = signal.Signals[f"SIG{options.signal}"]
        self.status: int | None = None
        self._known: dict[int, Any] = {}
        self._child = self._start()

    def _start(self) -> int:
        identity: dict[str, Any] = {}
        if self._options.user is not None:
            user, group = self._options.user.split(":")
            identity = {"user": int(user), "group": int(group), "extra_groups": []}
        number = int(self._signal)
        try:
            process = subprocess.Popen(
                self._options.command,
                stdin=subprocess.DEVNULL,
                cwd=self._options.cwd,
                preexec_fn=lambda: _prctl(PR_SET_PDEATHSIG, number),  # noqa: PLW1509 - no threads here
                **identity,
            )
        except OSError as error:
            sys.stderr.write(f"cannot run {self._options.command[0]}: {error}\n")
            raise SystemExit(127) from error
        process.returncode = 0  # _reap collects it, with adopted orphans
        return process.pid

    def wait(self, seconds: float) -> bool:
        """Waits for an event and reaps. Returns whether the launcher is gone."""
        readable, _, _ = select.select([0, self._wake], [], [], seconds)
        if self._wake in readable:
            os.read(self._wake, 4096)
        self._reap()
        return (0 in readable and not os.read(0, 4096)) or os.getppid() != self._parent

    def stop(self, *, linger: bool) -> None:
        """Sends the signal, sends it again, then kills. Returns when the command has ended."""
        if linger:
            self._wait_until(time.monotonic() + self._options.linger)
        started = time.monotonic()
        for after in (0.0, self._options.again):
            self._wait_until(started + after)
            if self.status is None:
                self._descendants()
                _send(self._child, self._signal)
        self._wait_until(started + self._options.kill)
        if self.status is None:
            _send(self._child, signal.SIGKILL)
            self._wait_until(time.monotonic() + 5)

    def sweep(self) -> None:
        """Ends remaining descendants with SIGTERM, and SIGKILL two seconds later. Takes at most 5 s."""
        started = time.monotonic()
        terminated = False
        while self._descendants() and time.monotonic() - started < 5:
            number = signal.SIGTERM if time.monotonic() - started < 2 else signal.SIGKILL
            if number is signal.SIGKILL or not terminated:
                for process in self._known.values():
                    with contextlib.suppress(Exception):  # already gone
                        process.send_signal(number)
                terminated = True
            self._wait_and_reap(0.05)

    def _wait_until(self, at: float) -> None:
        while self.status is None and (left := at - time.monotonic()) > 0:
            self._wait_and_reap(min(left, 0.2))

    def _wait_and_reap(self, seconds: float) -> None:
        readable, _, _ = select.select([self._wake], [], [], seconds)
        if readable:
            os.read(self._wake, 4096)
        self._reap()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._child:
                code = os.waitstatus_to_exitcode(status)
                self.status = code if code >= 0 else 128 - code

    def _descendants(self) -> dict[int, Any]:
        # Without a subreaper (macOS) descendants are visible only while the command runs: they are recorded.
        import psutil  # noqa: PLC0415 - slow to import

        with contextlib.suppress(psutil.Error):
            self._known |= {child.pid: child for child in psutil.Process().children(recursive=True)}
        self._known = {pid: process for pid, process in self._known.items() if _alive(process)}
        return self._known


def _alive(process: Any) -> bool:
    try:
        return bool(process.is_running() and process.status() != "zombie")
    except Exception:  # noqa: BLE001 - psutil's errors mean that it is gone
        return False


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--signal", default="TERM")
    parser.add_argument("--again", type=float, default=1.0)
    parser.add_argument("--kill", type=float, default=10.0)
    parser.add_argument("--linger", type=float, default=0.0)
    parser.add_argument("--cwd")
    parser.add_argument("--user", help="uid:gid to run the command as")
    parser.add_argument("command", nargs="+")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
