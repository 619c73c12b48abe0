"""What a launcher shows to a person: the steps of a start, where to log in, and how it ended."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.status import Status
from typing_extensions import Self

from local.stack import Stack


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
