"""Measures answering under load while models are healthy, fail, hang or are slow.

    python -m bench.answering [--asks N] [--at-once 50] [--ramp 1] [--deadline 2] [--only NAME] [--json FILE]

Starts its own PostgreSQL, Redis and Models Backend. For each scene it prints the latency of answers, how many
were answered and by which model, how many were replaced by better ones, the cost compared with calling the
preferred model alone ("hedge" is the rest of the cost), and that nothing is left over. The first `--at-once`
requests start one by one within `--ramp` seconds; with 0 all at the same time. "machine" is the wake-up delay
of an idle program meanwhile: on a busy machine the limits do not hold. Exits with 1 if a limit was missed:

    hanging    the preferred model never answers:  p99 <= deadline + 100 ms
    failing    it fails at once:                   p99 <= min(deadline, next in rank, fallback) + 100 ms
    slow       it answers after the deadline:      every late answer replaces the provisional one
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import requests
from rich.console import Console

from bench.answering_report import SceneResult, p99, table
from local.postgres import start_postgres
from local.redis import start_redis
from models_backend.latency import latency_seconds
from models_backend.process import BackendServer, start_backend
from router.answering import Answer, Router
from router.database import connect, rows
from router.errors import RouterError
from router.limiter import TrafficLimiter
from router.migrations import migrate
from router.models import sync_roster
from router.settings import Addresses, FallbackSettings, RouterConfig
from router.settings.models import ModelSettings
from router.settings.router import AnsweringSettings
from router.task import AnswerRank, Outcome

PREFERRED, NEXT, CHEAP = "deepseek-v3", "llama-3.3-70b", "llama-3.1-8b"
SHAPE = "even:2:8"  # seconds; divided by TIME_SCALE: 0.4 to 1.6 s
TIME_SCALE = 5.0
SLOW_SECONDS = 0.3  # the deadline of the scene in which every model is slower
SLOW_SHARE = 5  # divides the concurrency, as each request is shorter
CALL_SECONDS = 6.0  # timeout of a call that hangs
LEFT_OVER_SECONDS = CALL_SECONDS + 14.0  # the limiter counts a timed-out call for 10 s more
SLEEPER = """
import select, sys, time
late = []
while True:
    at = time.monotonic() + 0.01
    if select.select([sys.stdin], [], [], 0.01)[0]:
        break
    late.append(time.monotonic() - at)
print(sorted(late)[int(len(late) * 0.99)] if late else 0.0)
"""
NOT_REPLACED = """
SELECT count(*) AS n FROM tasks t
 WHERE coalesce(t.answer_rank, 0) < 3
   AND EXISTS (SELECT FROM model_calls c WHERE c.task_id = t.id AND c.rank = 3 AND c.outcome = 'answered')"""
SCENES = ("healthy", "failing", "hanging", "slow")


def main() -> int:
    """Runs the scenes; returns 0 if all limits hold."""
    options = _arguments()
    scenes = [options.only] if options.only else list(SCENES)
    console = Console(width=None if sys.stdout.isatty() else 160)
    results = []
    with started() as (addresses, backend):
        for scene in scenes:
            playing = play(
                scene, addresses, backend,
                asks=options.asks, at_once=options.at_once, deadline=options.deadline, ramp=options.ramp,
            )  # fmt: skip
            results.append(asyncio.run(playing))
            console.print(f"{scene}: {', '.join(results[-1].faults) or 'passed'}")
    console.print(table(results))
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in results], indent=2))
    return 1 if any(one.faults for one in results) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--asks", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=50)
    parser.add_argument("--ramp", type=float, default=1.0, help="seconds")
    parser.add_argument("--deadline", type=float, default=2.0, help="seconds")
    parser.add_argument("--only", choices=SCENES)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


@contextlib.contextmanager
def started() -> Iterator[tuple[Addresses, BackendServer]]:
    """Starts the three servers in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="router-answering-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        postgres = start_postgres(folder / "postgres", settings={"fsync": "off"})
        stack.callback(postgres.stop)
        redis = start_redis(folder / "redis")
        stack.callback(redis.stop)
        backend = start_backend(folder / "backend", "--time-scale", str(TIME_SCALE), "--latency", SHAPE)
        stack.callback(backend.stop)
        url = postgres.create_database("answering")
        migrate(url)
        yield Addresses(database_url=url, redis_url=redis.url, backend_url=backend.url), backend


def config(deadline: float) -> RouterConfig:
    """Two models in rank, a cheap one as fallback, with ample limits."""
    places = {PREFERRED: 1, NEXT: 2, CHEAP: 3}
    return RouterConfig(
        models={
            name: ModelSettings(
                target="600k/min, 5000 at once, burst",
                ranks={"general": place},
                timeout_seconds=CALL_SECONDS,
                input_price=1.0,
                output_price=2.0,
            )
            for name, place in places.items()
        },
        answering=AnsweringSettings(
            default_deadline_seconds=deadline, late_seconds=CALL_SECONDS + 1, max_models=2
        ),
        fallback=FallbackSettings(models=(CHEAP,)),
    )


async def play(
    scene: str,
    addresses: Addresses,
    backend: BackendServer,
    *,
    asks: int,
    at_once: int,
    deadline: float,
    ramp: float = 0.0,
) -> SceneResult:
    """Runs one scene, waits until all requests have ended, and collects the figures."""
    if scene == "slow":
        deadline, at_once = SLOW_SECONDS, max(1, at_once // SLOW_SHARE)
    _reset(addresses, backend, deadline)
    before = len(asyncio.all_tasks())
    settings = config(deadline)
    with tempfile.TemporaryDirectory() as nothing:
        router = Router(addresses, settings, Path(nothing))
        await router.open(classify=False)
        assert router._service is not None  # noqa: SLF001 - a bench looks inside
        limiter, pool = router._service.context.limiter, router._service.context.pool  # noqa: SLF001 - as above
        await _warm(limiter, settings)
        await _ask_all(router, [f"warm {number}" for number in range(at_once)], at_once)
        await _wait_until_ended(router)
        _clear(addresses)
        with _fault(backend, scene), machine_lateness() as late:
            prompts = [f"{scene} {number}" for number in range(asks)]
            given, upgraded = await _ask_all(router, prompts, at_once, ramp)
        await _wait_until_ended(router)
        holders = await _holders(limiter, settings)
        busy = pool.get_size() - pool.get_idle_size()
        await router.close()
    return _sum_up(
        scene, deadline, prompts, given,
        machine_late_p99=late[0], upgraded=upgraded, holders=holders, connections_busy=busy,
        addresses=addresses,
        asyncio_tasks=len(asyncio.all_tasks()) - before,
    )  # fmt: skip


async def _wait_until_ended(router: Router) -> None:
    requests = set(router._requests)  # noqa: SLF001 - as above
    await asyncio.gather(*(request.ended.wait() for request in requests))


def _reset(addresses: Addresses, backend: BackendServer, deadline: float) -> None:
    requests.delete(f"{backend.url}/faults", timeout=5).raise_for_status()
    _clear(addresses)
    with connect(addresses.database_url) as connection:
        sync_roster(connection, config(deadline))


def _clear(addresses: Addresses) -> None:
    with connect(addresses.database_url) as connection:
        rows(connection, "DELETE FROM tasks")  # TRUNCATE would invalidate every query plan
        rows(connection, "DELETE FROM model_calls")


async def _warm(limiter: TrafficLimiter, settings: RouterConfig) -> None:
    for model in settings.models:
        await limiter.cancel(await limiter.acquire(model, timeout_seconds=30))


@contextlib.contextmanager
def _fault(backend: BackendServer, scene: str) -> Iterator[None]:
    kind = {"failing": "error", "hanging": "hang"}.get(scene)
    if kind is not None:
        order = {"kind": kind, "model": PREFERRED, "share": 1, "seconds": 3600}
        requests.post(f"{backend.url}/faults", json=order, timeout=5).raise_for_status()
    yield
    requests.delete(f"{backend.url}/faults", timeout=5).raise_for_status()


@contextlib.contextmanager
def machine_lateness() -> Iterator[list[float]]:
    """Measures the p99 wake-up delay of an idle program, in seconds; appended to the list at the end."""
    program = subprocess.Popen([sys.executable, "-c", SLEEPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    found: list[float] = []
    try:
        yield found
    finally:
        out, _ = program.communicate(timeout=30)
        found.append(float(out))


async def _ask_all(
    router: Router, prompts: Sequence[str], at_once: int, ramp: float = 0.0
) -> tuple[list[Answer | None], int]:
    """Returns the first answers, and how many were replaced by the chosen model's."""
    slots = asyncio.Semaphore(at_once)

    async def ask(number: int, prompt: str) -> tuple[Answer | None, bool]:
        await asyncio.sleep(ramp * min(number / at_once, 1.0))
        async with slots:
            try:
                answer = await router.answer(prompt, category="general")
            except RouterError:
                return None, False
        best = answer
        while (better := await router.late(best)) is not None:
            best = better
        return answer, answer.provisional and best.rank is AnswerRank.CHOSEN_MODEL

    found = await asyncio.gather(*(ask(number, prompt) for number, prompt in enumerate(prompts)))
    return [answer for answer, _ in found], sum(replaced for _, replaced in found)


async def _holders(limiter: TrafficLimiter, settings: RouterConfig) -> int:
    """Returns the calls that the limiter counts as in flight after hanging calls have timed out."""
    end = time.monotonic() + LEFT_OVER_SECONDS
    while True:
        traffic = await limiter.snapshot(settings.models)
        held = sum(one.in_flight for one in traffic.values())
        if not held or time.monotonic() > end:
            return held
        await asyncio.sleep(0.2)


def _possible(scene: str, prompt: str, deadline: float, answer: Answer) -> float:
    """Returns when the prompt could have been answered, by the simulated latencies.

    The simulated models sometimes return an empty answer on purpose; then only the others count.
    """
    takes = {
        model: latency_seconds(model, prompt, shape=SHAPE, time_scale=TIME_SCALE)
        for model in (PREFERRED, NEXT, CHEAP)
    }
    for call in answer.calls:
        if call.outcome is Outcome.GARBAGE:
            takes[call.model] = deadline
    if scene == "failing":
        return min(deadline, takes[NEXT], takes[CHEAP])
    return deadline if scene == "hanging" else min(deadline, takes[PREFERRED])


def _sum_up(
    scene: str, deadline: float, prompts: Sequence[str], given: Sequence[Answer | None], *,
    addresses: Addresses, **more: Any,
) -> SceneResult:  # fmt: skip
    answers = [(prompt, answer) for prompt, answer in zip(prompts, given, strict=True) if answer is not None]
    seconds = [answer.seconds for _, answer in answers]
    possible = [_possible(scene, prompt, deadline, answer) for prompt, answer in answers]
    over = [took - could for took, could in zip(seconds, possible, strict=True)]
    with connect(addresses.database_url) as connection:
        (replaced,) = rows(connection, NOT_REPLACED)
        tasks = rows(connection, "SELECT status, count(*) AS n FROM tasks GROUP BY 1")
        (calls,) = rows(
            connection,
            "SELECT coalesce(sum(cost), 0)::float8 AS cost,"
            " coalesce(sum(cost) FILTER (WHERE role = 'asked'), 0)::float8 AS first,"
            " count(*) FILTER (WHERE outcome IS NULL) AS open FROM model_calls",
        )
    return SceneResult(
        scene=scene, asks=len(prompts), answered=len(answers),
        p50=statistics.median(seconds), p99=p99(seconds), possible_p99=p99(possible), over_p99=p99(over),
        by=dict(Counter(answer.model or "passages" for _, answer in answers)),
        provisional=sum(answer.provisional for _, answer in answers), cost=calls["cost"],
        preferred_alone=calls["first"], tasks={row["status"]: row["n"] for row in tasks},
        open_calls=calls["open"], not_replaced=replaced["n"], **more,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
