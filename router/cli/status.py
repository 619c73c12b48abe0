"""The verbs `router status` and `router watch`: what is going on now, once or live."""

from __future__ import annotations

import time
from collections import deque
from typing import Annotated, Optional

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from router.cli import terminal
from router.errors import DatabaseError
from router.status import ModelStatus, Status, read_status

REFRESH_SECONDS = 1.0
RATE_SECONDS = 30.0  # the rate of solving is taken over so long
WAITING = {
    "tokens": "token limit",
    "concurrency": "concurrency limit",
    "stopped": "stopped",
    "cooling_down": "cooling down",
    "rebuilding": "rebuilding state",
    "half_open": "half-open probe",
}

STATUS_HELP = """
Show tasks by state, and each model's target, use and trouble.

For each limit of a target stands what was sent in its window until now. If Redis is away, that is said, and
the last minute is counted from the log of calls. "in flight" are tasks claimed for the model.

\b
Examples:
  router status
  router status --json | jq .tasks.unsolved
"""
WATCH_HELP = """
Show the status live, each second, until Ctrl-C.

\b
Examples:
  router watch
  router watch --seconds 60 --json >status.jsonl
"""


def status(
    *, as_json: terminal.Json = False, database: terminal.Database = None, redis: terminal.Redis = None
) -> None:
    with terminal.database(database) as connection:
        now = read_status(connection, redis)
    if as_json:
        terminal.print_json(now.as_json())
    else:
        terminal.out().print(rendered(now))


def watch(
    *,
    seconds: Annotated[
        Optional[float],  # noqa: UP045 - typer evaluates it at run time, also on 3.10
        typer.Option(min=0, help="Stop after so many seconds. Default: go on until Ctrl-C."),
    ] = None,
    as_json: terminal.Json = False,
    database: terminal.Database = None,
    redis: terminal.Redis = None,
) -> None:
    url = terminal.database_url(database)
    with terminal.database(url):
        pass  # a wrong address ends it now; a Postgres that goes away later does not
    try:
        _Watching(url, redis, None if seconds is None else time.monotonic() + seconds).run(as_json=as_json)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


class _Watching:
    def __init__(self, database: str, redis: str | None, end_at: float | None) -> None:
        self._database = database
        self._redis = redis
        self._end_at = end_at
        self._solved: deque[tuple[float, int]] = deque()

    def run(self, *, as_json: bool) -> None:
        if as_json:
            while True:
                now = self._read()
                terminal.print_json({"error": now} if isinstance(now, str) else now.as_json(), indent=None)
                if not self._pause():
                    return
        with Live(console=terminal.out(), auto_refresh=False, vertical_overflow="crop") as screen:
            while True:
                screen.update(self._shown(self._read()), refresh=True)
                if not self._pause():
                    return

    def _read(self) -> Status | str:
        try:
            with terminal.database(self._database) as connection:
                return read_status(connection, self._redis)
        except DatabaseError as error:
            return str(error)

    def _shown(self, now: Status | str) -> RenderableType:
        if isinstance(now, str):
            return Text(f"{now} Looking again each second.", style="red")
        return rendered(now, self._rate(now.tasks.solved))

    def _rate(self, solved: int) -> float | None:
        """Tasks solved a second, lately; None until it can be known."""
        at = time.monotonic()
        self._solved.append((at, solved))
        while at - self._solved[0][0] > RATE_SECONDS:
            self._solved.popleft()
        since, before = self._solved[0]
        return max(0, solved - before) / (at - since) if at - since >= REFRESH_SECONDS else None

    def _pause(self) -> bool:
        """Wait for the next look; False if the end has come."""
        left = REFRESH_SECONDS if self._end_at is None else self._end_at - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(left, REFRESH_SECONDS))
        return True


def rendered(now: Status, solved_per_second: float | None = None) -> RenderableType:
    """The status for a terminal."""
    notes = [Text(note, style="yellow") for note in now.notes]
    parts: list[RenderableType] = [_tasks(now, solved_per_second), Text(), *notes]
    if notes:
        parts.append(Text())
    return Group(*parts, _models(now), _troubles(now)) if now.models else Group(*parts)


def _tasks(now: Status, solved_per_second: float | None) -> Table:
    tasks = now.tasks
    grid = Table.grid(padding=(0, 3, 0, 0))
    states = [
        (tasks.unsolved, "unsolved", "bold"), (tasks.running, "running", ""), (tasks.waiting, "waiting", ""),
        (tasks.solved, "solved", "green"), (tasks.failed, "failed", "red" if tasks.failed else ""),
    ]  # fmt: skip
    line = Text()
    for count, state, style in states:
        line.append(f"{count:,}", style=style)
        line.append(f" {state}   ", style="dim")
    grid.add_row(Text("Tasks", style="dim"), line)
    backlog = [f"{name} {count['unsolved']:,}" for name, count in now.categories.items() if count["unsolved"]]
    if backlog:
        grid.add_row(Text("Backlog", style="dim"), Text(" · ".join(backlog)))
    if solved_per_second is not None:
        grid.add_row(Text("Solving", style="dim"), Text(_pace(tasks.unsolved, solved_per_second)))
    workers = f"{now.workers} alive" if now.workers else "none alive"
    grid.add_row(Text("Workers", style="dim"), Text(workers, style="" if now.workers else "yellow"))
    return grid


def _pace(unsolved: int, per_second: float) -> str:
    if per_second <= 0:
        return "none lately"
    minutes = unsolved / per_second / 60
    left = f"{minutes / 60:,.1f} h" if minutes >= 90 else f"{minutes:,.0f} min"  # noqa: PLR2004 - reads better so
    return f"{per_second * 60:,.0f}/min" + (f", {left} left at this rate" if unsolved else "")


def _models(now: Status) -> Table:
    table = terminal.quiet_table("model", "sent of its target", "in flight", "", right=("in flight",))
    for model in now.models:
        name = Text(model.model, style="dim" if model.state == "paused" else "")
        table.add_row(name, _sent(model), _in_flight(model), _standing(model, alive=now.workers > 0))
    return table


def _sent(model: ModelStatus) -> Text:
    """Each limit of the target with what is used of it; or the target, dim, if that is all that is known."""
    if model.target is None:
        return Text("no target yet", style="dim")
    if model.sent_last_minute is not None:
        return Text(f"{model.target}; {model.sent_last_minute:,} in the last minute", style="dim")
    used = {**(model.sent or {}), **(model.tokens or {})}
    shown = Text(", ").join(
        Text.assemble((f"{count:,}", "bold" if count else ""), (f" of {limit}", "dim"))
        for limit, count in used.items()
    )
    return shown if used else Text(model.target, style="dim")


def _in_flight(model: ModelStatus) -> Text:
    shown = Text(f"{model.in_flight:,}" if model.in_flight else "-", style="" if model.in_flight else "dim")
    if model.at_once:
        shown.append(f" of {model.at_once:,}", style="dim")
    return shown


def _standing(model: ModelStatus, *, alive: bool) -> Text:
    """Why a model sends less than its requests allow, in a word or two."""
    if model.state != "active":
        return Text(model.state, style="cyan")
    if model.resting_seconds > 0:
        return Text(f"rests {model.resting_seconds:.0f} s", style="yellow")
    if model.waiting_for == "rebuilding" and not alive:
        return Text()  # nobody has asked since Redis started: there is nothing to recount yet
    return Text(WAITING.get(model.waiting_for or "", ""), style="yellow")


def _troubles(now: Status) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    for model in now.models:
        name = Text(model.model, no_wrap=True)
        if model.trouble is not None:
            grid.add_row(name, Text(model.trouble, style="red"))
        elif model.last_error is not None:
            some = (
                f"{model.failed_calls:,} of {model.calls:,} calls failed lately; the last: {model.last_error}"
            )
            grid.add_row(name, Text(some, style="yellow"))
        for warning in model.warnings:
            grid.add_row(name, Text(warning, style="yellow"))
    return Group(Text(), grid) if grid.row_count else Text()
