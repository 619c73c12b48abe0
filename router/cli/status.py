"""`router status` and `router watch`: tasks, usage of each model's limits, and errors."""

from __future__ import annotations

import time
from collections import deque
from datetime import timezone
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from router.cli import terminal
from router.errors import DatabaseError
from router.status import ModelStatus, Status, WhyNot, read_status, unreadable

REFRESH_SECONDS = 1.0
THROUGHPUT_SECONDS = 30.0  # measured over this window
SHOWN_CLIENTS = 6
NO_CLIENT = "(none)"
WAITING = {
    "tokens": "token limit",
    "budget": "budget used up",
    "too_expensive": "budget below a call's cost",
    "concurrency": "concurrency limit",
    "stopped": "stopped",
    "cooling_down": "cooling down",
    "rebuilding": "rebuilding state",
    "half_open": "half-open probe",
}

STATUS_HELP = """
Show tasks by state, and usage and errors of each model.

The column usage shows, for each limit of the model's target, the calls, tokens or cost of the current
window. If Redis is unavailable, it shows the last minute from the call log instead.

Not sending shows the reason why no call is sent, of all models at the top and of each model in its row. The
JSON key why_not is null while calls may be sent.

\b
Examples:
  router status
  router status --json | jq .tasks.unsolved
  router status --client alice
"""
WATCH_HELP = """
Show the status every second until Ctrl-C.

\b
Examples:
  router watch
  router watch --seconds 60 --json >status.jsonl
"""


def status(
    *,
    client: Annotated[
        str | None, typer.Option(metavar="NAME", help='Show the tasks of this client; "" is a client, too.')
    ] = None,
    as_json: terminal.Json = False,
    database: terminal.Database = None,
    redis: terminal.Redis = None,
) -> None:
    try:
        with terminal.database(database) as connection:
            now = read_status(connection, redis, client)
    except DatabaseError as error:
        if as_json:
            terminal.print_json(_error_json(error))
        raise
    if as_json:
        terminal.print_json(now.as_json())
    else:
        terminal.out().print(rendered(now, client=client))


def watch(
    *,
    seconds: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0, help="Stop after this time. Default: run until Ctrl-C."),
    ] = None,
    as_json: terminal.Json = False,
    database: terminal.Database = None,
    redis: terminal.Redis = None,
) -> None:
    url = terminal.database_url(database)
    with terminal.database(url):
        pass  # a wrong address is an error; a Postgres that becomes unavailable later is not
    try:
        _Watch(url, redis, None if seconds is None else time.monotonic() + seconds).run(as_json=as_json)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


class _Watch:
    def __init__(self, database: str, redis: str | None, end_at: float | None) -> None:
        self._database = database
        self._redis = redis
        self._end_at = end_at
        self._solved: deque[tuple[float, int]] = deque()

    def run(self, *, as_json: bool) -> None:
        if as_json:
            while True:
                now = self._read()
                terminal.print_json(
                    _error_json(now) if isinstance(now, DatabaseError) else now.as_json(), indent=None
                )
                if not self._pause():
                    return
        with Live(console=terminal.out(), auto_refresh=False, vertical_overflow="crop") as screen:
            while True:
                screen.update(self._render(self._read()), refresh=True)
                if not self._pause():
                    return

    def _read(self) -> Status | DatabaseError:
        try:
            with terminal.database(self._database) as connection:
                return read_status(connection, self._redis)
        except DatabaseError as error:
            return error

    def _render(self, now: Status | DatabaseError) -> RenderableType:
        if isinstance(now, DatabaseError):
            return Text(f"Not sending  {now} Retrying every second.", style="red")
        return rendered(now, self._throughput(now.tasks.solved))

    def _throughput(self, solved: int) -> float | None:
        """Returns tasks solved per second over THROUGHPUT_SECONDS; None in the first second."""
        at = time.monotonic()
        self._solved.append((at, solved))
        while at - self._solved[0][0] > THROUGHPUT_SECONDS:
            self._solved.popleft()
        since, before = self._solved[0]
        return max(0, solved - before) / (at - since) if at - since >= REFRESH_SECONDS else None

    def _pause(self) -> bool:
        """Waits for the next refresh. Returns False if --seconds have passed."""
        left = REFRESH_SECONDS if self._end_at is None else self._end_at - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(left, REFRESH_SECONDS))
        return True


def _error_json(error: DatabaseError) -> dict[str, object]:
    return {"error": str(error), "why_not": unreadable(error).whole}


def rendered(
    now: Status, solved_per_second: float | None = None, client: str | None = None
) -> RenderableType:
    """Renders the status for a terminal."""
    whole = now.why_not
    notes = [Text(note, style="yellow") for note in now.notes if whole is None or note != whole.text]
    if whole is not None:
        notes.insert(0, Text.assemble(("Not sending  ", "dim"), (sentence(whole), _style(whole))))
    parts: list[RenderableType] = [_tasks(now, solved_per_second, client), Text(), *notes]
    if notes:
        parts.append(Text())
    return Group(*parts, _models(now), _errors(now)) if now.models else Group(*parts)


def sentence(why: WhyNot) -> str:
    """Returns the reason with its start."""
    if why.since is None:
        return why.text
    return f"{why.text} Since {why.since.astimezone(timezone.utc):%Y-%m-%d %H:%M:%S} UTC."


def _style(why: WhyNot) -> str:
    return "red" if why.alarm else "cyan" if why.code.chosen else "dim"


def _tasks(now: Status, solved_per_second: float | None, client: str | None) -> Table:
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
    if clients := _clients(now, client):
        grid.add_row(Text("Clients" if client is None else "Client", style="dim"), Text(clients))
    if solved_per_second is not None:
        grid.add_row(
            Text("Throughput", style="dim"), Text(_throughput_text(tasks.unsolved, solved_per_second))
        )
    workers = f"{now.workers} alive" if now.workers else "none alive"
    grid.add_row(Text("Workers", style="dim"), Text(workers, style="" if now.workers else "yellow"))
    return grid


def _clients(now: Status, client: str | None) -> str:
    """Returns the backlogs of the clients that have most tasks, or all counts of the given one."""
    if client is not None:
        counts = now.clients.get(client, {})
        states = ("unsolved", "solved", "failed")
        return f"{client or NO_CLIENT}: " + ", ".join(f"{counts.get(state, 0):,} {state}" for state in states)
    waiting = [
        (name or NO_CLIENT, counts["unsolved"]) for name, counts in now.clients.items() if counts["unsolved"]
    ]
    if {name for name, _ in waiting} <= {NO_CLIENT}:
        return ""
    more = [f"{len(waiting) - SHOWN_CLIENTS} more"] if len(waiting) > SHOWN_CLIENTS else []
    return " · ".join([*(f"{name} {count:,}" for name, count in waiting[:SHOWN_CLIENTS]), *more])


def _throughput_text(unsolved: int, per_second: float) -> str:
    if per_second <= 0:
        return "0/min"
    minutes = unsolved / per_second / 60
    left = f"{minutes / 60:,.1f} h" if minutes >= 90 else f"{minutes:,.0f} min"  # noqa: PLR2004 - reads better so
    return f"{per_second * 60:,.0f}/min" + (f", {left} left" if unsolved else "")


def _models(now: Status) -> Table:
    table = terminal.quiet_table("model", "usage", "in flight", "not sending", right=("in flight",))
    for model in now.models:
        name = Text(model.model, style="dim" if model.state == "paused" else "")
        table.add_row(name, _usage(model), _in_flight(model), _reason(model, now.why_not))
    return table


def _usage(model: ModelStatus) -> Text:
    """Renders the usage of each limit, or only the target if the usage is unknown."""
    if model.target is None:
        return Text("no target yet", style="dim")
    if model.sent_last_minute is not None:
        return Text(f"{model.target}; {model.sent_last_minute:,} in the last minute", style="dim")
    used = {limit: f"{count:,}" for limit, count in {**(model.sent or {}), **(model.tokens or {})}.items()}
    used |= {limit: f"${usd:,.2f}" for limit, usd in (model.money_usd or {}).items()}
    expected = model.forecast_usd or {}
    shown = Text(", ").join(
        Text.assemble(
            (amount, "bold" if amount.strip("$0.") else ""),
            (f" of {limit}", "dim"),
            (f" (comes to ${expected[limit]:,.2f})" if limit in expected else "", "dim"),
        )
        for limit, amount in used.items()
    )
    return shown if used else Text(model.target, style="dim")


def _in_flight(model: ModelStatus) -> Text:
    shown = Text(f"{model.in_flight:,}" if model.in_flight else "-", style="" if model.in_flight else "dim")
    if model.at_once:
        shown.append(f" of {model.at_once:,}", style="dim")
    return shown


def _reason(model: ModelStatus, whole: WhyNot | None) -> Text:
    """Renders why the model does not send: in short where the line at the top says the same."""
    why = model.why_not
    if why is None:
        state = "" if model.state == "active" else model.state
        return Text.assemble(
            (state, "cyan"), " " if state else "", (WAITING.get(model.waiting_for or "", ""), "dim")
        )
    if whole is not None and why.code is whole.code and why.text == whole.text:
        return Text(why.code.value.replace("_", " "), style="dim")
    return Text(why.text, style=_style(why))


def _errors(now: Status) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    for model in now.models:
        name = Text(model.model, no_wrap=True)
        if model.trouble is not None:
            grid.add_row(name, Text(model.trouble, style="red"))
        elif model.last_error is not None:
            failed = (
                f"{model.failed_calls:,} of {model.calls:,} recent calls failed, last: {model.last_error}"
            )
            grid.add_row(name, Text(failed, style="dim"))
        for warning in model.warnings:
            grid.add_row(name, Text(warning, style="yellow"))
    return Group(Text(), grid) if grid.row_count else Text()
