"""Requests over a drain, through the whole router: a worker per model drains a backlog, and a client asks.

    python -m bench.interactive [--seconds 121] [--asks 100] [--json FILE]

Starts its own PostgreSQL, Redis and Models Backend. The ten models of `config/models.yaml` drain at full
targets in one process, while another asks each of them now and then by name. Prints the time from the request
to the first byte sent to the model, in pacing gaps of the model, and what arrived at the backend: use of the
targets and breaches. `bench/limiter/interactive.py` measures the limiter alone, and has the goals.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bench.answering import started
from bench.judge import Arrival, TargetChange, judge
from bench.limiter.interactive import Size, ask_times
from router.answering import Answer, Router
from router.database import connect, rows
from router.errors import RouterError
from router.models import sync_roster
from router.settings import Addresses, FallbackSettings, RouterConfig, load_config
from router.traffic import TrafficTarget
from router.workers.engine import Engine
from router.workers.worker import Worker

TASKS_PER_SECOND = 12
WARM_SECONDS = 3.0  # until all workers send
ADD_TASKS = """
INSERT INTO tasks (prompt, category)
SELECT 'Say one word: ' || n, (ARRAY['technical', 'creative', 'general'])[mod(n, 3) + 1]
  FROM generate_series(1, %s) n"""


def config() -> RouterConfig:
    """The shipped models, without a fallback."""
    return load_config().model_copy(update={"fallback": FallbackSettings(models=())})


def drain(addresses: Addresses, stop: Any) -> None:
    """Drains the queue with a worker per model until `stop` is set; runs in a process of its own."""
    asyncio.run(_drain(addresses, stop))


async def _drain(addresses: Addresses, stop: Any) -> None:
    settings = config()
    engine = Engine(addresses, settings)
    await engine.start()
    workers = [asyncio.create_task(Worker(engine, model, "bench").run()) for model in settings.models]
    await asyncio.to_thread(stop.wait)
    for worker in workers:
        worker.cancel()
    await asyncio.gather(*workers, return_exceptions=True)
    await engine.stop()


async def ask_all(addresses: Addresses, times: Sequence[tuple[float, str]]) -> list[tuple[str, float | None]]:
    """Asks each model after its seconds; returns the seconds until each request was sent (None: never)."""
    with tempfile.TemporaryDirectory() as nothing:
        router = Router(addresses, config(), Path(nothing))
        await router.open(classify=False)
        began = time.monotonic()

        async def ask(after: float, model: str) -> tuple[str, float | None]:
            await asyncio.sleep(max(0.0, began + after - time.monotonic()))
            try:
                answer: Answer = await router.answer(
                    "Why?", model=model, category="general", deadline_seconds=60
                )
            except RouterError:
                return model, None
            return model, answer.calls[0].sent_seconds

        waits = await asyncio.gather(*(ask(after, model) for after, model in times))
        await router.close()
    return waits


def measure(seconds: float, asks: int) -> dict[str, Any]:
    """Runs drain and requests; returns waits, use and breaches."""
    settings = config()
    targets = {name: TrafficTarget.parse(model.target) for name, model in settings.models.items()}
    with started() as (addresses, backend):
        with connect(addresses.database_url) as connection:
            sync_roster(connection, settings)
            rows(connection, ADD_TASKS, (round((seconds + 10) * TASKS_PER_SECOND),))
        context = multiprocessing.get_context("spawn")
        stop = context.Event()
        set_at = time.monotonic()
        worker = context.Process(target=drain, args=(addresses, stop))
        worker.start()
        while not backend.arrivals():
            time.sleep(0.1)
        time.sleep(WARM_SECONDS)
        start = time.monotonic()
        times = ask_times(Size(seconds, asks), list(targets))
        waits = asyncio.run(ask_all(addresses, times))
        time.sleep(max(0.0, start + seconds - time.monotonic()))
        until = time.monotonic()
        stop.set()
        worker.join(30)
        arrivals = [
            Arrival(call["at"], call["ended_at"], call["model"], call["request_id"],
                    call["tokens_reserved"] or 0, call["tokens_used"] or 0)
            for call in backend.arrivals() if call["ended_at"] is not None
        ]  # fmt: skip
    changes = [TargetChange(set_at, model, target) for model, target in targets.items()]
    verdict = judge(arrivals, changes, backlog_from=start, backlog_until=until, settle_seconds=0)
    in_gaps = [sent / targets[model].gap_seconds for model, sent in waits if sent is not None]
    return {
        "asks": len(waits),
        "unsent": len(waits) - len(in_gaps),
        "wait_gaps": {str(p): float(np.percentile(in_gaps, p)) for p in (50, 90, 99, 100)},
        "use": {model: one.use for model, one in verdict.models.items()},
        "breaches": verdict.breach_count,
        "waits": [(after, *wait) for (after, _), wait in zip(times, waits, strict=True)],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the result; returns 1 if a window was exceeded or a request was not sent."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.interactive", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=121.0)
    parser.add_argument("--asks", type=int, default=100)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    result = measure(options.seconds, options.asks)
    waits = ", ".join(f"p{p} {wait:.2f}" for p, wait in result["wait_gaps"].items())
    use = np.mean([share for share in result["use"].values() if share is not None])
    Console().print(
        f"{result['asks']} asks, {result['unsent']} not sent; gaps from ask to send: {waits}; "
        f"use of the targets {use:.2%}; {result['breaches']} breaches"
    )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result["breaches"] or result["unsent"] else 0


if __name__ == "__main__":
    sys.exit(main())
