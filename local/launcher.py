"""What a launcher shows to a person: the steps of a start, where to log in, and how it ended."""

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
from router.errors import RouterError

DEFAULT_DATA = Path(".stack")
DEFAULT_TIME_SCALE = 10.0
CHECK_SECONDS = 0.5

Work = Callable[[Stack, threading.Event, Console], bool]  # True if it went well


def add_stack_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that starts a stack."""
    add = parser.add_argument
    add("--data", type=Path, default=DEFAULT_DATA, metavar="FOLDER", help="data folder (%(default)s)")
    add(
        "--time-scale", type=float, default=DEFAULT_TIME_SCALE, metavar="S",
        help="divide latencies by S (%(default)g)",
    )  # fmt: skip


def run_stack(options: argparse.Namespace, work: Work | None = None, *, stay_open: bool = True) -> int:
    """Start a stack, do `work` on it, then keep it open until a signal if `stay_open`; an exit status."""
    stop = stop_on_signals()
    console = Console(highlight=False)
    with ShowProgress(console) as progress:
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
            progress.done(f"Everything is up after {time.monotonic() - started:.1f} s.")
            say_where(stack, console)
            succeeded = work is None or work(stack, stop, console)
            if stay_open:
                if work is not None:
                    console.print("The stack stays open: Ctrl-C stops it.")
                while not stop.wait(CHECK_SECONDS):
                    stack.check()
        except StopRequested:
            succeeded = True
        except (RuntimeError, RouterError) as error:
            succeeded = False
            progress.failed(str(error))
        finally:
            stack.stop()
        progress.done("Everything is stopped.")
    return 0 if succeeded else 1


def stop_on_signals() -> threading.Event:
    """An event that SIGINT, SIGTERM or SIGHUP sets; from now on they do nothing else."""
    asked = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda _number, _frame: asked.set())
    return asked


class ShowProgress:
    """Steps as lines with the time since the beginning; on a terminal also who is still starting."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._begun = time.monotonic()
        self._starting: set[str] = set()
        self._status: Status | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._hide()

    def report(self, part: str, what: str) -> None:
        """One step of `Stack`; that something is starting is only shown where it can be shown in passing."""
        if what == "starting":
            self._starting.add(part)
        else:
            self._starting.discard(part)
            self._line(f"{part}: {what}")
        self._show()

    def done(self, text: str) -> None:
        self._hide()
        self._line(text, "bold green")

    def failed(self, text: str) -> None:
        self._hide()
        self._line(text, "red")

    def _line(self, text: str, style: str = "") -> None:
        stamp = f"{time.monotonic() - self._begun:6.1f} s  "
        self._console.print(stamp + text, style=style, markup=False, soft_wrap=True)

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


def say_where(stack: Stack, console: Console | None = None) -> None:
    """Print where everything is and with what to log in."""
    addresses = shlex.quote(str(stack.data / "router.env"))
    router = shlex.quote(str(Path(sys.executable).with_name("router")))
    lines = [
        "",
        f"  Airflow          {stack.airflow_url}",
        f"  the console      {stack.airflow_url}/plugin/router",
        f"  log in as        admin   {stack.passwords['admin']}",
        f"  or (read only)   viewer  {stack.passwords['viewer']}",
        f"  Models Backend   {stack.backend_url}",
        f"  logs             {stack.logs}",
        f"  in a terminal    set -a; . {addresses}; set +a; {router} status",
        "",
        "  Ctrl-C stops everything; started again on the same folder it goes on with its data.",
        "",
    ]
    (console or Console(highlight=False)).print("\n".join(lines), markup=False, soft_wrap=True)
