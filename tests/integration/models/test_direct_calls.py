"""Calls without a task, with real services: permit, log, settlement, cancellation, and no evidence."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import redis.asyncio
import requests

from local.redis import RedisServer
from models_backend.process import BackendServer, start_backend
from router.database import connect, rows
from router.errors import DatabaseError
from router.learning.review import sum_evidence
from router.models.direct_calls import DirectCaller, DirectResult
from router.models.roster import RosterModel, sync_roster
from router.settings.environment import Addresses
from router.task import Outcome
from tests.support.answering import CHEAP, PREFERRED, SECOND, THIRD, answering_config
from tests.support.reviews import Log, shipped_learning
from tests.support.waiting import until

PROMPT = "Why is the sky blue?"
FAST = ("--time-scale", "50", "--latency", "even:1:2", "--also", "newcomer")


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendServer]:
    server = start_backend(tmp_path_factory.mktemp("backend"), *FAST)
    yield server
    server.stop()


class Calling:
    """A caller, and its traces in Postgres and at the backend."""

    def __init__(self, caller: DirectCaller, addresses: Addresses, backend: BackendServer) -> None:
        self.caller = caller
        self.addresses = addresses
        self.backend = backend

    def model(self, name: str, **changes: Any) -> RosterModel:
        usual = {
            "model": name, "endpoint": name, "state": "active", "max_tokens": 100, "timeout_seconds": 20.0,
            "default_target": "30000/min, burst",
        }  # fmt: skip
        return RosterModel(**{**usual, **changes})

    async def call(self, name: str = SECOND, prompt: str = PROMPT, **more: Any) -> DirectResult:
        model = self.model(name, **more.pop("about", {}))
        options = {"category": "general", "purpose": "trial", "timeout_seconds": 5.0, **more}
        return await self.caller.call(model, prompt, **options)

    def rows(self, statement: str, *arguments: Any) -> list[dict[str, Any]]:
        with connect(self.addresses.database_url) as connection:
            return rows(connection, statement, arguments)

    def row(self, call_id: uuid.UUID) -> dict[str, Any]:
        (row,) = self.rows("SELECT * FROM model_calls WHERE call_id = %s::uuid", str(call_id))
        return row

    def fault(self, kind: str, model: str, **more: Any) -> None:
        order = {"kind": kind, "model": model, "share": 1, "seconds": 600, **more}
        requests.post(f"{self.backend.url}/faults", json=order, timeout=5).raise_for_status()

    def hangs(self) -> list[dict[str, Any]]:
        return self.rows("SELECT call_id, sent_at FROM model_calls WHERE outcome IS NULL")


@pytest.fixture
async def calling(
    database: str, redis_server: RedisServer, redis_client: redis.asyncio.Redis, backend: BackendServer
) -> AsyncIterator[Calling]:
    addresses = Addresses(database_url=database, redis_url=redis_server.url, backend_url=backend.url)
    config = answering_config(**{THIRD: "0", CHEAP: "1 at once"})
    with connect(database) as connection:
        sync_roster(connection, config)
    async with DirectCaller(addresses, config) as caller:
        yield Calling(caller, addresses, backend)
    requests.delete(f"{backend.url}/faults", timeout=5).raise_for_status()
    left = [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("router")]
    assert left == []


async def test_call_is_answered_and_logged(calling: Calling) -> None:
    called = await calling.call(max_tokens=50)
    assert called.result is not None
    assert called.result.outcome is Outcome.ANSWERED
    assert (called.result.answer or "").startswith(f"[{SECOND} ")
    row = calling.row(called.call_id)
    assert (row["model"], row["category"], row["purpose"], row["role"]) == (
        SECOND, "general", "trial", "trial",
    )  # fmt: skip
    assert (row["outcome"], row["task_id"], row["rank"]) == ("answered", None, 3)
    assert row["reserved_tokens"] == len(PROMPT) + 50
    assert row["started_at"] <= row["sent_at"] <= row["finished_at"]
    assert row["latency_seconds"] == pytest.approx(called.seconds)
    assert called.cost_usd is None or float(row["cost"]) == pytest.approx(called.cost_usd)
    assert calling.rows("SELECT FROM tasks") == []


async def test_permit_is_released_also_after_redis_lost_its_state(calling: Calling) -> None:
    for _ in range(3):  # concurrency 1, and the log provides the calls in flight
        called = await calling.call(CHEAP)
        assert called.result is not None
        assert called.result.outcome is Outcome.ANSWERED


async def test_call_without_a_permit_in_time_is_not_sent(calling: Calling) -> None:
    stopped = await calling.call(THIRD, timeout_seconds=0.5)
    assert stopped.result is None
    assert "traffic target is 0" in (stopped.why or "")
    calling.fault("hang", CHEAP)
    both = [asyncio.create_task(calling.call(CHEAP, timeout_seconds=0.7)) for _ in range(2)]
    done, (hanging,) = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    crowded = done.pop().result()  # both saw a free slot, and one got it
    assert crowded.result is None
    assert "concurrency limit reached" in (crowded.why or "")
    again = await calling.call(CHEAP, timeout_seconds=0.3)
    assert again.result is None
    hanging.cancel()
    await asyncio.gather(hanging, return_exceptions=True)
    await asyncio.to_thread(until, lambda: not calling.hangs())
    logged = {str(row["call_id"]): row["outcome"] for row in calling.rows("SELECT * FROM model_calls")}
    assert sorted(logged.values()) == ["abandoned", "unsent"]
    assert logged[str(crowded.call_id)] == "unsent"
    requests.delete(f"{calling.backend.url}/faults", timeout=5)
    assert str(crowded.call_id) not in {row["request_id"] for row in calling.backend.arrivals()}


def at_backend(calling: Calling) -> bool:
    return bool(requests.get(f"{calling.backend.url}/health", timeout=5).json()["in_flight"])


async def test_failure_of_the_model_is_a_result(calling: Calling) -> None:
    for kind, outcome in (("error", Outcome.ERROR), ("garbage", Outcome.GARBAGE)):
        calling.fault(kind, SECOND)
        called = await calling.call()
        assert called.result is not None
        assert called.result.outcome is outcome
        assert calling.row(called.call_id)["outcome"] == outcome.value
        requests.delete(f"{calling.backend.url}/faults", timeout=5)
    unknown = await calling.call("nobody")
    assert unknown.result is not None
    assert unknown.result.outcome is Outcome.UNKNOWN_MODEL


async def test_model_outside_the_roster_gets_its_default_target(calling: Calling) -> None:
    assert "newcomer" in await calling.caller.known_models()
    about = {"default_target": "2/s"}
    began = time.monotonic()
    called = await asyncio.gather(*(calling.call("newcomer", about=about) for _ in range(4)))
    assert {c.result.outcome for c in called if c.result} == {Outcome.ANSWERED}
    assert time.monotonic() - began > 1.0  # four at two a second
    assert calling.rows("SELECT FROM newest_targets WHERE model = 'newcomer'") == []


async def test_canceled_call_is_logged_as_abandoned(calling: Calling) -> None:
    calling.fault("hang", PREFERRED)
    task = asyncio.create_task(calling.call(PREFERRED))
    await asyncio.to_thread(until, lambda: at_backend(calling))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(until, lambda: not calling.hangs())
    (row,) = calling.rows("SELECT * FROM model_calls")
    assert row["outcome"] == "abandoned"


async def test_closing_cancels_calls_in_flight(calling: Calling) -> None:
    calling.fault("hang", PREFERRED)
    config = answering_config()
    async with DirectCaller(calling.addresses, config) as caller:
        other = Calling(caller, calling.addresses, calling.backend)
        task = asyncio.create_task(other.call(PREFERRED))
        await asyncio.to_thread(until, lambda: at_backend(calling))
    with pytest.raises(asyncio.CancelledError):
        await task
    (row,) = calling.rows("SELECT * FROM model_calls")
    assert row["outcome"] == "abandoned"


async def test_call_that_cannot_be_logged_is_not_sent(calling: Calling) -> None:
    with pytest.raises(DatabaseError):
        await calling.call(purpose="fun")
    assert calling.rows("SELECT FROM model_calls") == []
    assert not [row for row in calling.backend.arrivals() if row["status"] == 200 and row["model"] == "fun"]


async def test_ending_a_call_is_idempotent_and_restores_a_lost_row(calling: Calling) -> None:
    called = await calling.call()
    end = "SELECT end_call(%s::uuid, %s, 1, 2, 0.5, 1.5, NULL, 'm', 'general', 'trial', 'w', 10) AS outcome"
    assert calling.rows(end, str(called.call_id), "error") == [{"outcome": "answered"}]
    calling.rows("DELETE FROM model_calls")
    assert calling.rows(end, str(called.call_id), "unsent") == [{"outcome": None}]
    assert calling.rows(end, str(called.call_id), "answered") == [{"outcome": "answered"}]
    row = calling.row(called.call_id)
    assert (row["model"], row["purpose"], row["tokens"], float(row["cost"])) == ("m", "trial", 3, 0.5)


def test_judge_calls_are_no_evidence_and_trials_only_of_unranked_models(database: str) -> None:
    log = Log(database)
    for model in (PREFERRED, SECOND, "newcomer"):
        for purpose in ("judge", "trial"):
            log.add(model, 5)
            log.query(
                "UPDATE model_calls SET purpose = %s WHERE model = %s AND purpose IS NULL", purpose, model
            )
    log.query("UPDATE roster SET state = 'probation' WHERE model = %s", SECOND)
    log.add(PREFERRED, 2)
    log.query(
        "INSERT INTO call_scores (call_id, source, score) SELECT call_id, 'reference', 1 FROM model_calls"
    )
    assert sum_evidence(database, shipped_learning()) == 2 + 5 + 5
    found = {row["model"]: row for row in log.query("SELECT * FROM evidence")}
    assert {model: row["calls"] for model, row in found.items()} == {PREFERRED: 2, SECOND: 5, "newcomer": 5}
    assert {model: row["scores"]["reference"][0] for model, row in found.items()} == {
        PREFERRED: 2, SECOND: 5, "newcomer": 5,
    }  # fmt: skip


def test_call_of_a_crashed_process_does_not_keep_its_period_open(database: str) -> None:
    log = Log(database)
    log.add(PREFERRED, 1, days_ago=3, outcome=None)
    log.query("UPDATE model_calls SET purpose = 'trial'")
    log.add(PREFERRED, 1, days_ago=0, outcome=None)
    log.query(
        "UPDATE model_calls SET purpose = 'judge', started_at = clock_timestamp() WHERE purpose IS NULL"
    )
    sum_evidence(database, shipped_learning())
    outcomes = log.query("SELECT purpose, outcome FROM model_calls ORDER BY call_id")
    assert outcomes == [{"purpose": "trial", "outcome": "lost"}, {"purpose": "judge", "outcome": None}]
    assert log.value("SELECT bool_or(closed) FROM evidence_periods")
