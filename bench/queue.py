"""Benchmark of claiming and settling single tasks, against other queues and in a table without vacuum.

First table: tasks per second with the same number of connections on the same PostgreSQL (fsync on). The
queues take turns, so that other load of the machine affects all of them. Second table: latency of one claim
with a thousand ready tasks, and with a million ready, a million done, 50,000 waiting for a retry and a held
snapshot; claims alternate between both. One task in ten is released unsent, one in twenty is retried.

    python -m bench.queue [--json FILE] [--seconds 10] [--snapshot-seconds 60] [--large 1000000]

Writes queue.json (or FILE) and queue.png into bench/results/. Exit code 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
from rich.console import Console
from rich.table import Table

from bench.queue_rivals import CLAIM, SETTLE, Rival, all_rivals, new_router_database
from local.postgres import PostgresServer, start_postgres
from router.database import connect, rows
from router.task import new_call_id

RESULTS = Path(__file__).parent / "results"
ROUNDS = 4
SMALL = 1000
WARM_UP_CLAIMS = 200
MILLISECONDS = 1000.0


@dataclass
class Claimer:
    """A connection that claims and settles in turn. times_ms: (seconds since start, ms) of each claim."""

    connection: asyncpg.Connection
    claims: int = 0
    times_ms: list[tuple[float, float]] = field(default_factory=list)

    async def one(self, began: float) -> None:
        """Measures a claim; then releases, fails or solves the task, not measured."""
        call_id = new_call_id(time.time())
        sent_at = time.perf_counter()
        row = await self.connection.fetchrow(CLAIM, "w", call_id)
        took = time.perf_counter() - sent_at
        assert row is not None, "nothing was ready"
        self.times_ms.append((sent_at - began, took * MILLISECONDS))
        self.claims += 1
        if self.claims % 10 == 0:
            await self.connection.execute("SELECT unclaim($1)", call_id)
        elif self.claims % 20 == 1:
            await self.connection.execute("SELECT settle_call($1, 'error')", call_id)
            await self.connection.execute(
                "UPDATE queue SET wake_at = clock_timestamp(), not_by = NULL WHERE task_id = $1",
                row["task_id"],
            )
            await self.connection.execute("SELECT promote_waiting(1)")
        else:
            closed = (row["task_id"], row["prompt_version"], row["reserved_tokens"])
            await self.connection.fetchval(SETTLE, call_id, *closed)
        if self.claims % 200 == 0:
            await self.connection.execute("SELECT heartbeat('w'), compact_counts()")

    async def fill_up(self, ready: int) -> None:
        """Inserts tasks until `ready` are ready."""
        found = await self.connection.fetchval("SELECT count(*) FROM queue WHERE state = 'ready'")
        await self.connection.execute(
            f"INSERT INTO tasks (prompt) SELECT 'p' FROM generate_series(1, {ready - found})"
        )


async def claim_costs(server: PostgresServer, seconds: float, large: int) -> dict[str, Any]:
    """Measures claims in a small database and in a large one under a held snapshot, alternating."""
    small_url, large_url = new_router_database(server, "small"), new_router_database(server, "large")
    _fill(large_url, large)
    small, big = [
        Claimer(await asyncpg.connect(url, server_settings={"jit": "off"})) for url in (small_url, large_url)
    ]
    await small.fill_up(SMALL)
    snapshot = await asyncpg.connect(large_url)
    held = snapshot.transaction(isolation="repeatable_read")
    for claimer in (small, big):
        for _ in range(WARM_UP_CLAIMS):
            await claimer.one(time.perf_counter())
        claimer.times_ms.clear()
    await held.start()
    await snapshot.fetchval("SELECT count(*) FROM workers")
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        for claimer in (small, big):
            await claimer.one(began)
        if small.claims % 500 == 0:
            await small.fill_up(SMALL)
    state_ms = []
    for _ in range(20):
        sent_at = time.perf_counter()
        await big.connection.fetchrow("SELECT * FROM worker_state('{}')")
        state_ms.append((time.perf_counter() - sent_at) * MILLISECONDS)
    await held.rollback()
    for connection in (snapshot, small.connection, big.connection):
        await connection.close()
    return {
        "claims": len(big.times_ms),
        "snapshot_seconds": seconds,
        "ready": large,
        "small": _percentiles([ms for _, ms in small.times_ms]),
        "large": _percentiles([ms for _, ms in big.times_ms]),
        "large_last_quarter": _percentiles([ms for at, ms in big.times_ms if at > seconds * 0.75]),
        "small_last_quarter": _percentiles([ms for at, ms in small.times_ms if at > seconds * 0.75]),
        "state_ms": statistics.median(state_ms),
        "over_time": {
            "small": _over_time(small.times_ms, seconds),
            "large": _over_time(big.times_ms, seconds),
        },
    }


def _fill(url: str, large: int) -> None:
    with connect(url, autocommit=True) as connection:
        rows(
            connection,
            "INSERT INTO tasks (prompt, status) SELECT 'p', 'solved' FROM generate_series(1, %s)",
            (large,),
        )
        rows(
            connection,
            "INSERT INTO tasks (prompt) SELECT 'p' FROM generate_series(1, %s)",
            (large + large // 20,),
        )
        rows(
            connection,
            "UPDATE queue SET state = 'waiting', wake_at = now() + interval '1 day'"
            " WHERE position > (SELECT max(position) FROM queue) - %s",
            (large // 20,),
        )
        rows(connection, "SELECT compact_counts()")
        rows(connection, "VACUUM ANALYZE")


def _percentiles(times_ms: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(times_ms, n=1000)
    return {"p50_ms": cuts[499], "p99_ms": cuts[989], "p999_ms": cuts[998]}


def _over_time(
    times_ms: Sequence[tuple[float, float]], seconds: float, steps: int = 20
) -> list[tuple[float, float, float]]:
    """Returns (seconds, p50, p99) for each of `steps` intervals."""
    slices: list[list[float]] = [[] for _ in range(steps)]
    for at, ms in times_ms:
        slices[min(steps - 1, int(at / seconds * steps))].append(ms)
    return [
        ((n + 0.5) * seconds / steps, statistics.median(part), statistics.quantiles(part, n=100)[98])
        for n, part in enumerate(slices)
        if len(part) > 1
    ]


async def throughput(server: PostgresServer, seconds: float, connections: int) -> dict[str, list[float]]:
    """Returns name -> tasks per second in each round; see name_of."""
    jobs = int(seconds * 8000) + 10_000
    async with AsyncExitStack() as open_until:
        rivals: list[Rival] = await all_rivals(server, connections, jobs, open_until)
        server.run("vacuumdb", "--all", "--analyze")
        for rival in rivals:
            await rival.tasks_per_second(1)  # warm-up: plans and caches
        rates: dict[str, list[float]] = {name_of(rival): [] for rival in rivals}
        for _ in range(ROUNDS):
            for rival in rivals:
                rates[name_of(rival)].append(await rival.tasks_per_second(max(1.0, seconds / ROUNDS)))
    return rates


def name_of(rival: Rival) -> str:
    """Returns e.g. `pgqueuer, as used` or `pgqueuer, bare statements`."""
    return f"{rival.name}, {'as used' if rival.as_used else 'bare statements'}"


def targets_of(result: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """Returns (description, target, measured, reached) of each target."""
    rates = {name: statistics.mean(of) for name, of in result["tasks_per_second"].items()}
    ours, procrastinate, pgqueuer, pgbench, bare, *_ = rates.values()
    costs = result["claim"]
    ratio = costs["large"]["p99_ms"] / costs["small"]["p99_ms"]
    seen = [
        ("x procrastinate, both as used, at least", 8.0, ours / procrastinate, True),
        ("x pgqueuer (batch 1), both as used, at least", 5.0, ours / pgqueuer, True),
        ("x pgbench with the same statements, at least", 0.9, bare / pgbench, True),
        ("claim p99, large against small, at most", 1.2, ratio, False),
        ("claim p99 in the large table, ms, at most", 5.0, costs["large"]["p99_ms"], False),
    ]
    return [
        (what, target, value, value >= target if more else value <= target)
        for what, target, value, more in seen
    ]


def show(result: dict[str, Any]) -> None:
    """Prints the tables."""
    console = Console()
    speeds = Table(title=f"Claim + settle, {result['connections']} connections, fsync on")
    for column in ("queue", "tasks/s", "rounds"):
        speeds.add_column(column)
    for name, rates in result["tasks_per_second"].items():
        speeds.add_row(name, f"{statistics.mean(rates):,.0f}", ", ".join(f"{rate:,.0f}" for rate in rates))
    console.print(speeds)
    costs = result["claim"]
    claims = Table(
        title=f"One claim, {costs['claims']:,} in each, snapshot held {costs['snapshot_seconds']:g} s"
    )
    for column in ("table", "p50 ms", "p99 ms", "p99.9 ms"):
        claims.add_column(column)
    for name in ("small", "large", "small_last_quarter", "large_last_quarter"):
        claims.add_row(name.replace("_", ", "), *(f"{value:.3f}" for value in costs[name].values()))
    console.print(claims, f"worker_state at the end, snapshot still held: {costs['state_ms']:.2f} ms")
    aims = Table(title="Targets")
    for column in ("metric", "target", "measured", ""):
        aims.add_column(column)
    for what, target, seen, reached in targets_of(result):
        aims.add_row(what, f"{target:g}", f"{seen:.2f}", "reached" if reached else "MISSED")
    console.print(aims)


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws tasks per second, and claim latency while the snapshot is held."""
    import matplotlib as mpl  # noqa: PLC0415 - slow to import

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5))
    names = list(result["tasks_per_second"])
    left.barh(names[::-1], [statistics.mean(result["tasks_per_second"][name]) for name in names[::-1]])
    left.set_xlabel(f"tasks/s, {result['connections']} connections")
    for name, style in (("small", "tab:gray"), ("large", "tab:blue")):
        points = result["claim"]["over_time"][name]
        right.plot([p[0] for p in points], [p[1] for p in points], color=style, label=f"{name}, p50")
        right.plot(
            [p[0] for p in points], [p[2] for p in points], color=style, linestyle="--", label=f"{name}, p99"
        )
    right.set_xlabel("seconds since the snapshot was taken")
    right.set_ylabel("ms per claim")
    right.set_ylim(bottom=0)
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes the results. Returns 1 if a target is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=RESULTS / "queue.json", metavar="FILE")
    parser.add_argument("--seconds", type=float, default=10, help="per queue, in rounds (default 10)")
    parser.add_argument(
        "--snapshot-seconds",
        type=float,
        default=60,
        help="duration of the held snapshot (default 60; long run 600)",
    )
    parser.add_argument(
        "--large",
        type=int,
        default=1_000_000,
        help="ready tasks, and the same number done (default 1,000,000)",
    )
    parser.add_argument("--connections", type=int, default=8)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="bench-queue-") as folder:
        server = start_postgres(Path(folder) / "data", settings={"max_wal_size": "4GB", "fsync": "on"})
        try:
            result = {
                "connections": options.connections,
                "fsync": server.run("psql", "-XAtc", "SHOW fsync", "postgres").stdout.strip(),
                "tasks_per_second": asyncio.run(throughput(server, options.seconds, options.connections)),
                "claim": asyncio.run(claim_costs(server, options.snapshot_seconds, options.large)),
            }
        finally:
            server.stop()
    RESULTS.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1))
    draw(result, RESULTS / "queue.png")
    show(result)
    return 0 if all(reached for *_, reached in targets_of(result)) else 1


if __name__ == "__main__":
    sys.exit(main())
