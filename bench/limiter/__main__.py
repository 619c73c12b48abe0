"""Compares the limiter with other libraries on one Redis: cost of a permit, and arrivals at the backend.

Goals: decide three limits in one call at 0.8 of the rate of a bare INCRBY; 5,000 grants/s to 1,000 waiters in
4 processes, in order and with at most one round trip each; no window at a real backend above the target, also
when 5 to 500 ms pass between grant and send; 10 bytes per send, 26 with tokens.

    python -m bench.limiter [--json FILE] [--rounds 12] [--windows 8] [--seconds 5] [--sends 20000]

Decisions are measured in turns, each between two slices of INCRBY, so that other load affects all alike. The
simulated Models Backend runs in its own process, and bench/judge judges its arrival log. Libraries that are
not installed are skipped, with the reason.

Writes limiter.json (or FILE) and limiter.png next to it. Exit code 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.limiter.clients import BURST, PACED, SLACK, Job
from bench.limiter.measures import Crew, arrivals_at_backend, bytes_a_send, decision_rates, waiters
from bench.limiter.rivals import RIVALS, Limits, missing
from bench.limiter.tables import aims_of, draw, show
from local.redis import start_redis

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Size:
    """Size of the measurement: durations, clients, and the limits used."""

    rounds: int = 12
    slice_seconds: float = 0.25
    clients: int = 1000
    processes: int = 4
    waiting_seconds: float = 5.0
    free: Limits = field(default=Limits(1_000_000, 1))
    binding: Limits = field(default=Limits(2000, 1))
    backend: Limits = field(default=Limits(100, 2))
    backend_windows: int = 8
    backend_clients: int = 50
    backend_processes: int = 2
    delay_ms: tuple[float, float] = (5.0, 500.0)
    sends: int = 20_000
    backend_rivals: tuple[str, ...] = RIVALS


async def measure(size: Size, url: str, folder: Path) -> dict[str, Any]:
    """Measures the numbers of all tables, by table and limiter."""
    left_out = {rival: why for rival in RIVALS if (why := missing(rival)) is not None}
    rivals = [rival for rival in RIVALS if rival not in left_out]
    load_before = os.getloadavg()[0]
    crew = Crew(url)
    await crew.start(max(size.processes, size.backend_processes))
    try:
        result = {
            "left_out": left_out,
            "waiters": await _waiters(size, url, crew, rivals),
            "door": await _backend(size, url, crew, rivals, folder),
        }
    finally:
        await crew.stop()
    decisions = await decision_rates(url, rivals, rounds=size.rounds, slice_seconds=size.slice_seconds)
    machine = {
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "load_before": load_before,
        "load_after": os.getloadavg()[0],
    }
    memory = await bytes_a_send(url, rivals, sends=size.sends)
    return {**result, "decisions": decisions, "bytes": memory, "machine": machine}


async def _waiters(size: Size, url: str, crew: Crew, rivals: Sequence[str]) -> dict[str, Any]:
    can_wait = [BURST, *(rival for rival in rivals if rival != "limits")]  # it does not wait itself
    clients = size.clients // size.processes

    def jobs(limits: Limits) -> list[Job]:
        return [Job(name, url, limits, clients, size.waiting_seconds) for name in can_wait]

    return {
        "clients": size.clients,
        "processes": size.processes,
        "free": await waiters(crew, jobs(size.free), size.processes),
        "binding": await waiters(crew, jobs(size.binding), size.processes),
        "binding_per_second": size.binding.count / size.binding.window_seconds,
    }


async def _backend(size: Size, url: str, crew: Crew, rivals: Sequence[str], folder: Path) -> dict[str, Any]:
    seconds = size.backend_windows * size.backend.window_seconds
    others = [rival for rival in rivals if rival in size.backend_rivals]
    jobs = [Job(name, url, size.backend, size.backend_clients, seconds) for name in (PACED, BURST, *others)]
    late = [
        Job(name, url, size.backend, size.backend_clients, seconds, delay_ms=size.delay_ms)
        for name in (SLACK, PACED, *others)
    ]
    judged = await arrivals_at_backend(crew, [*jobs, *late], folder / "door", size.backend_processes)
    rows = list(zip([job.contender for job in (*jobs, *late)], judged, strict=True))
    return {
        "target": str(size.backend.target),
        "allowed": size.backend.count,
        "windows": size.backend_windows,
        "delay_ms": size.delay_ms,
        "at_once": dict(rows[: len(jobs)]),
        "delayed": dict(rows[len(jobs) :]),
    }


def run(size: Size, json_file: Path) -> dict[str, Any]:
    """Measures on a Redis of its own, prints the tables, writes JSON and plot."""
    with tempfile.TemporaryDirectory(prefix="bench-limiter-") as folder:
        server = start_redis(Path(folder) / "redis")
        try:
            result = asyncio.run(measure(size, server.url, Path(folder)))
        finally:
            server.stop()
    result["aims"] = [aim._asdict() for aim in aims_of(result)]
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(result, indent=1))
    draw(result, json_file.with_suffix(".png"))
    show(result)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 1 if a goal is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.limiter",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, default=RESULTS / "limiter.json", metavar="FILE")
    parser.add_argument("--rounds", type=int, default=12, help="rounds of 0.25 s (default 12)")
    parser.add_argument("--windows", type=int, default=8, help="windows at the backend, 2 s each (default 8)")
    parser.add_argument("--seconds", type=float, default=5, help="seconds of waiting (default 5)")
    parser.add_argument(
        "--sends", type=int, default=20_000, help="sends to measure memory of (default 20,000)"
    )
    options = parser.parse_args(arguments)
    size = Size(
        rounds=options.rounds,
        waiting_seconds=options.seconds,
        backend_windows=options.windows,
        sends=options.sends,
    )
    result = run(size, options.json)
    return 0 if all(aim["reached"] for aim in result["aims"]) else 1


if __name__ == "__main__":
    sys.exit(main())
