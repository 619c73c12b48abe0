"""Benchmark of fair shares: the cost of a claim with one client and with a thousand, and each client's share.

Databases on one server take turns, so that other load of the machine affects all of them: older versions
(--before, a checkout of each), this version with one client, and this version with 1,000 clients of weights
1 to 10, one of whom has a million tasks. Then the thousand clients' tasks are claimed and settled until each
has had --rounds times its weight; shares are compared with the weights.

    git worktree add /tmp/before REVISION
    python -m bench.fair_shares [--before /tmp/before ...] [--seconds 30] [--rounds 20] [--flood 1000000]

Writes fair_shares.json into bench/results/. Exit code 1 if a target is missed.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg

from bench.queue_rivals import CATEGORIES, CLAIM, SETTLE
from local.postgres import PostgresServer, start_postgres
from router.database import connect, rows
from router.settings import ROOT
from router.task import new_call_id

RESULTS = Path(__file__).parent / "results"
CLIENTS = 1000
TASKS = 200_000  # of the databases with one client
MOST_COST = 1.15
MOST_DEVIATION = 0.05
DRAIN = """
CREATE OR REPLACE PROCEDURE drain(n integer) LANGUAGE plpgsql AS $$
DECLARE id uuid;
BEGIN
    FOR i IN 1..n LOOP
        id := uuidv7();
        PERFORM claim_task('bench', '{general}', 'w', id);
        PERFORM settle_call(id, 'answered', 'a');
        COMMIT;
    END LOOP;
END $$"""


@dataclass
class Measured:
    """A database with its connection, and the processor time of its claims in microseconds."""

    name: str
    connection: asyncpg.Connection
    fill_seconds: float
    cpu_us: list[float] = field(default_factory=list)

    def _cpu_us(self) -> float:
        """Returns the processor time of the server process: other load of the machine affects it little."""
        pid = self.connection.get_server_pid()
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1000

    async def claim(self) -> None:
        """Measures one claim, then settles it."""
        call_id = new_call_id(time.time())
        before = self._cpu_us()
        row = await self.connection.fetchrow(CLAIM, "w", call_id)
        self.cpu_us.append(self._cpu_us() - before)
        assert row is not None
        await self.connection.fetchval(
            SETTLE, call_id, row["task_id"], row["prompt_version"], row["reserved_tokens"]
        )


async def open_database(server: PostgresServer, name: str, checkout: Path, *statements: str) -> Measured:
    """Creates a database of the version in `checkout` and fills it by the statements."""
    url = server.create_database(name.replace(" ", "_"))
    code = "import sys; from router.migrations import migrate; migrate(sys.argv[1])"
    migrating = await asyncio.create_subprocess_exec(sys.executable, "-c", code, url, cwd=checkout)
    assert await migrating.wait() == 0, checkout
    with connect(url, autocommit=True) as connection:
        for category in CATEGORIES:
            rows(connection, "INSERT INTO categories VALUES (%s, %s)", (category, category == "general"))
        rows(connection, "UPDATE queue_settings SET categorise = false")
        began = time.perf_counter()
        for statement in statements:
            rows(connection, statement)
        took = time.perf_counter() - began
        rows(connection, "SELECT compact_counts()")
        rows(connection, "VACUUM ANALYZE")
    return Measured(name, await asyncpg.connect(url, server_settings={"jit": "off"}), took)


def fills(rounds: int, flood: int) -> tuple[str, ...]:
    """Statements that insert the thousand clients' tasks, the flood first; weights are 1 to 10."""
    weight = f"CASE WHEN c < {CLIENTS} THEN 1 + mod(c, 10) ELSE 1 END"
    return (
        f"INSERT INTO client_weights SELECT 'c' || c, {weight} FROM generate_series(1, {CLIENTS}) AS c",
        f"INSERT INTO tasks (prompt, client) SELECT 'p', 'c{CLIENTS}' FROM generate_series(1, {flood})",
        (
            "INSERT INTO tasks (prompt, client)"
            f" SELECT 'p', 'c' || c FROM generate_series(1, {CLIENTS - 1}) AS c,"
            f" generate_series(1, (1 + mod(c, 10)) * {rounds + 12})"
        ),
        "SELECT make_schedules_if_due()",
    )


async def costs(databases: Sequence[Measured], seconds: float) -> dict[str, dict[str, float]]:
    """Claims in turn for so many seconds. Returns mean, median and p99 of each, without the first ones."""
    until = time.perf_counter() + seconds
    number = 0
    while time.perf_counter() < until:
        for database in databases:
            await database.claim()
        number += 1
        if number == 200:
            for database in databases:
                database.cpu_us.clear()
        if number % 200 == 0:
            for database in databases:
                await database.connection.execute("SELECT heartbeat('w'), compact_counts()")
    return {one.name: _costs(one) for one in databases}


def _costs(measured: Measured) -> dict[str, float]:
    cuts = statistics.quantiles(measured.cpu_us, n=100)
    return {
        "claims": len(measured.cpu_us), "p50_us": cuts[49], "p99_us": cuts[98],
        "mean_us": statistics.mean(t for t in measured.cpu_us if t <= cuts[98]),
        "fill_seconds": measured.fill_seconds,
    }  # fmt: skip


async def shares(measured: Measured, rounds: int) -> dict[str, Any]:
    """Claims and settles `rounds` times the sum of weights. Returns the deviations from the weights."""
    connection = measured.connection
    counted = "SELECT client, count(*) FROM model_calls WHERE outcome IS NOT NULL GROUP BY 1"
    before = dict(await connection.fetch(counted))
    weights = dict(await connection.fetch("SELECT client, weight::int FROM client_weights"))
    total = sum(weights.values()) * rounds
    await connection.execute(DRAIN)
    began = time.perf_counter()
    for _ in range(rounds):
        await connection.execute(f"CALL drain({total // rounds})")
        await connection.execute("SELECT heartbeat('w'), make_schedules_if_due(), compact_counts()")
    took = time.perf_counter() - began
    got = {client: n - before.get(client, 0) for client, n in await connection.fetch(counted)}
    apart = [abs(got.get(client, 0) / (weight * rounds) - 1) for client, weight in weights.items()]
    return {
        "claims": total, "seconds": took, "clients": len(weights), "largest_deviation": max(apart),
        "mean_deviation": statistics.mean(apart),
    }  # fmt: skip


async def run(server: PostgresServer, options: argparse.Namespace) -> dict[str, Any]:
    one = f"INSERT INTO tasks (prompt) SELECT 'p' FROM generate_series(1, {TASKS})"
    databases = [
        await open_database(server, "one client", ROOT, one),
        await open_database(server, "1000 clients", ROOT, *fills(options.rounds, options.flood)),
    ]
    for checkout in reversed(options.before):
        databases.insert(0, await open_database(server, checkout.name, checkout, one))
    result = {
        "claim": await costs(databases, options.seconds),
        "shares": await shares(databases[-1], options.rounds),
    }
    for database in databases:
        await database.connection.close()
    return result


def targets_of(result: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Returns (description, target, measured) of each target; each must not be exceeded."""
    claim = result["claim"]
    seen = [("largest deviation of a client's share", MOST_DEVIATION, result["shares"]["largest_deviation"])]
    base = next(iter(claim))
    for name in claim:
        if name != base:
            ratio = claim[name]["mean_us"] / claim[base]["mean_us"]
            seen.append((f"claim, {name} against {base}", MOST_COST, ratio))
    return seen


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes the results. Returns 1 if a target is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--before", type=Path, nargs="*", default=[], help="checkouts of the versions to compare with"
    )
    parser.add_argument("--seconds", type=float, default=30, help="of claims in turn (default 30)")
    parser.add_argument("--rounds", type=int, default=20, help="claims per weight (default 20)")
    parser.add_argument(
        "--flood", type=int, default=1_000_000, help="tasks of one client (default 1,000,000)"
    )
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="bench-shares-") as folder:
        server = start_postgres(Path(folder) / "data", settings={"max_wal_size": "4GB"})
        try:
            result = asyncio.run(run(server, options))
        finally:
            server.stop()
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "fair_shares.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))
    for what, target, measured in targets_of(result):
        print(f"{what}: {measured:.3f} (at most {target:g}) {'reached' if measured <= target else 'MISSED'}")
    return 0 if all(measured <= target for _, target, measured in targets_of(result)) else 1


if __name__ == "__main__":
    sys.exit(main())
