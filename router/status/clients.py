"""Usage, limits and share of the queue of each client.

Usage comes from sums of the call log (`sql/functions/95_clients.sql`), the backlog from counters: neither
reads the log of days or the table of tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from router.database import Connection, rows
from router.settings import DEFAULT_CLIENT, RouterConfig
from router.traffic import MICRO_USD, MoneyLimit, RequestLimit, TokenLimit, TrafficTarget

if TYPE_CHECKING:
    from router.limiter import ModelTraffic

HOUR, DAY = timedelta(hours=1), timedelta(hours=24)
MAX_CLIENTS = 1000
MAX_LIVE = 200  # clients whose limits are read from Redis
KINDS: Mapping[type, str] = {RequestLimit: "requests", TokenLimit: "tokens", MoneyLimit: "usd"}
_USAGE = "SELECT * FROM client_usage_since(%s::timestamptz[])"
_COUNTS = "SELECT client, unsolved FROM client_counts_now WHERE unsolved > 0"
_ABOUT = "SELECT to_regclass('client_counts_now') IS NOT NULL AS counted, clock_timestamp() AS now"


@dataclass(frozen=True, slots=True)
class Usage:
    """Ended calls in a span of time. `unpriced` of them have no known cost."""

    calls: int = 0
    answered: int = 0
    failed: int = 0
    tokens: int = 0
    cost_usd: float = 0.0
    unpriced: int = 0


@dataclass(frozen=True, slots=True)
class LimitUsage:
    """One limit of a client: use in its window until now, and in a whole window at the last hour's pace.

    Of a budget for a calendar period: what it comes to by the period's end at this pace. Money is in USD.
    `exact`: `used` is the limiter's number; else it is of ended calls in the log, to five minutes.
    """

    limit: str
    kind: str
    used: float
    allowed: float
    forecast: float
    exact: bool = False


@dataclass(frozen=True, slots=True)
class ClientStatus:
    """One client. `unsolved` is None where tasks are not counted by client.

    queue_share: its share of all unsolved tasks; weight_share: its share of the weights of clients that have
    unsolved tasks, so the share of claims that it gets. None without unsolved tasks.
    """

    client: str
    weight: float
    unsolved: int | None
    queue_share: float | None
    weight_share: float | None
    hour: Usage
    day: Usage
    limit: str | None
    limits: tuple[LimitUsage, ...]


Spans = Mapping[datetime, Mapping[str, Usage]]  # start of the span -> client -> its usage since then


@dataclass(frozen=True, slots=True)
class _Read:
    """Everything that was read for all clients."""

    config: RouterConfig
    now: datetime
    unsolved: Mapping[str, int] | None
    usage: Spans
    live: Mapping[str, ModelTraffic]

    def usage_of(self, client: str, since: datetime) -> Usage:
        return self.usage.get(since, {}).get(client, Usage())


def read_clients(
    connection: Connection, config: RouterConfig, redis_url: str | None = None
) -> list[ClientStatus]:
    """Returns the clients of the config and those with unsolved tasks or calls of the last day.

    The largest come first: by cost of the day, then calls, then backlog. At most MAX_CLIENTS. With Redis, the
    use of limits is the limiter's, and limits of API keys are shown.
    """
    from router.limiter import read_client_limits  # noqa: PLC0415 - its import takes half a second

    about = rows(connection, _ABOUT)[0]
    now: datetime = about["now"]
    unsolved = _unsolved(connection) if about["counted"] else None
    lines = {settings.limit for settings in config.clients.values() if settings.limit is not None}
    starts = {_start(limit, now) for line in lines for limit in TrafficTarget.parse(line).windows}
    usage = _usage(connection, [now - HOUR, now - DAY, *starts])
    names = {name for name in config.clients if name != DEFAULT_CLIENT}
    names |= set(unsolved or ()) | set(usage[now - DAY])
    largest = sorted(names, key=lambda name: -usage[now - DAY].get(name, Usage()).calls)[:MAX_LIVE]
    live = read_client_limits(redis_url, largest)
    read = _Read(config, now, unsolved, usage, live)
    found = [_client(name, read) for name in names]
    found.sort(key=lambda one: (-one.day.cost_usd, -one.day.calls, -(one.unsolved or 0), one.client))
    return found[:MAX_CLIENTS]


def _unsolved(connection: Connection) -> dict[str, int]:
    return {row["client"]: row["unsolved"] for row in rows(connection, _COUNTS)}


def _usage(connection: Connection, since: Sequence[datetime]) -> Spans:
    spans: dict[datetime, dict[str, Usage]] = {start: {} for start in since}
    for row in rows(connection, _USAGE, (list(since),)):
        start, client = row.pop("since"), row.pop("client")
        spans[start][client] = Usage(**row)
    return spans


def _client(name: str, read: _Read) -> ClientStatus:
    settings, waiting, live = read.config.client(name), read.unsolved or {}, read.live.get(name)
    line = settings.limit or (live.target if live is not None else None)
    target = None if line is None else TrafficTarget.parse(line)
    weights = sum(read.config.client(other).weight for other in waiting)
    return ClientStatus(
        client=name,
        weight=settings.weight,
        unsolved=None if read.unsolved is None else waiting.get(name, 0),
        queue_share=waiting[name] / sum(waiting.values()) if name in waiting else None,
        weight_share=settings.weight / weights if name in waiting else None,
        hour=read.usage_of(name, read.now - HOUR),
        day=read.usage_of(name, read.now - DAY),
        limit=None if target is None else str(target),
        limits=tuple(_limit_usage(name, limit, read) for limit in (() if target is None else target.windows)),
    )


def _limit_usage(name: str, limit: Any, read: _Read) -> LimitUsage:
    kind = KINDS[type(limit)]
    pace = _amount(read.usage_of(name, read.now - HOUR), kind) / HOUR.total_seconds()
    exact = _live_use(read.live.get(name), str(limit), kind)
    used = _amount(read.usage_of(name, _start(limit, read.now)), kind) if exact is None else exact
    left = _seconds_left(limit, read.now)
    forecast = pace * limit.window_seconds if left is None else used + pace * left
    allowed = limit.count / MICRO_USD if kind == "usd" else limit.count
    return LimitUsage(str(limit), kind, used, allowed, forecast, exact is not None)


def _live_use(live: ModelTraffic | None, limit: str, kind: str) -> float | None:
    if live is None:
        return None
    counts = {"requests": live.sent, "tokens": live.tokens, "usd": live.money}[kind]
    count = counts.get(limit)
    return count if count is None or kind != "usd" else count / MICRO_USD


def _amount(usage: Usage, kind: str) -> float:
    return {"requests": usage.calls, "tokens": usage.tokens, "usd": usage.cost_usd}[kind]


def _start(limit: Any, now: datetime) -> datetime:
    """The start of the window until now; of a calendar period in UTC, of that."""
    period = getattr(limit, "calendar", None)
    if period is None:
        return now - timedelta(seconds=limit.window_seconds)
    midnight = now.astimezone(timezone.utc).replace(hour=0, minute=0, second=0, microsecond=0)
    return midnight if period == "day" else midnight.replace(day=1)


def _seconds_left(limit: Any, now: datetime) -> float | None:
    """Seconds until the end of the calendar period; None for a rolling window."""
    period = getattr(limit, "calendar", None)
    if period is None:
        return None
    start = _start(limit, now)
    end = start + DAY if period == "day" else (start + timedelta(days=32)).replace(day=1)
    return (end - now).total_seconds()
