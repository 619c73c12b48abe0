"""Soak test: a million sends by several processes while targets change every few seconds.

Each process has its own limiter and a clock that is wrong by hours. Sends are datagrams that the kernel
timestamps on arrival; `bench/judge` judges them against the history of targets. With `--late` one send in a
hundred is 2 s late, after its permit expired.

    python -m bench.limiter.soak [--seconds 770] [--rate 1500] [--processes 8] [--late] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import redis.asyncio
from rich.console import Console

from bench.judge import TargetChange, Verdict, judge, print_verdict
from bench.limiter.arrival_server import ArrivalServer, arrivals_of, read_log
from bench.limiter.senders import MODELS, Crew, run_crew
from local.redis import start_redis
from router.limiter import TrafficLimiter
from router.traffic import TrafficTarget

GRACE_SECONDS = 0.5  # for the last arrivals
MAX_SHARE = 0.52  # of the rate, for one model
MIN_USAGE = {"minute": 0.995, "second": 0.94}


@dataclass(frozen=True)
class Soak:
    """Settings: `rate` sends per second in total, over `processes`, for `seconds`.

    With `minute_bursts` a raised target of a minute lets thousands be sent at once, as fast as the processor
    can. No window may be exceeded then either, but usage of the other models is limited by the processor.
    """

    seconds: float = 770.0
    rate: float = 1500.0
    processes: int = 8
    late: bool = False
    change_seconds: tuple[float, float] = (3.0, 6.0)
    minute_bursts: bool = False
    seed: int = 1

    @property
    def waiters(self) -> int:
        """Waiters per model and process: a second of sends, so that there is always a backlog."""
        return max(12, round(self.rate * MAX_SHARE / self.processes))


@dataclass(frozen=True)
class Outcome:
    """Result. Transit is from the check of the permit to the arrival, in milliseconds."""

    soak: Soak
    sent: int
    arrived: int
    died: dict[str, int]
    transit_ms: dict[str, float]
    seconds: float
    target_changes: int
    verdict: Verdict

    def as_json(self) -> dict[str, Any]:
        rest = {"sent": self.sent, "arrived": self.arrived, "died": self.died, "transit_ms": self.transit_ms}
        more = {"seconds": self.seconds, "target_changes": self.target_changes}
        return {"soak": asdict(self.soak), **rest, **more, **self.verdict.as_json()}


def lines(soak: Soak, chance: random.Random) -> dict[str, str]:
    """Returns a target per model near its share of the rate, with a varying tightest limit."""
    minute, second, mixed = (share * soak.rate * chance.uniform(0.7, 1.3) for share in (0.4, 0.4, 0.2))
    tokens = minute * 60 * 500 * chance.uniform(0.9, 1.6) / 1000
    burst = chance.choice(["", ", burst"])
    minute_burst = burst if soak.minute_bursts else ""
    at_once = max(1, round(mixed * 0.05 * chance.uniform(0.8, 2)))
    return {
        "minute": f"{round(minute * 60)}/min, {round(tokens)}k tokens/min{minute_burst}",
        "second": f"{max(1, round(second))}/s{burst}",
        "mixed": f"{max(1, round(mixed * 1.1))}/s, {max(1, round(mixed * 60))}/min, {at_once} at once",
    }


async def keep_changing(url: str, soak: Soak, until: float) -> list[TargetChange]:
    """Sets new targets every few seconds; returns the changes."""
    chance = random.Random(soak.seed)
    changes: list[TargetChange] = []
    client = redis.asyncio.Redis.from_url(url)
    async with TrafficLimiter(client) as limiter:
        while time.monotonic() < until:
            for model, line in lines(soak, chance).items():
                changes.append(TargetChange(time.monotonic(), model, TrafficTarget.parse(line)))
                await limiter.set_target(model, line)
            await asyncio.sleep(min(chance.uniform(*soak.change_seconds), max(0.0, until - time.monotonic())))
    await client.aclose()
    return changes


def run(soak: Soak, folder: Path) -> Outcome:
    """Starts arrival server, Redis and senders; judges the arrivals."""
    context = multiprocessing.get_context("spawn")
    server = start_redis(folder / "redis")
    arrival_server = ArrivalServer(folder / "arrivals.bin", soak.processes)
    logger = context.Process(target=arrival_server.serve, name="arrival server")
    logger.start()
    started = time.monotonic() + 2.0 + soak.processes * 0.5  # for the start of interpreters
    try:
        with context.Pool(soak.processes) as pool:
            crews = [
                Crew(
                    server.url,
                    arrival_server.ports[number],
                    number,
                    started,
                    soak.seconds,
                    soak.late,
                    soak.seed,
                    soak.waiters,
                )
                for number in range(soak.processes)
            ]
            counting = pool.map_async(run_crew, crews, chunksize=1)
            changes = asyncio.run(keep_changing(server.url, soak, started + soak.seconds))
            counts = counting.get(timeout=60)
        time.sleep(GRACE_SECONDS)
    finally:
        arrival_server.close()
        logger.join(10)
        if logger.is_alive():
            logger.kill()
        server.stop()
    log = read_log(folder / "arrivals.bin")
    arrivals = arrivals_of(log, MODELS)
    times = [arrival.at for arrival in arrivals]
    verdict = judge(
        arrivals,
        changes,
        backlog_from=started + 1.0,
        backlog_until=started + soak.seconds - 1.0,
        tokens="reserved",
    )
    begun = log[log["kind"] == 0]
    transit = (begun["at"] - begun["checked_at"]) / 1e6
    percentiles = (
        {str(p): float(np.percentile(transit, p)) for p in (50, 99, 99.9, 100)} if len(transit) else {}
    )
    died = {model: sum(died[model] for _, died in counts) for model in MODELS}
    return Outcome(
        soak,
        sum(sent for sent, _ in counts),
        len(arrivals),
        died,
        percentiles,
        max(times, default=0.0) - min(times, default=0.0),
        len(changes),
        verdict,
    )


def print_outcome(outcome: Outcome) -> None:
    """Prints the judge's table, sends, expired permits and transit."""
    console = Console()
    print_verdict(outcome.verdict, console)
    transit = ", ".join(f"p{p} {ms:.2f} ms" for p, ms in outcome.transit_ms.items())
    console.print(
        f"{outcome.sent:,} sent, {outcome.arrived:,} arrived in {outcome.seconds:.0f} s; "
        f"{sum(outcome.died.values()):,} permits expired; {outcome.target_changes} changes of targets"
    )
    console.print(f"transit from the permit check to arrival: {transit}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the soak test; returns 1 if a window was exceeded or a datagram was lost."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.limiter.soak", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--seconds", type=float, default=Soak.seconds)
    parser.add_argument("--rate", type=float, default=Soak.rate, help="sends per second, all models together")
    parser.add_argument("--processes", type=int, default=Soak.processes)
    parser.add_argument("--late", action="store_true", help="one send in a hundred is 2 s late")
    parser.add_argument("--seed", type=int, default=Soak.seed)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    soak = Soak(options.seconds, options.rate, options.processes, options.late, seed=options.seed)
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(soak, Path(folder))
    print_outcome(outcome)
    if options.json:
        with contextlib.suppress(FileExistsError):
            options.json.parent.mkdir(parents=True)
        options.json.write_text(json.dumps(outcome.as_json(), indent=1) + "\n")
    return 1 if outcome.verdict.breach_count or outcome.sent != outcome.arrived else 0


if __name__ == "__main__":
    sys.exit(main())
