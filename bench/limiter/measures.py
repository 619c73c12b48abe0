"""Measurements of each limiter, all against one Redis.

Round trips are Redis's count of reads from clients (`total_reads_processed`): a script call or a pipeline is
one, commands inside a script are none.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import redis.asyncio

from bench.judge import Arrival, TargetChange, judge
from bench.limiter.clients import BURST, CLIENT, ONE, OURS, THREE, Job, gate_of
from bench.limiter.rivals import MODEL, Gate, Limits, Router
from models_backend.process import ROOT, start_backend

BASELINE = "INCRBY"
START_SECONDS = 0.2
CLIENT_SECONDS = 60.0
MAX_LINE = 64 * 1024 * 1024
UNLIMITED = Limits(10_000_000, 1)
LONG_WINDOW_SECONDS = 3600
TOKENS_A_CALL = 100
FEW = 300  # sends, where each token costs memory


async def reads(client: redis.asyncio.Redis) -> int:
    """Returns the round trips so far, including this one."""
    return int((await client.info("stats"))["total_reads_processed"])


@dataclass
class _Contender:
    name: str
    gate: Gate
    per_second: list[float]
    ratios: list[float]
    decisions: int = 0
    round_trips: int = 0


async def decision_rates(
    url: str, rivals: Sequence[str], *, rounds: int, slice_seconds: float
) -> dict[str, Any]:
    """Measures sequential decisions, also relative to the rate of a bare INCRBY.

    Each slice is between two slices of INCRBY through the same client, and is compared with both.
    """
    server = url.rpartition("/")[0]
    contenders = [
        _Contender(name, gate_of(name, f"{server}/{database}", UNLIMITED), [], [])
        for database, name in enumerate((THREE, ONE, CLIENT, *rivals), start=1)
    ]
    incrby: list[float] = []
    for contender in contenders:
        await contender.gate.redis.flushdb()
        await contender.gate.open()
        await _slice(contender.gate.decide, slice_seconds / 4)
    client = contenders[0].gate.redis
    try:
        for _ in range(rounds):
            before = await _slice(lambda: client.incrby("bench", 1), slice_seconds)
            for contender in contenders:
                reads_before = await reads(client)
                rate, made = await _slice(contender.gate.decide, slice_seconds)
                contender.round_trips += await reads(client) - reads_before - 1
                after = await _slice(lambda: client.incrby("bench", 1), slice_seconds)
                contender.per_second.append(rate)
                contender.ratios.append(2 * rate / (before[0] + after[0]))
                contender.decisions += made
                incrby.append(after[0])
                before = after
    finally:
        for contender in contenders:
            await contender.gate.close()
    return {BASELINE: {"per_second": statistics.median(incrby)}, **{c.name: _rate(c) for c in contenders}}


def _rate(contender: _Contender) -> dict[str, Any]:
    return {
        "per_second": statistics.median(contender.per_second),
        "of_incrby": statistics.median(contender.ratios),
        "of_incrby_lowest": min(contender.ratios),
        "of_incrby_highest": max(contender.ratios),
        "round_trips_per_decision": contender.round_trips / contender.decisions,
    }


async def _slice(act: Any, seconds: float) -> tuple[float, int]:
    """Repeats `act` for a duration; returns (times per second, times)."""
    began = time.perf_counter()
    done = 0
    while (now := time.perf_counter()) - began < seconds or not done:
        await act()
        done += 1
    return done / (now - began), done


class Crew:
    """Client processes, started once and used for all jobs."""

    def __init__(self, url: str) -> None:
        self._children: list[asyncio.subprocess.Process] = []
        self._client: redis.asyncio.Redis = redis.asyncio.Redis.from_url(url)

    async def start(self, processes: int) -> None:
        """Starts the processes, which wait for jobs."""
        command = (sys.executable, "-m", "bench.limiter.clients")
        for _ in range(processes):
            child = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=ROOT,
                limit=MAX_LINE,
            )  # fmt: skip
            self._children.append(child)

    async def stop(self) -> None:
        """Ends the processes by closing their stdin."""
        for child in self._children:
            if child.stdin is not None:
                child.stdin.close()
        leaving = [asyncio.ensure_future(child.wait()) for child in self._children]
        _, late = await asyncio.wait(leaving, timeout=CLIENT_SECONDS)
        if late:
            for child in self._children:
                if child.returncode is None:
                    child.kill()
            await asyncio.wait(late)
        await self._client.aclose()

    async def do(self, job: Job, processes: int) -> dict[str, Any]:
        """Runs the job in several processes on an empty Redis; returns the summed results."""
        await self._client.flushall()
        children = self._children[:processes]
        for number, child in enumerate(children):
            _write(child, replace(job, number=number).as_line())
        for child in children:
            await _read(child, CLIENT_SECONDS)
        start_at = time.monotonic() + START_SECONDS
        before = await reads(self._client)
        for child in children:
            _write(child, f"{start_at}")
        await asyncio.sleep(start_at + job.seconds - time.monotonic())
        round_trips = await reads(self._client) - before - 1
        seen = [json.loads(await _read(child, CLIENT_SECONDS)) for child in children]
        added = {name: sum(one[name] for one in seen) for name in ("grants", "overtaken", "unused")}
        sent = dict(pair for one in seen for pair in one["sent"])
        return {**added, "sent": sent, "start_at": start_at, "round_trips": round_trips}


def _write(child: asyncio.subprocess.Process, line: str) -> None:
    assert child.stdin is not None
    child.stdin.write(f"{line}\n".encode())


async def _read(child: asyncio.subprocess.Process, seconds: float) -> str:
    assert child.stdout is not None
    line = await asyncio.wait_for(child.stdout.readline(), seconds)
    if not line:
        raise RuntimeError("A client process ended early; see its output above.")
    return line.decode().strip()


async def waiters(crew: Crew, jobs: Sequence[Job], processes: int) -> dict[str, Any]:
    """Measures grants per second to clients that wait for one model, and the cost of a grant."""
    result = {}
    for job in jobs:
        seen = await crew.do(job, processes)
        grants = max(1, seen["grants"])
        result[job.contender] = {
            "grants_per_second": seen["grants"] / job.seconds,
            "round_trips_per_grant": seen["round_trips"] / grants,
            "overtaken": seen["overtaken"] / grants,
        }
    return result


async def arrivals_at_backend(
    crew: Crew, jobs: Sequence[Job], folder: Path, processes: int
) -> list[dict[str, Any]]:
    """Measures for each job the worst rolling window of arrivals at a simulated backend, and the usage."""
    names = [f"bench-{number}" for number in range(len(jobs))]
    also = [argument for name in names for argument in ("--also", name)]
    backend = start_backend(folder, *also, "--latency", "even:1:2", "--time-scale", "1000")
    try:
        seen = [
            await crew.do(replace(job, backend_url=backend.url, backend_model=name), processes)
            for job, name in zip(jobs, names, strict=True)
        ]
    finally:
        backend.stop()
    calls: dict[str, list[Arrival]] = {name: [] for name in names}
    for call in backend.arrivals():
        calls[call["model"]].append(Arrival(call["at"], call["ended_at"], MODEL, call["request_id"]))
    return [_judged(job, one, calls[name]) for job, one, name in zip(jobs, seen, names, strict=True)]


def _judged(job: Job, seen: dict[str, Any], arrivals: Sequence[Arrival]) -> dict[str, Any]:
    target = TargetChange(seen["start_at"] - 1, MODEL, job.limits.target)
    end_at = seen["start_at"] + job.seconds - 0.001
    verdict = judge(
        arrivals, [target], backlog_from=seen["start_at"], backlog_until=end_at, settle_seconds=0
    ).models[MODEL]
    transit = [a.at - seen["sent"][a.request_id] for a in arrivals if a.request_id in seen["sent"]]
    return {
        "sent": len(arrivals),
        "most_in_a_window": round(verdict.worst_window_ratio * job.limits.count),
        "worst_window_ratio": verdict.worst_window_ratio,
        "too_many": verdict.breach_count,
        "use": verdict.use,
        "unused_grants": seen["unused"],
        "round_trips_per_send": seen["round_trips"] / max(1, len(arrivals)),
        "transit_p999_ms": float(np.quantile(transit, 0.999)) * 1000 if transit else 0.0,
        "transit_longest_ms": max(transit, default=0.0) * 1000,
        "transit_slack_ms": _transit_slack(job) * 1000,
    }


def _transit_slack(job: Job) -> float:
    """Returns the transit slack of ours; 0 for rivals, which have none."""
    if job.contender not in OURS:
        return 0.0
    gate = gate_of(job.contender, job.redis_url, job.limits, late_seconds=job.delay_ms[1] / 1000)
    assert isinstance(gate, Router)
    return gate.transit_slack


async def bytes_a_send(url: str, rivals: Sequence[str], *, sends: int) -> dict[str, Any]:
    """Measures Redis's memory per send within the window: MEMORY USAGE of all keys / sends."""
    result: dict[str, Any] = {}
    for name in (BURST, *rivals):
        plain = await _memory(name, url, Limits(4 * sends, LONG_WINDOW_SECONDS), sends, 0)
        budget = 4 * sends * TOKENS_A_CALL
        limits = Limits(4 * sends, LONG_WINDOW_SECONDS, budget)
        costly = gate_of(name, url, limits).own_cost_of_tokens
        with_tokens = await _memory(name, url, limits, min(sends, FEW) if costly else sends, TOKENS_A_CALL)
        result[name] = {"bytes": plain, "bytes_with_tokens": with_tokens}
    return result


async def _memory(name: str, url: str, limits: Limits, sends: int, tokens: int) -> float:
    gate = gate_of(name, url, limits)
    await gate.redis.flushall()
    await gate.open()
    try:
        for _ in range(sends):
            await gate.leave(await gate.decide(tokens))
        keys = [key async for key in gate.redis.scan_iter(count=1000)]
        held = [await gate.redis.memory_usage(key, samples=0) for key in keys]
    finally:
        await gate.close()
    return float(sum(filter(None, held))) / sends
