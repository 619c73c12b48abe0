"""The command `router clients`: usage, limits and share of the queue of each client."""

from __future__ import annotations

import typer
from rich.text import Text

from router.cli import terminal
from router.settings import load_config
from router.status import ClientStatus, LimitUsage, read_clients

NEARLY = 0.8  # of a limit

CLIENTS_HELP = """
Show usage, cost, limits and share of the queue of each client.

A client is the API key, user or team for which a task or call runs; '' is shown as (none). Tasks are claimed
by weight: "gets" is the client's share of the claims while the clients shown have unsolved tasks. Each limit
shows the use of its current window and, after the arrow, that of a whole window at the pace of the last hour;
a budget of a calendar period shows what it comes to by its end.

\b
Examples:
  router clients
  router clients --json | jq '.alice.day.cost_usd'
"""


def clients(
    *,
    as_json: terminal.Json = False,
    database: terminal.Database = None,
    redis: terminal.Redis = None,
    config: terminal.Config = terminal.DEFAULT_CONFIG,
) -> None:
    settings = load_config(config)
    with terminal.database(database) as connection:
        found = read_clients(connection, settings, redis)
    if as_json:
        terminal.print_json({one.client: one for one in found})
        return
    if not found:
        typer.echo("No client has unsolved tasks, or calls within the last 24 hours.")
        return
    numbers = ("unsolved", "of the queue", "gets", "calls 1 h", "calls 24 h", "failed", "tokens", "USD")
    table = terminal.quiet_table("client", "weight", *numbers, "limits", right=("weight", *numbers))
    for one in found:
        table.add_row(*_cells(one), Text("\n").join(map(_limit, one.limits)) if one.limits else "no limit")
    terminal.out().print(table)


def _cells(one: ClientStatus) -> list[str]:
    unsolved = "-" if one.unsolved is None else f"{one.unsolved:,}"
    return [
        one.client or "(none)", f"{one.weight:g}", unsolved, _percent(one.queue_share),
        _percent(one.weight_share), f"{one.hour.calls:,}", f"{one.day.calls:,}", f"{one.day.failed:,}",
        f"{one.day.tokens:,}", f"{one.day.cost_usd:.4f}",
    ]  # fmt: skip


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _limit(limit: LimitUsage) -> Text:
    share = max(limit.used, limit.forecast) / limit.allowed if limit.allowed else 1.0
    style = "red" if share >= 1 else "yellow" if share >= NEARLY else ""
    return Text(
        f"{limit.limit}: {_amount(limit, limit.used)} -> {_amount(limit, limit.forecast)}", style=style
    )


def _amount(limit: LimitUsage, value: float) -> str:
    return f"${value:.4f}" if limit.kind == "usd" else f"{value:,.0f}"
