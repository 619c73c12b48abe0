"""Runs a stack from the command line: progress, addresses and logins, stop on signals."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.status import Status
from typing_extensions import Self

from local.stack import Stack, StopRequested
from local.stack_plan import StackOptions
from router.cli import SafeConsole
from router.errors import RouterError

DEFAULT_DATA = Path(".stack")
DEFAULT_TIME_SCALE = 10.0
CHECK_SECONDS = 0.5

Work = Callable[[Stack, threading.Event, Console], bool]  # returns whether it succeeded


def add_stack_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of every command that starts a stack."""
    add = parser.add_argument
    add("--data", type=Path, default=DEFAULT_DATA, metavar="FOLDER", help="data folder (%(default)s)")
    add(
        "--time-scale", type=float, default=DEFAULT_TIME_SCALE, metavar="S",
        help="divide latencies by S (%(default)g)",
    )  # fmt: skip


def run_stack(options: argparse.Namespace, work: Work | None = None, *, stay_open: bool = True) -> int:
    """Starts a stack, runs `work`, and keeps it running until a signal if `stay_open`.

    Returns the exit status: 0 unless the stack or `work` failed.
    """
    stop = stop_on_signals()
    console = SafeConsole()
    with ProgressDisplay(console) as progress:
        stack = Stack(
            options.data,
            StackOptions(time_scale=options.time_scale),
            report=progress.report,
            stop_requested=stop.is_set,
        )
        succeeded = False
        try:
            started = time.monotonic()
            stack.start()
            progress.done(f"The stack is ready after {time.monotonic() - started:.1f} s.")
            print_addresses(stack, console)
            succeeded = work is None or work(stack, stop, console)
            if stay_open:
                if work is not None:
                    console.print("The stack keeps running. Press Ctrl-C to stop it.")
                while not stop.wait(CHECK_SECONDS):
                    stack.supervise()
        except StopRequested:
            succeeded = True
        except (RuntimeError, RouterError) as error:
            succeeded = False
            progress.failed(str(error))
        finally:
            stack.stop()
        progress.done("The stack is stopped.")
    return 0 if succeeded else 1


def stop_on_signals() -> threading.Event:
    """Returns an event that SIGINT, SIGTERM and SIGHUP set from now on, instead of ending the process."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda _number, _frame: stop.set())
    return stop


class ProgressDisplay:
    """Prints steps with the elapsed time; a terminal also shows which processes are starting."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or SafeConsole()
        self._started = time.monotonic()
        self._starting: set[str] = set()
        self._status: Status | None = None
        self._is_up = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._hide()

    def report(self, name: str, step: str) -> None:
        """Prints a step of `Stack`, or shows that a process is starting."""
        if step == "starting" and not self._is_up:
            self._starting.add(name)
        elif step == "starting":
            self._line(f"{name}: started again")
        else:
            self._starting.discard(name)
            self._line(f"{name}: {step}")
        self._show()

    def done(self, text: str) -> None:
        """Prints a success; processes that start from now on are restarts."""
        self._is_up = True
        self._hide()
        self._line(text, "bold green")

    def failed(self, text: str) -> None:
        """Prints a failure."""
        self._hide()
        self._line(text, "red")

    def _line(self, text: str, style: str = "") -> None:
        stamp = f"{time.monotonic() - self._started:6.1f} s  "
        self._console.print(stamp + text, style=style, soft_wrap=True)

    def _show(self) -> None:
        if not self._console.is_terminal:
            return
        if not self._starting:
            self._hide()
            return
        text = f"starting {', '.join(sorted(self._starting))}"
        if self._status is None:
            self._status = self._console.status(text)
            self._status.start()
        self._status.update(text)

    def _hide(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None
        self._starting.clear()


def print_addresses(stack: Stack, console: Console | None = None) -> None:
    """Prints the addresses of the stack and its logins."""
    addresses = shlex.quote(str(stack.data / "router.env"))
    router = shlex.quote(str(Path(sys.executable).with_name("router")))
    lines = [
        "",
        f"  Airflow          {stack.airflow_url}",
        f"  Console          {stack.airflow_url}/plugin/router",
        f"  Login            admin   {stack.passwords['admin']}",
        f"  Read-only login  viewer  {stack.passwords['viewer']}",
        f"  Models Backend   {stack.backend_url}",
        f"  Logs             {stack.logs}",
        f"  Command line     set -a; . {addresses}; set +a; {router} status",
        "",
        "  Press Ctrl-C to stop the stack. Its data stays in the folder for the next start.",
        "",
    ]
    (console or SafeConsole()).print("\n".join(lines), soft_wrap=True)
