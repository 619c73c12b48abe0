"""Batch tasks with a deadline: a fallback's answer in time, replaced by the chosen model's when it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from local.redis import RedisServer
from models_backend.process import BackendServer, start_backend
from router.answering import store
from router.database import connect, rows
from router.models.roster import sync_roster
from router.settings.environment import Addresses
from router.workers import deadlines
from router.workers.deadlines import DeadlineJob
from router.workers.engine import Engine
from router.workers.worker import Worker
from tests.support.answering import CHEAP, PREFERRED, answering_config


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendServer]:
    folder = tmp_path_factory.mktemp("backend")
    server = start_backend(folder, "--time-scale", "20", "--latency", "even:2:4")
    yield server
    server.stop()


@pytest.fixture
async def engine(
    database: str, redis_server: RedisServer, redis_client: Any, backend: BackendServer, tmp_path: Path
) -> AsyncIterator[Engine]:
    config = answering_config(fallback={"before_deadline_seconds": 4.0})
    with connect(database) as connection:
        sync_roster(connection, config)
    addresses = Addresses(database_url=database, redis_url=redis_server.url, backend_url=backend.url)
    engine = Engine(addresses, config)
    await engine.start()
    DeadlineJob(engine, tmp_path, None).start()
    yield engine
    await engine.stop()


def ask(engine: Engine, statement: str, *arguments: Any) -> list[dict[str, Any]]:
    with connect(engine.addresses.database_url) as connection:
        return rows(connection, statement, arguments)


def insert(engine: Engine, seconds: float, prompt: str = "Why is the sky blue?") -> None:
    statement = (
        "INSERT INTO tasks (prompt, category, deadline_at)"
        " VALUES (%s, 'general', clock_timestamp() + make_interval(secs => %s))"
    )
    ask(engine, statement, prompt, seconds)


async def until(engine: Engine, condition: str, seconds: float = 20.0) -> dict[str, Any]:
    """Returns the task as soon as the condition holds for it."""
    for _ in range(int(seconds / 0.05)):
        if found := ask(engine, f"SELECT *, clock_timestamp() AS now FROM tasks WHERE {condition}"):
            return found[0]
        await asyncio.sleep(0.05)
    raise AssertionError(f"{condition}: not within {seconds} s; {ask(engine, 'SELECT * FROM tasks')}")


async def test_the_fallback_answers_by_the_deadline(engine: Engine) -> None:
    insert(engine, 5.0)
    task = await until(engine, "answer_rank = 2")
    assert task["now"] <= task["deadline_at"]
    assert (task["status"], task["answered_by"]) == ("unsolved", CHEAP)
    await until(engine, "NOT EXISTS (SELECT FROM queue WHERE deadline_at IS NOT NULL)")
    (call,) = ask(engine, "SELECT * FROM model_calls")
    assert (call["role"], call["rank"], call["settlement"]) == ("fallback", 2, "kept")
    assert (call["preferred"], call["fallback"]) == (PREFERRED, CHEAP)


async def test_a_late_answer_of_the_chosen_model_replaces_the_fallback(engine: Engine) -> None:
    insert(engine, 1.0)
    await until(engine, "answer_rank = 2")
    working = asyncio.create_task(Worker(engine, PREFERRED, "run").run())
    task = await until(engine, "status = 'solved'")
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    assert (task["answered_by"], task["answer_rank"]) == (PREFERRED, 3)


async def test_passages_are_stored_if_no_model_answers(engine: Engine) -> None:
    await engine.limiter.set_target(CHEAP, "0")
    insert(engine, 1.0)
    task = await until(engine, "answer_rank = 1")
    assert (task["status"], task["answered_by"]) == ("unsolved", "knowledge")


async def test_tasks_without_a_deadline_are_ignored(engine: Engine) -> None:
    ask(engine, "INSERT INTO tasks (prompt, category) VALUES ('no hurry', 'general')")
    insert(engine, 0.0, "hurry")
    await until(engine, "answer_rank = 2 AND prompt = 'hurry'")
    asked = ask(engine, "SELECT DISTINCT t.prompt FROM model_calls c JOIN tasks t ON t.id = c.task_id")
    assert asked == [{"prompt": "hurry"}]


async def test_no_model_is_called_while_paused(engine: Engine) -> None:
    ask(engine, "SELECT set_paused(true, 1)")
    await asyncio.sleep(1.2)  # takes effect within a second
    insert(engine, 0.0)
    await asyncio.sleep(1.5)  # more than one step
    assert ask(engine, "SELECT count(*) AS n FROM model_calls") == [{"n": 0}]
    ask(engine, "SELECT set_paused(false, 2)")
    await until(engine, "answer_rank = 2")


async def test_calls_waiting_for_a_permit_are_not_sent_once_paused(engine: Engine) -> None:
    await engine.limiter.set_target(CHEAP, "1/2s")
    await engine.limiter.acquire(CHEAP)
    insert(engine, 0.0)
    await asyncio.sleep(0.8)  # it waits for a permit
    ask(engine, "SELECT set_paused(true, 1)")
    await asyncio.sleep(2.5)
    sent = "SELECT count(*) AS n FROM model_calls WHERE sent_at IS NOT NULL AND role <> 'passages'"
    assert ask(engine, sent) == [{"n": 0}]
    assert ask(engine, "SELECT deadline_at IS NULL AS served FROM queue") == [{"served": False}]


async def test_the_claim_is_extended_while_a_call_is_in_progress(
    engine: Engine, backend: BackendServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadlines, "HOLD_SECONDS", 0.6)
    hang = {"kind": "hang", "model": CHEAP, "share": 1, "seconds": 60}
    requests.post(f"{backend.url}/faults", json=hang, timeout=5).raise_for_status()
    try:
        insert(engine, 0.0)
        await until(engine, "answer_rank = 1")
        await asyncio.sleep(3)  # five extensions
        assert ask(engine, "SELECT count(*) AS n FROM model_calls WHERE role = 'fallback'") == [{"n": 1}]
    finally:
        requests.delete(f"{backend.url}/faults", timeout=5).raise_for_status()


@pytest.mark.parametrize("change", ["prompt = 'edited'", "deadline_at = deadline_at + interval '1 hour'"])
async def test_completing_a_deadline_keeps_a_later_one(engine: Engine, change: str) -> None:
    ask(engine, "SELECT set_paused(true, 1)")
    await asyncio.sleep(1.2)  # takes effect within a second
    insert(engine, 2.0)
    (due,) = await store.claim_due_deadlines(engine.pool, ahead_seconds=4, hold_seconds=60, limit=9)
    ask(engine, f"UPDATE tasks SET {change}")
    await store.extend_deadline_claim(engine.pool, due, ahead_seconds=4, hold_seconds=60)
    await store.complete_deadline(engine.pool, due, ahead_seconds=4)
    still = "SELECT q.deadline_at = t.deadline_at AS same FROM queue q JOIN tasks t ON t.id = q.task_id"
    assert ask(engine, still) == [{"same": True}]
    (due,) = ask(engine, "SELECT id AS task_id, prompt_version FROM tasks")
    ask(engine, "UPDATE tasks SET deadline_at = clock_timestamp()")
    ask(engine, "SELECT complete_deadline(%s, %s, 4)", due["task_id"], due["prompt_version"])
    assert ask(engine, "SELECT deadline_at FROM queue") == [{"deadline_at": None}]


async def test_a_deadline_can_be_set_after_insertion(engine: Engine) -> None:
    ask(engine, "INSERT INTO tasks (prompt, category) VALUES ('now in a hurry', 'general')")
    ask(engine, "UPDATE tasks SET deadline_at = clock_timestamp()")
    await until(engine, "answer_rank = 2")
