"""`make demo`: starts the stack, solves a backlog with a live view, and prints a report."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.demo_report import TaskFacts, make_report, task_facts
from local.airflow_environment import ROOT
from local.launcher import add_stack_arguments, run_stack
from local.stack import Stack, StackError, StopRequested
from router.cli.status import rendered
from router.database import connect
from router.errors import DatabaseError
from router.status import read_status

PROMPTS = Path(__file__).with_name("demo_prompts.jsonl")
DAG_ID = "solve_tasks"
PARSED_SECONDS = 60.0
LOOK_SECONDS = 1.0
PLAIN_LINE_SECONDS = 10.0
LOG_FLUSH_SECONDS = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 if all tasks ended, some were solved and no window was exceeded."""
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__)
    add_stack_arguments(parser)
    _add_arguments(parser)
    options = parser.parse_args(arguments)

    def work(stack: Stack, stop: threading.Event, console: Console) -> bool:
        return run_demo(stack, options, stop, console)

    return run_stack(options, work, stay_open=not options.exit)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--tasks", type=_count, default=1600, metavar="N", help="how many prompts (default: %(default)s)")
    add("--exit", action="store_true", help="stop everything when they are solved, instead of staying open")
    add("--json", type=Path, metavar="FILE", help="write the report there, as JSON")
    add("--timeout", type=float, default=7200, metavar="S", help="stop waiting after S seconds (7200)")


def run_demo(stack: Stack, options: argparse.Namespace, asked: threading.Event, console: Console) -> bool:
    """Solves the tasks on a running stack and prints the report.

    True if all tasks ended, some were solved and no window was exceeded.
    """
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
    since = time.monotonic()
    prefix = f"demo-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}/"
    _unpause(stack, asked)
    _load(stack, options.tasks, prefix)
    finished = _watch(stack, prefix, options, asked, console)
    time.sleep(LOG_FLUSH_SECONDS)  # the backend writes its log shortly after the answers
    with connect(stack.database_url) as connection:
        report = make_report(connection, prefix, stack.arrival_log, command_started(os.environ), since)
    report.show(console)
    if options.json is not None:
        options.json.write_text(json.dumps(report.as_json(), indent=2) + "\n")
    return finished and report.facts.solved > 0 and report.verdict.breach_count == 0


def command_started(environment: Mapping[str, str]) -> float:
    """Start of the command in seconds of the Unix epoch; make passes it, since it may set up first."""
    told = environment.get("ROUTER_DEMO_STARTED_AT")
    return float(told) if told else float(psutil.Process().create_time())


def _unpause(stack: Stack, asked: threading.Event) -> None:
    deadline = time.monotonic() + PARSED_SECONDS
    with stack.api() as api:
        while DAG_ID not in api.dag_ids():
            if time.monotonic() > deadline:
                errors = "\n".join(api.import_errors())
                raise StackError(f"{DAG_ID} was not parsed within {PARSED_SECONDS:.0f} s.\n{errors}")
            _rest(asked, 0.2)
        api.pause(DAG_ID, paused=False)


def _load(stack: Stack, tasks: int, prefix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.jsonl"
        file.write_text("".join(_lines(tasks)), encoding="utf-8")
        command = [sys.executable, "-m", "router.cli", "load", str(file), "--id-prefix", prefix]
        environment = {**os.environ, **stack.addresses}
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StackError(f"router load failed:\n{done.stderr}")


def _lines(tasks: int) -> Iterator[str]:
    """`count` prompts, cycling through the file under new ids."""
    prompts = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    for number, prompt in enumerate(itertools.islice(itertools.cycle(prompts), tasks)):
        yield json.dumps({**prompt, "custom_id": f"{number:06}"}) + "\n"


def _watch(
    stack: Stack, prefix: str, options: argparse.Namespace, asked: threading.Event, console: Console
) -> bool:
    """Shows progress until all tasks have ended (True) or the time is up (False)."""
    deadline = time.monotonic() + options.timeout
    with _view(stack, options.tasks, console) as show:
        while True:
            stack.supervise()
            with contextlib.suppress(DatabaseError):  # Postgres may be starting again
                with connect(stack.database_url) as connection:
                    facts = task_facts(connection, prefix)
                show.update(facts)
                if facts.finished >= options.tasks:
                    return True
            if time.monotonic() > deadline:
                return False
            _rest(asked, LOOK_SECONDS)


def _rest(asked: threading.Event, seconds: float) -> None:
    if asked.wait(seconds):
        raise StopRequested


class _View:
    """A live table on a terminal, else a line every few seconds."""

    def __init__(self, stack: Stack, tasks: int, console: Console) -> None:
        self._stack = stack
        self._tasks = tasks
        self._console = console
        self._next_line = 0.0
        columns = (TextColumn("Solved"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console)
        self._bar = self._progress.add_task("solved", total=tasks)
        self.live = Live(console=console, auto_refresh=False)

    def update(self, facts: TaskFacts) -> None:
        if self._console.is_terminal:
            self._progress.update(self._bar, completed=facts.finished)
            with connect(self._stack.database_url) as connection:
                status = read_status(connection, self._stack.redis_url)
            self.live.update(Group(self._progress, rendered(status)), refresh=True)
        elif time.monotonic() >= self._next_line or facts.finished >= self._tasks:
            self._next_line = time.monotonic() + PLAIN_LINE_SECONDS
            self._console.print(f"solved {facts.solved:,} of {self._tasks:,}, failed {facts.failed:,}")


@contextmanager
def _view(stack: Stack, tasks: int, console: Console) -> Iterator[_View]:
    view = _View(stack, tasks, console)
    if not console.is_terminal:
        yield view
        return
    with view.live:
        yield view


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
