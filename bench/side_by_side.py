"""Runs the old flow and the router one after the other on the same backlog and measures both.

All of the router's models use one model of the stand-in, so that a prompt's latency does not depend on the
model.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.old_flow import SCHEMA, OldFlow
from bench.schedules import OldRun, OldShape, ideal_seconds, simulate_old
from local.postgres import PostgresServer
from local.redis import RedisServer
from models_backend.answers import compose_answer
from models_backend.latency import latency_seconds
from models_backend.process import start_backend
from router.database import connect, rows
from router.migrations import migrate
from router.models import sync_roster
from router.settings import ROOT, Addresses, RouterConfig
from router.settings.models import ModelSettings
from router.workers import Engine, Worker

ENDPOINT = "bench"
MODELS = tuple(f"model-{number:02}" for number in range(1, 11))
CATEGORY = "general"  # one category, so that tasks are taken in the ideal's order
MAX_TOKENS = 128
POINTS = 400
LOOK_SECONDS = 0.05
START_SECONDS = 60.0
OVERTIME = 20.0  # times the ideal, after which the run is given up

# shape -> the stand-in's --latency and time scale: 60 to 90 calls per second, which a small machine
# sustains, so that the schedule is measured and not the machine.
SHAPES = {
    "even": ("even:1:120", 20.0),
    "lognormal": ("lognormal:12:1:1:120", 8.0),
    "llmperf": ("llmperf", 1.2),
}


@dataclass(frozen=True)
class Bench:
    """Parameters. `old` is in real seconds; `time_scale` replaces that of the shapes."""

    tasks: int = 5000
    seed: int = 0
    time_scale: float | None = None
    old: OldShape = field(default_factory=OldShape)


@dataclass(frozen=True)
class Parts:
    """Services that both flows use."""

    postgres: PostgresServer
    redis: RedisServer
    folder: Path


@dataclass(frozen=True)
class Flow:
    """Result of one flow in real seconds: measured seconds times the time scale.

    `busy_share` is the used share of its slots until the last send; `late_ms` is the mean number of
    milliseconds (as measured) by which a call exceeded its drawn latency.
    """

    seconds: float
    calls: int
    most_at_once: int
    last_send_seconds: float
    busy_share: float
    late_ms: float
    at: list[float] = field(repr=False)
    in_flight: list[float] = field(repr=False)
    answered: list[int] = field(repr=False)


@dataclass(frozen=True)
class Result:
    """Results of one latency shape; times in real seconds."""

    shape: str
    latency: str
    time_scale: float
    tasks: int
    old: Flow
    new: Flow
    old_runs: int
    old_simulated: OldRun
    ideal_seconds: float
    load_average: float

    @property
    def gain(self) -> float:
        """Speed-up of the router."""
        return self.old.seconds / self.new.seconds

    @property
    def ideal_gain(self) -> float:
        """Speed-up of the ideal."""
        return self.old.seconds / self.ideal_seconds

    @property
    def share(self) -> float:
        """The router's share of the ideal's speed-up."""
        return self.ideal_seconds / self.new.seconds


@dataclass(frozen=True)
class _Began:
    """Start of a flow on the arrival log's clock and on Postgres's."""

    monotonic: float
    wall: float
    runs: int = 1


def prompts(count: int, seed: int) -> list[str]:
    """`count` distinct prompts with a non-empty answer of the stand-in, so that none is retried."""
    lines = (ROOT / "bench" / "demo_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [str(json.loads(line)["prompt"]) for line in lines if line.strip()]
    found: list[str] = []
    number = 0
    while len(found) < count:
        prompt = f"{texts[number % len(texts)]} ({number})"
        if compose_answer(ENDPOINT, prompt, seed=seed).text.strip():
            found.append(prompt)
        number += 1
    return found


def drawn_latencies(shape: str, count: int, seed: int) -> list[float]:
    """Latencies (real seconds) of the prompts, in order."""
    latency, _ = SHAPES[shape]
    return [latency_seconds(ENDPOINT, text, seed=seed, shape=latency) for text in prompts(count, seed)]


def measure(shape: str, bench: Bench, parts: Parts) -> Result:
    """Runs both flows on one latency shape, each with its own database and stand-in."""
    latency, usual_scale = SHAPES[shape]
    scale = bench.time_scale or usual_scale
    texts = prompts(bench.tasks, bench.seed)
    drawn = drawn_latencies(shape, bench.tasks, bench.seed)
    ideal = ideal_seconds(drawn, bench.old.at_once)
    arguments = ("--latency", latency, "--time-scale", str(scale), "--seed", str(bench.seed),
                 "--also", ENDPOINT)  # fmt: skip

    old_url = parts.postgres.create_database(f"old_{shape}")
    backend = start_backend(parts.folder / f"old-{shape}", *arguments)
    try:
        old_began = _solve_old(old_url, backend.url, texts, bench.old, scale)
    finally:
        backend.stop()
    new_url = parts.postgres.create_database(f"new_{shape}")
    backend_of_new = start_backend(parts.folder / f"new-{shape}", *arguments)
    try:
        addresses = Addresses(database_url=new_url, redis_url=parts.redis.url, backend_url=backend_of_new.url)
        new_began = _solve_new(addresses, texts, bench.old.at_once, START_SECONDS + OVERTIME * ideal / scale)
    finally:
        backend_of_new.stop()
    given: dict[str, Any] = {"drawn_seconds": sum(drawn), "scale": scale, "at_once": bench.old.at_once}
    return Result(
        shape=shape, latency=latency, time_scale=scale, tasks=len(texts),
        old=_flow(old_url, backend.arrivals(), old_began, **given),
        new=_flow(new_url, backend_of_new.arrivals(), new_began, **given),
        old_runs=old_began.runs, old_simulated=simulate_old(drawn, bench.old), ideal_seconds=ideal,
        load_average=os.getloadavg()[0],
    )  # fmt: skip


def _solve_old(url: str, backend_url: str, texts: Sequence[str], shape: OldShape, scale: float) -> _Began:
    with connect(url) as connection:
        rows(connection, SCHEMA)
        rows(connection, "INSERT INTO tasks (prompt) SELECT unnest(%s)", (list(texts),))
    flow = OldFlow(url, backend_url, ENDPOINT, MAX_TOKENS, shape, scale)
    monotonic, wall = time.monotonic(), time.time()
    return _Began(monotonic, wall, flow.solve_all())


def _solve_new(addresses: Addresses, texts: Sequence[str], at_once: int, patience_seconds: float) -> _Began:
    target = f"{at_once // len(MODELS)} at once, burst"
    config = RouterConfig(
        models={name: _model(target, place) for place, name in enumerate(MODELS, start=1)},
        categories=(CATEGORY,),
    )
    migrate(addresses.database_url)
    with connect(addresses.database_url) as connection:
        sync_roster(connection, config)
        insert = "INSERT INTO tasks (prompt, category) SELECT unnest(%s), %s"
        rows(connection, insert, (list(texts), CATEGORY))
    return asyncio.run(_run_engine(Engine(addresses, config), len(texts), patience_seconds))


def _model(target: str, place: int) -> ModelSettings:
    return ModelSettings(endpoint=ENDPOINT, target=target, ranks={CATEGORY: place}, max_tokens=MAX_TOKENS)


async def _run_engine(engine: Engine, tasks: int, patience_seconds: float) -> _Began:
    await engine.start()
    try:
        began = _Began(time.monotonic(), time.time())
        workers = [Worker(engine, model, "bench", frozenset(MODELS)) for model in MODELS]
        running = [asyncio.create_task(worker.run(), name=f"worker {worker.model}") for worker in workers]
        while engine.solved < tasks:
            if time.monotonic() - began.monotonic > patience_seconds or any(task.done() for task in running):
                raise RuntimeError(f"The router stopped at {engine.solved} of {tasks} tasks.")
            await asyncio.sleep(LOOK_SECONDS)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        return began
    finally:
        await engine.stop()


def _flow(
    url: str, calls: list[dict[str, Any]], began: _Began, *, drawn_seconds: float, scale: float, at_once: int
) -> Flow:
    """Measures one flow from Postgres and the stand-in's arrival log."""
    with connect(url) as connection:
        select = "SELECT extract(epoch FROM solved_at)::float8 AS at FROM tasks WHERE status = 'solved'"
        solved = rows(connection, select)
    answered = (np.sort([row["at"] for row in solved]) - began.wall) * scale
    sent = (np.sort([call["at"] for call in calls]) - began.monotonic) * scale
    ended = (np.sort([call["ended_at"] for call in calls]) - began.monotonic) * scale
    steps = np.concatenate([np.ones(len(sent)), -np.ones(len(ended))])
    order = np.argsort(np.concatenate([sent, ended]), kind="stable")
    last_send = float(sent[-1])
    busy = float(np.minimum(ended, last_send).sum() - sent.sum())
    at = np.linspace(0.0, float(answered[-1]), POINTS)
    in_flight = np.searchsorted(sent, at, side="right") - np.searchsorted(ended, at, side="right")
    return Flow(
        seconds=float(answered[-1]),
        calls=len(calls),
        most_at_once=int(np.cumsum(steps[order]).max()),
        last_send_seconds=last_send,
        busy_share=busy / (at_once * last_send) if last_send > 0 else 1.0,
        late_ms=float((ended.sum() - sent.sum() - drawn_seconds) / len(calls) / scale * 1000),
        at=at.tolist(),
        in_flight=in_flight.tolist(),
        answered=np.searchsorted(answered, at, side="right").tolist(),
    )
