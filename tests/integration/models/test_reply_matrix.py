"""Every kind of reply x {worker, request, trial}: task, limiter and evidence as the table of replies says."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio

from local.redis import RedisServer
from router.answering.router import Router
from router.database import connect, rows
from router.errors import RouterError
from router.learning.review import sum_evidence
from router.limiter.breaker import BreakerSettings, Signal
from router.models.direct_calls import DirectCaller
from router.models.roster import read_roster, sync_roster
from router.settings.environment import Addresses
from router.settings.models import ModelSettings
from router.settings.router import (
    AnsweringSettings,
    BackendSettings,
    FallbackSettings,
    RouterConfig,
    TrafficSettings,
    WorkerSettings,
)
from router.task import Outcome
from router.workers.engine import Engine
from router.workers.pull_loop import PullLoop
from tests.support.reviews import shipped_learning

PATHS = ("worker", "request", "trial")
GOOD = b'{"answer": "42", "usage": {"prompt_tokens": 3, "completion_tokens": 4}}'
HTML = b"<html><title>502 Bad Gateway</title></html>"
TIMEOUT_SECONDS = 1.5
RELEASE_SECONDS = 0.2  # releases are sent in batches


def http(status: int, body: bytes = b"{}", length: int | None = None, **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} Any", f"Content-Length: {len(body) if length is None else length}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@dataclass(frozen=True)
class Case:
    """A scripted reply, and the outcome that the table gives it."""

    outcome: Outcome
    reply: bytes
    then: str = "keep"  # or `close`, `hold`, `drip`
    no_reply: bool = False


CONTEXT = json.dumps({"error": {"message": "too long", "code": "context_length_exceeded"}}).encode()
CASES = {
    "ok": Case(Outcome.ANSWERED, http(200, GOOD)),
    **{f"s{n}": Case(Outcome.UNAVAILABLE, http(n, HTML)) for n in (408, 502, 503, 504, 529)},
    **{f"s{n}": Case(Outcome.DENIED, http(n)) for n in (302, 401, 403)},
    **{f"s{n}": Case(Outcome.REJECTED, http(n)) for n in (400, 451)},
    **{f"s{n}": Case(Outcome.ERROR, http(n)) for n in (409, 500)},
    "s404": Case(Outcome.UNKNOWN_MODEL, http(404)),
    "s413": Case(Outcome.TOO_LONG, http(413, HTML)),
    "s400-context": Case(Outcome.TOO_LONG, http(400, CONTEXT)),
    "s429-epoch": Case(Outcome.RATE_LIMITED, http(429, b"{}", Retry_After="1771404540")),
    "s503-later": Case(Outcome.OVERLOADED, http(503, b"{}", Retry_After="1")),
    "web-page": Case(Outcome.UNAVAILABLE, http(200, HTML)),
    "control": Case(Outcome.ANSWERED, http(200, b'{"answer": "a\nb\x01"}')),
    "bad-byte": Case(Outcome.ANSWERED, http(200, b'{"answer": "caf\xe9"}')),
    "bom": Case(Outcome.ANSWERED, http(200, b"\xef\xbb\xbf" + GOOD)),
    "not-gzip": Case(Outcome.ANSWERED, http(200, GOOD, Content_Encoding="gzip")),
    "cut-json": Case(Outcome.GARBAGE, http(200, GOOD[:20])),
    "no-body": Case(Outcome.GARBAGE, http(200, b"")),
    "empty": Case(Outcome.GARBAGE, http(200, b'{"answer": " "}')),
    "wrong-type": Case(Outcome.GARBAGE, http(200, b'{"answer": {"text": 1}}')),
    "oversize": Case(Outcome.GARBAGE, http(200, b" " * 5000)),
    "hang": Case(Outcome.TIMEOUT, b"", then="hold", no_reply=True),
    "trickle": Case(Outcome.TIMEOUT, http(200, GOOD), then="drip", no_reply=True),
    "reset": Case(Outcome.UNAVAILABLE, b"", then="close", no_reply=True),
    "cut-body": Case(Outcome.UNAVAILABLE, http(200, GOOD, 900), then="close", no_reply=True),
    "not-http": Case(Outcome.UNAVAILABLE, b"SSH-2.0-OpenSSH\r\n\r\n", then="close", no_reply=True),
}


@asynccontextmanager
async def scripted() -> AsyncIterator[str]:
    """A server that replies by the case that the model's name ends with; yields its URL."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode().lower():
                length = int(head.partition("content-length:")[2].partition("\r\n")[0])
                model = json.loads(await reader.readexactly(length))["model"]
                case = CASES[model.partition("-")[2]]
                if case.then == "hold":
                    await reader.read()
                for start in range(0, len(case.reply), 10 if case.then == "drip" else 10_000):
                    writer.write(case.reply[start : start + (10 if case.then == "drip" else 10_000)])
                    await writer.drain()
                    if case.then == "drip":
                        await asyncio.sleep(0.2)
                if case.then == "close":
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def config() -> RouterConfig:
    """One model per path and case, so that no cool-down of one case reaches another."""
    models = {
        f"{path}-{name}": ModelSettings(
            target="30000/min, 90 at once, burst", ranks={"general": 1}, timeout_seconds=TIMEOUT_SECONDS
        )
        for path in PATHS
        for name in CASES
    }
    return RouterConfig(
        models=models,
        backend=BackendSettings(max_answer_bytes=4096),
        worker=WorkerSettings(retry_base_seconds=0.05, retry_cap_seconds=0.1, another_model_seconds=0),
        answering=AnsweringSettings(default_deadline_seconds=20),
        fallback=FallbackSettings(models=()),
        traffic=TrafficSettings(failure_threshold=1000),
    )


def query(addresses: Addresses, statement: str) -> list[dict[str, Any]]:
    with connect(addresses.database_url) as connection:
        return rows(connection, statement)


async def try_models(addresses: Addresses, settings: RouterConfig) -> dict[str, Any]:
    """Calls every model of a trial once."""
    async with DirectCaller(addresses, settings) as caller:
        roster = await read_roster(caller.pool)
        calls = [
            caller.call(roster.models[f"trial-{name}"], "why?", category="general", purpose="trial",
                        timeout_seconds=10)
            for name in CASES
        ]  # fmt: skip
        await asyncio.gather(*calls)
        await asyncio.sleep(RELEASE_SECONDS)
        return dict(await caller._limiter.snapshot([f"trial-{name}" for name in CASES]))


async def ask_models(addresses: Addresses, settings: RouterConfig, folder: Path) -> dict[str, Any]:
    """Asks every model of a request by name once."""
    async with Router(addresses, settings, folder) as router:
        calls = [router.answer("why?", model=f"request-{name}", category="general") for name in CASES]
        answers = dict(zip(CASES, await asyncio.gather(*calls, return_exceptions=True), strict=True))
        for name, case in CASES.items():
            if case.outcome is Outcome.ANSWERED:
                assert getattr(answers[name], "model", None) == f"request-{name}"
            else:
                assert isinstance(answers[name], RouterError), (name, answers[name])
        assert router._service is not None
        limiter = router._service.context.limiter
        return dict(await limiter.snapshot([f"request-{name}" for name in CASES]))


async def work_models(addresses: Addresses, settings: RouterConfig) -> dict[str, Any]:
    """Lets a worker of every model settle at least one call."""
    with connect(addresses.database_url) as connection:
        rows(connection, "INSERT INTO tasks (prompt) SELECT 'p' FROM generate_series(1, 100)")
    engine = Engine(addresses, settings)
    await engine.start()
    loops = [PullLoop(engine, f"worker-{name}").start() for name in CASES]
    called = "SELECT DISTINCT model FROM model_calls WHERE outcome IS NOT NULL AND model LIKE 'worker-%%'"
    try:
        ends_at = time.monotonic() + 30
        while len(query(addresses, called)) < len(CASES):
            assert time.monotonic() < ends_at, query(addresses, called)
            await asyncio.sleep(0.1)
        return dict(await engine.limiter.snapshot([f"worker-{name}" for name in CASES]))
    finally:
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
        await engine.stop()


@pytest.mark.alone
async def test_every_reply_means_the_same_for_worker_request_and_trial(
    bare_database: str, redis_server: RedisServer, redis_client: redis.asyncio.Redis, tmp_path: Path
) -> None:
    settings = config()
    with connect(bare_database) as connection:
        sync_roster(connection, settings)
    async with scripted() as url:
        addresses = Addresses(database_url=bare_database, redis_url=redis_server.url, backend_url=url)
        traffic = await try_models(addresses, settings)
        traffic |= await ask_models(addresses, settings, tmp_path)
        traffic |= await work_models(addresses, settings)
    first: dict[str, dict[str, Any]] = {}
    for row in query(addresses, "SELECT * FROM model_calls WHERE outcome <> 'unsent' ORDER BY call_id"):
        first.setdefault(row["model"], row)
    for path in PATHS:
        for name, case in CASES.items():
            model = f"{path}-{name}"
            assert first[model]["outcome"] == case.outcome.value, (model, first[model]["error"])
            check_limiter(case, traffic[model])
    check_attempts(addresses)
    check_evidence(addresses)


def check_limiter(case: Case, traffic: Any) -> None:
    """A call without a reply keeps its slot; cool-downs and failures are those of the breaker's verdict."""
    seconds = 1.0 if case.outcome is Outcome.OVERLOADED else None
    verdict = BreakerSettings().verdict(case.outcome, seconds)
    if traffic.model.startswith("trial-"):  # exactly one call
        assert traffic.in_flight == case.no_reply, traffic
    failed = verdict is not None and verdict.signal is Signal.FAILURE
    assert (traffic.failures > 0) is failed, traffic
    assert traffic.cooldown_seconds <= 31, traffic  # also after an epoch as Retry-After


def check_attempts(addresses: Addresses) -> None:
    """Of two calls of a task in a row, the second has the same number if the first did not count."""
    statement = "SELECT task_id, outcome, attempt FROM model_calls WHERE role = 'batch' ORDER BY started_at"
    calls: dict[int, list[Mapping[str, Any]]] = {}
    for row in query(addresses, statement):
        if row["outcome"] is not None:
            calls.setdefault(row["task_id"], []).append(row)
    pairs = [pair for of_task in calls.values() for pair in itertools.pairwise(of_task)]
    assert pairs
    for one, two in pairs:
        counted = Outcome(one["outcome"]).counts_as_attempt
        assert two["attempt"] == one["attempt"] + counted, (one, two)
    failed = query(addresses, "SELECT failure FROM tasks WHERE status = 'failed'")
    for row in failed:  # only what counts, or a prompt that fits nowhere, ends a task of a worker
        assert not row["failure"].startswith(("worker-s502", "worker-s401", "worker-reset")), row


def check_evidence(addresses: Addresses) -> None:
    """The sums of the ranking count the calls whose outcome is evidence, and no others."""
    no_outages = {"seconds": 30, "share": 0.9, "models": 1000}
    sum_evidence(addresses.database_url, shipped_learning(outage=no_outages))
    summed = query(addresses, "SELECT model, calls FROM evidence")
    log = (
        "SELECT model, outcome, count(*) AS n FROM model_calls WHERE purpose IS NULL AND outcome IS NOT NULL"
        " AND role <> 'named'"
    )
    expected: dict[str, int] = {}
    for row in query(addresses, f"{log} GROUP BY model, outcome"):
        expected.setdefault(row["model"], 0)
        expected[row["model"]] += row["n"] if Outcome(row["outcome"]).is_evidence else 0
    assert {row["model"]: int(row["calls"]) for row in summed} == expected
