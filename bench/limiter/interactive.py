"""Interactive requests over a full drain: time from ask to send, and what batch calls lose by it.

Ten models drain an endless backlog at full targets from several processes, while other processes ask each
of them now and then. Ten more with the same targets drain next to them, and nobody asks those. All use one
Redis; `bench/judge` judges all sends.

    python -m bench.limiter.interactive [--seconds 121] [--asks 200] [--random] [--rule off] [--json FILE]

Asks to one model are spread over the time, as of two within the same gap only one can be sent in it;
`--random` draws them independently. `--rule off` asks without right of way, for comparison. Goals: p50 at
most 1.1 and p99 at most 2 pacing gaps, batch use of what the asks leave at least 99 %, no breach. Exit code 1
if one is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import redis.asyncio
from rich.console import Console
from rich.table import Table

from bench.judge import Arrival, TargetChange, judge
from bench.judge.ideal import replay_ideal
from local.redis import start_redis
from router.errors import LimiterError
from router.limiter import TrafficLimiter
from router.traffic import TrafficTarget

LINES = (
    *("80/min, 4/s", "55/min", "48/min", "55/min, 3/s", "42/min"),
    *("45/min", "42/min", "48/min", "40/min", "45/min"),
)
CLAIM_SECONDS = 0.005  # what a worker needs between seeing that it may send and asking for the permit
HOLD_SECONDS = 1.0  # as in router/workers/pull_loop.py
START_SECONDS = 60.0

_gate: Any = None  # of all processes, until each has started


@dataclass(frozen=True)
class Job:
    """Work of one process: it drains all models, or asks some of them after so many seconds."""

    url: str
    seconds: float
    models: tuple[str, ...]
    asks: tuple[tuple[float, str], ...] = ()
    interactive: bool = True


@dataclass(frozen=True)
class Size:
    """Size of the measurement."""

    seconds: float = 121.0
    asks: int = 200
    spread: bool = True
    rule: bool = True
    batch_processes: int = 2
    asking_processes: int = 2
    lines: tuple[str, ...] = LINES
    seed: int = 1


def use_gate(gate: Any) -> None:
    """Sets the gate at which a process waits for the others."""
    global _gate  # noqa: PLW0603 - a barrier reaches a process only at its start
    _gate = gate


def run_job(job: Job) -> tuple[float, list[tuple[str, float, float]]]:
    """Returns when it began, and (model, asked at, sent at) of each send; batch sends were asked at 0."""
    _gate.wait(START_SECONDS)
    began = time.monotonic()
    return began, asyncio.run(_run(job, began))


async def _run(job: Job, began: float) -> list[tuple[str, float, float]]:
    client = redis.asyncio.Redis.from_url(job.url)
    sends: list[tuple[str, float, float]] = []
    async with TrafficLimiter(client) as limiter:
        if job.asks:
            await asyncio.gather(
                *(_ask(limiter, job, began + after, model, sends) for after, model in job.asks)
            )
        else:
            tasks = [asyncio.create_task(_drain(limiter, model, sends), name=model) for model in job.models]
            await asyncio.sleep(max(0.0, began + job.seconds - time.monotonic()))
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    await client.aclose()
    return sends


async def _drain(limiter: TrafficLimiter, model: str, sends: list[tuple[str, float, float]]) -> None:
    """Sends as a pull loop does."""
    while True:
        await limiter.wait_until_available(model)
        await asyncio.sleep(CLAIM_SECONDS)
        try:
            permit = await limiter.acquire(model, timeout_seconds=HOLD_SECONDS)
            permit.check()
        except LimiterError:
            continue
        sends.append((model, 0.0, time.monotonic()))


async def _ask(
    limiter: TrafficLimiter, job: Job, at: float, model: str, sends: list[tuple[str, float, float]]
) -> None:
    await asyncio.sleep(max(0.0, at - time.monotonic()))
    asked_at = time.monotonic()
    permit = await limiter.acquire(model, timeout_seconds=60, interactive=job.interactive)
    permit.check()
    sends.append((model, asked_at, time.monotonic()))


def ask_times(size: Size, models: Sequence[str]) -> list[tuple[float, str]]:
    """Returns after how many seconds each model is asked."""
    chance = random.Random(size.seed)
    each, last = size.asks // len(models), size.seconds - 6.0
    times = []
    for model in models:
        phase = chance.random()
        for number in range(each):
            part = chance.random() * each if not size.spread else number + 0.5 * phase + 0.5 * chance.random()
            times.append((part / each * last, model))
    return sorted(times)


async def _set_targets(url: str, targets: dict[str, str]) -> None:
    client = redis.asyncio.Redis.from_url(url)
    async with TrafficLimiter(client) as limiter:
        for model, line in targets.items():
            await limiter.set_target(model, line)
    await client.aclose()


def measure(size: Size, folder: Path) -> dict[str, Any]:
    """Runs all processes on a Redis of their own, and judges their sends."""
    asked = {f"asked-{number}": line for number, line in enumerate(size.lines)}
    quiet = {f"quiet-{number}": line for number, line in enumerate(size.lines)}
    targets = {**asked, **quiet}
    server = start_redis(folder / "redis")
    try:
        asyncio.run(_set_targets(server.url, targets))
        set_at = time.monotonic()
        times = ask_times(size, list(asked))
        jobs = [Job(server.url, size.seconds, tuple(targets)) for _ in range(size.batch_processes)]
        jobs += [
            Job(
                server.url,
                size.seconds,
                tuple(asked),
                tuple(times[number :: size.asking_processes]),
                size.rule,
            )
            for number in range(size.asking_processes)
        ]
        context = multiprocessing.get_context("spawn")
        with context.Pool(len(jobs), use_gate, (context.Barrier(len(jobs)),)) as pool:
            ran = pool.map(run_job, jobs, chunksize=1)
    finally:
        server.stop()
    until = min(began for began, _ in ran) + size.seconds
    return _result(size, targets, [send for _, sends in ran for send in sends], set_at, until)


def _result(
    size: Size, targets: dict[str, str], sends: list[tuple[str, float, float]], set_at: float, until: float
) -> dict[str, Any]:
    changes = [TargetChange(set_at, model, TrafficTarget.parse(line)) for model, line in targets.items()]
    arrivals = [
        Arrival(at, at + 0.001, model, f"{model}-{number}") for number, (model, _, at) in enumerate(sends)
    ]
    breaches = judge(arrivals, changes, backlog_from=None, backlog_until=None).breach_count
    gaps = {change.model: change.target.gap_seconds for change in changes}
    waits = [(at - asked_at) / gaps[model] for model, asked_at, at in sends if asked_at]
    rows = {}
    for change in changes:
        own = [(asked_at, at) for model, asked_at, at in sends if model == change.model and at <= until]
        batch = sum(not asked_at for asked_at, _ in own)
        ideal = len(replay_ideal([change], [0.001], min(at for _, at in own), until))
        rows[change.model] = {"batch": batch, "asks": len(own) - batch, "ideal": ideal}

    def use(prefix: str) -> float:
        those = [row for model, row in rows.items() if model.startswith(prefix)]
        return sum(row["batch"] for row in those) / sum(row["ideal"] - row["asks"] for row in those)

    return {
        "asks": len(waits),
        "wait_gaps": {str(p): float(np.percentile(waits, p)) for p in (50, 90, 99, 100)},
        "batch_use_asked": use("asked"),
        "batch_use_quiet": use("quiet"),
        "breaches": breaches,
        "models": rows,
        "rule": size.rule,
        "spread": size.spread,
        "seconds": size.seconds,
    }


def goals(result: dict[str, Any]) -> dict[str, bool]:
    """Returns which goals are reached."""
    return {
        "p50 at most 1.1 gaps": result["wait_gaps"]["50"] <= 1.1,
        "p99 at most 2 gaps": result["wait_gaps"]["99"] <= 2,
        "batch use at least 99 %": result["batch_use_asked"] >= 0.99,
        "no breach": result["breaches"] == 0,
    }


def show(result: dict[str, Any]) -> None:
    """Prints the table."""
    table = Table(title=f"{result['asks']} asks over a drain of {result['seconds']:.0f} s")
    waits_of = ("ask to send, gaps: p50", "p90", "p99", "longest")
    for column in (*waits_of, "batch use", "nobody asks", "breaches"):
        table.add_column(column, justify="right")
    waits = (f"{wait:.2f}" for wait in result["wait_gaps"].values())
    uses = (f"{result[use]:.2%}" for use in ("batch_use_asked", "batch_use_quiet"))
    table.add_row(*waits, *uses, str(result["breaches"]))
    console = Console()
    console.print(table)
    for goal, reached in goals(result).items():
        console.print(f"{goal}: {'reached' if reached else 'MISSED'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 1 if a goal is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.limiter.interactive", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=Size.seconds)
    parser.add_argument("--asks", type=int, default=Size.asks)
    parser.add_argument("--random", action="store_true", help="draw the time of each ask independently")
    parser.add_argument("--rule", choices=("on", "off"), default="on")
    parser.add_argument("--seed", type=int, default=Size.seed)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    size = Size(
        options.seconds, options.asks, spread=not options.random, rule=options.rule == "on", seed=options.seed
    )
    with tempfile.TemporaryDirectory(prefix="bench-interactive-") as folder:
        result = measure(size, Path(folder))
    show(result)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(goals(result).values()) else 1


if __name__ == "__main__":
    sys.exit(main())
