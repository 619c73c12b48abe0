"""Tasks without a category: in no lane until they are classified, or for a second at most."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from local.redis import RedisServer
from models_backend.process import BackendServer, start_backend
from router.classification.process import ClassifierProcess
from router.database import connect
from router.models.roster import sync_roster
from router.queue.task_queue import TaskQueue, UnclassifiedTask
from router.settings.classification import load_categories
from router.settings.environment import Addresses
from router.settings.router import RouterConfig, load_config
from router.workers.engine import Engine
from router.workers.worker import Worker
from tests.support.queue import Probe, probing

POEM = "Write a poem about the sea in winter"
CODE = "Write a Python function that reverses a linked list"
FACT = "What is the capital of Mongolia?"
CLAIM = "SELECT * FROM claim_uncategorized($1)"


@pytest.fixture
async def probe(database: str) -> AsyncIterator[Probe]:
    """A probe of a database whose tasks are classified."""
    with connect(database) as connection:
        sync_roster(connection, load_config())
    async with probing(database) as opened:
        yield opened


async def assign(probe: Probe, rows: list[Any], category: str, confidence: float = 0.9) -> int:
    """Assigns a category to claimed rows; returns how many took it."""
    ids, versions = [row["task_id"] for row in rows], [row["prompt_version"] for row in rows]
    reasons = ["classifier: test"] * len(rows)
    return int(
        await probe.value(
            "SELECT assign_categories($1, $2, $3, $4, $5)",
            ids, versions, [category] * len(rows), [confidence] * len(rows), reasons,
        )
    )  # fmt: skip


async def let_time_pass(probe: Probe) -> None:
    """Ends the second that tasks wait for a category, and the announcements of classifiers."""
    await probe.run(
        "UPDATE queue SET wake_at = wake_at - interval '2 s', claimed_at = claimed_at - interval '2 s'"
        " WHERE state = 'uncategorised'"
    )
    await probe.run("UPDATE categorising SET works_until = 'epoch', starts_until = 'epoch'")


async def test_unclassified_task_is_in_no_lane_and_counted_under_the_default(probe: Probe) -> None:
    task_id = await probe.add(POEM)
    assert await probe.claim() is None
    queued = await probe.queued(task_id)
    assert queued is not None
    assert (queued["state"], queued["category"]) == ("uncategorised", "general")
    assert await probe.counts() == {"general": (1, 0, 0)}
    state = await probe.row("SELECT state FROM task_states WHERE id = $1", task_id)
    assert state["state"] == "uncategorised"
    await probe.assert_counts_exact()


async def test_task_with_a_category_is_ready_at_once(probe: Probe) -> None:
    await probe.add(POEM, category="creative")
    taken = await probe.must_claim()
    call = await probe.call(taken.call_id)
    assert (call["category"], call["confidence"], call["category_reason"]) == ("creative", None, None)


async def test_assigned_category_makes_the_task_ready_and_is_logged(probe: Probe) -> None:
    task_id = await probe.add(POEM)
    rows = await probe.all(CLAIM, 10)
    assert [row["prompt"] for row in rows] == [POEM]
    assert await assign(probe, rows, "creative", 0.8) == 1
    assert await probe.counts() == {"creative": (1, 0, 0)}
    taken = await probe.must_claim("creative")
    call = await probe.call(taken.call_id)
    assert (call["category"], call["category_reason"]) == ("creative", "classifier: test")
    assert call["confidence"] == pytest.approx(0.8)
    assert (await probe.task(task_id))["category"] is None  # set when it is solved
    await probe.settle(taken)
    assert (await probe.task(task_id))["category"] == "creative"
    await probe.assert_counts_exact()


async def test_claimed_tasks_are_exclusive_for_a_second(probe: Probe, database: str) -> None:
    for _ in range(6):
        await probe.add(POEM)
    async with probing(database) as other:
        taken = [*await asyncio.gather(probe.all(CLAIM, 3), other.all(CLAIM, 3)), await probe.all(CLAIM, 6)]
    ids = [row["task_id"] for rows in taken for row in rows]
    assert len(ids) == len(set(ids)) == 6
    await let_time_pass(probe)
    assert len(await probe.all(CLAIM, 10)) == 6


async def test_claims_are_ordered_by_priority_and_arrival(probe: Probe) -> None:
    ids = [await probe.add(f"{POEM} {n}", priority=n % 2) for n in range(6)]
    rows = await probe.all(CLAIM, 10)
    assert await assign(probe, rows, "creative") == 6
    order = [(await probe.must_claim()).task_id for _ in range(6)]
    assert order == [*ids[1::2], *ids[::2]]


async def test_maintenance_applies_the_default_after_a_second(probe: Probe) -> None:
    await probe.add(POEM)
    assert await probe.value("SELECT apply_default_category()") == 0
    await let_time_pass(probe)
    assert await probe.value("SELECT apply_default_category()") == 1
    taken = await probe.must_claim("general")
    call = await probe.call(taken.call_id)
    assert (call["confidence"], call["category_reason"]) == (None, "default: no category was found in time")
    await probe.assert_counts_exact()


async def test_claim_without_ready_tasks_applies_the_default_itself(probe: Probe) -> None:
    task_id = await probe.add(POEM)
    await let_time_pass(probe)
    assert await probe.claim("technical") is None
    assert (await probe.must_claim("technical", "general")).task_id == task_id


async def test_backlog_waits_for_an_active_classifier(probe: Probe) -> None:
    await probe.run("INSERT INTO tasks (prompt) SELECT 'p' FROM generate_series(1, 100)")
    await let_time_pass(probe)
    assert len(await probe.all(CLAIM, 10)) == 10
    assert await probe.value("SELECT apply_default_category()") == 0
    await let_time_pass(probe)
    await probe.run("SELECT announce_classifier(5)")
    assert await probe.value("SELECT apply_default_category()") == 5
    await let_time_pass(probe)
    assert await probe.value("SELECT apply_default_category()") == 95


async def test_ready_tasks_do_not_wait_behind_unclassified_ones(probe: Probe) -> None:
    await probe.run("INSERT INTO tasks (prompt, priority) SELECT 'p', 9 FROM generate_series(1, 1000)")
    ready = await probe.add(CODE, category="technical")
    assert (await probe.must_claim()).task_id == ready


async def test_prompt_edited_during_classification_is_classified_again(probe: Probe) -> None:
    task_id = await probe.add(POEM)
    rows = await probe.all(CLAIM, 10)
    await probe.run("UPDATE tasks SET prompt = $1", CODE)
    assert await assign(probe, rows, "creative") == 0
    again = await probe.all(CLAIM, 10)
    assert [row["prompt"] for row in again] == [CODE]
    assert await assign(probe, again, "technical") == 1
    assert (await probe.must_claim("technical")).task_id == task_id
    await probe.assert_counts_exact()


@pytest.mark.parametrize("category", ["creative", "general"])
async def test_category_set_by_the_producer_makes_the_task_ready(probe: Probe, category: str) -> None:
    await probe.add(POEM)
    rows = await probe.all(CLAIM, 10)
    await probe.run("UPDATE tasks SET category = $1", category)
    assert await assign(probe, rows, "technical") == 0
    assert (await probe.must_claim()).category == category
    await probe.assert_counts_exact()


async def test_task_whose_category_is_removed_is_classified_again(probe: Probe) -> None:
    task_id = await probe.add(POEM, category="technical")
    await probe.run("UPDATE tasks SET category = NULL")
    queued = await probe.queued(task_id)
    assert queued is not None
    assert queued["state"] == "uncategorised"
    await probe.assert_counts_exact()


async def test_unknown_category_becomes_the_default_with_a_reason(probe: Probe) -> None:
    await probe.add(POEM, category="poetry")
    call = await probe.call((await probe.must_claim("general")).call_id)
    assert call["category_reason"] == "default: 'poetry' is not a category that the config names"
    await probe.add(POEM)
    assert await assign(probe, await probe.all(CLAIM, 10), "prose") == 1
    call = await probe.call((await probe.must_claim("general")).call_id)
    assert call["category_reason"] == "default: 'prose' is not a category that the config names"


async def test_deleting_solving_and_truncating_leave_no_queue_rows(probe: Probe) -> None:
    for prompt in (POEM, CODE, FACT):
        await probe.add(prompt)
    rows = await probe.all(CLAIM, 10)
    await probe.run("DELETE FROM tasks WHERE prompt = $1", POEM)
    await probe.run("UPDATE tasks SET status = 'solved', answer = '42' WHERE prompt = $1", CODE)
    await probe.assert_counts_exact()
    assert await assign(probe, rows, "technical") == 1
    await probe.assert_counts_exact()
    await probe.run("TRUNCATE tasks")
    assert await probe.value("SELECT count(*) FROM queue") == 0


async def test_reconciler_requeues_lost_rows_for_classification(probe: Probe) -> None:
    task_id = await probe.add(POEM)
    await probe.run("DELETE FROM queue")
    await probe.run("SELECT recount_tasks()")
    assert await probe.reconcile() == (1, 0)
    assert [row["task_id"] for row in await probe.all(CLAIM, 10)] == [task_id]
    await probe.assert_counts_exact()


async def test_only_the_ends_of_a_long_prompt_are_fetched(probe: Probe) -> None:
    await probe.add("begin " + "x" * 900_000 + " the end")
    (row,) = await probe.all(CLAIM, 10)
    assert len(row["prompt"]) < 2000
    assert row["prompt"].startswith("begin ")
    assert row["prompt"].endswith(" the end")


async def test_with_classification_disabled_tasks_take_the_default_at_once(probe: Probe) -> None:
    early = await probe.add(POEM)
    await probe.run("UPDATE queue_settings SET categorise = false")
    late = await probe.add(POEM)
    assert {(await probe.must_claim()).task_id, (await probe.must_claim()).task_id} == {early, late}


async def test_concurrent_changes_lose_and_duplicate_nothing(probe: Probe, database: str) -> None:
    """Concurrent inserts, edits, deletes, classifications and claims."""
    stop = time.monotonic() + 3

    async def produce(p: Probe) -> None:
        while time.monotonic() < stop:
            await p.run("INSERT INTO tasks (prompt) SELECT 'p' FROM generate_series(1, 20)")
            await p.run("UPDATE tasks SET prompt = prompt || '!' WHERE id % 17 = 0 AND status = 'unsolved'")
            await p.run("DELETE FROM tasks WHERE id % 19 = 0")

    async def classify(p: Probe, category: str) -> None:
        while time.monotonic() < stop:
            await assign(p, await p.all(CLAIM, 16), category)
            await p.run("SELECT apply_default_category()")

    async def solve(p: Probe) -> None:
        while time.monotonic() < stop:
            taken = await p.claim()
            if taken is not None:
                await p.settle(taken)

    async with probing(database) as a, probing(database) as b, probing(database) as c, probing(database) as d:
        await asyncio.gather(produce(a), classify(b, "technical"), classify(c, "creative"), solve(d))
    await probe.assert_counts_exact()
    odd = (
        "SELECT count(*) FROM tasks t LEFT JOIN queue q ON q.task_id = t.id"
        " WHERE (t.status = 'unsolved') <> (q.task_id IS NOT NULL)"
    )
    assert await probe.value(odd) == 0


# Child process


@pytest.mark.soak
async def test_process_classifies_restarts_after_death_and_ends_with_its_owner() -> None:
    patient = load_categories()
    async with ClassifierProcess(patient.model_copy(update={"timeout_seconds": 0.3})) as process:
        started = time.monotonic()
        (cold,) = await process.classify([POEM])
        assert time.monotonic() - started < 1.5, "callers that cannot wait get the default"
        assert (cold.category, cold.confidence) == ("general", 0.0)
        assert "still starting" in cold.reason
        assert await process.until_ready(75)
        child = process._process
        assert child is not None
        child.kill()
        await child.wait()
        (orphan,) = await process.classify([POEM])
        assert orphan.reason.startswith("default: ")

        assert await process.until_ready(75)
        process.settings = patient
        found = await process.classify([POEM, CODE, FACT, "", "\x00\ud800", "x" * 10_000_000])
        child = process._process
        assert child is not None
    assert [one.category for one in found[:3]] == ["creative", "technical", "general"]
    assert found[3].reason == "default: the prompt is empty"
    assert len(found) == 6
    assert child.returncode is not None


@pytest.mark.soak
async def test_hanging_child_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.classification.process.HANG_SECONDS", 1.0)
    settings = load_categories().model_copy(update={"timeout_seconds": 0.4})  # shorter than a hang
    async with ClassifierProcess(settings) as process:
        assert await process.until_ready(75)
        child = process._process
        assert child is not None
        child.send_signal(19)  # SIGSTOP
        (hung,) = await process.classify([POEM])
        assert hung.reason.startswith("default: ")
        await asyncio.wait_for(child.wait(), 60)
        assert await process.until_ready(75)
        assert (await process.classify([POEM]))[0].category == "creative"


@pytest.mark.soak
async def test_idle_child_is_not_considered_hanging(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("router.classification.process.HANG_SECONDS", 0.4)
    settings = load_categories().model_copy(update={"timeout_seconds": 10.0})
    async with ClassifierProcess(settings) as process:
        assert await process.until_ready(75)
        child = process._process
        await asyncio.sleep(1)  # longer than HANG_SECONDS
        assert (await process.classify([POEM]))[0].category == "creative"
        assert process._process is child


async def test_prompts_beyond_the_limit_get_the_default_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.classification.process.MAX_WAITING", 2)
    async with ClassifierProcess(load_categories()) as process:
        found = await process.classify([POEM] * 3)
    assert {one.reason for one in found} == {"default: too many prompts wait for a category"}


async def test_invalid_examples_are_logged_and_the_default_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = load_categories().model_copy(update={"folder": tmp_path, "timeout_seconds": 5.0})
    async with ClassifierProcess(settings) as process:
        found = await process.classify([POEM])
    assert found[0].category == "general"
    assert "no file matches 'examples/*.jsonl'" in caplog.text


# Engine


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[BackendServer]:
    server = start_backend(tmp_path, "--time-scale", "100", "--latency", "even:1:2")
    yield server
    server.stop()


@asynccontextmanager
async def solving(addresses: Addresses, settings: RouterConfig) -> AsyncIterator[Engine]:
    """An engine with a worker for each of two models."""
    engine = Engine(addresses, settings)
    await engine.start()
    workers = [asyncio.create_task(Worker(engine, model, "run").run()) for model in ("phi-4", "gemma-2-27b")]
    try:
        yield engine
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await engine.stop()


async def test_engine_classifies_new_tasks_and_sends_them_soon(
    probe: Probe, database: str, redis_server: RedisServer, redis_client: Any, backend: BackendServer
) -> None:
    config = load_config()
    fast = {
        name: config.models[name].model_copy(update={"target": "50/s"}) for name in ("phi-4", "gemma-2-27b")
    }
    config = config.model_copy(update={"models": fast})
    with connect(database) as connection:
        sync_roster(connection, config)
    backlog = [await probe.add(prompt) for prompt in (POEM, CODE, FACT)]
    await let_time_pass(probe)
    addresses = Addresses(database_url=database, redis_url=redis_server.url, backend_url=backend.url)
    async with solving(addresses, config) as engine:
        process = engine._classification._process
        assert process is not None
        assert await process.until_ready(75)
        await solved(probe, len(backlog))
        waits = []
        for number, prompt in enumerate([POEM, CODE, FACT] * 4):
            task_id = await probe.add(f"{prompt} ({number})")
            await solved(probe, len(backlog) + number + 1)
            call = await probe.row(
                "SELECT c.*, extract(epoch FROM c.sent_at - t.created_at)::float8 AS waited"
                " FROM model_calls c JOIN tasks t ON t.id = c.task_id"
                " WHERE t.id = $1 AND outcome = 'answered'",
                task_id,
            )
            assert call["category"] == {POEM: "creative", CODE: "technical", FACT: "general"}[prompt]
            assert call["confidence"] > 0.4
            assert call["category_reason"].startswith(("rules: ", "classifier: "))
            waits.append(call["waited"])
    assert statistics.median(waits) < 0.15, sorted(waits)


async def solved(probe: Probe, number: int) -> None:
    end = time.monotonic() + 20
    while await probe.value("SELECT count(*) FROM tasks WHERE status = 'solved'") < number:
        assert time.monotonic() < end, "not solved in time"
        await asyncio.sleep(0.02)


async def test_queue_claims_unclassified_tasks(probe: Probe, database: str) -> None:
    await probe.add(POEM)
    async with asyncpg.create_pool(database, min_size=1, max_size=1) as pool:
        queue = TaskQueue(pool, host="here")
        assert await queue.classification_enabled()
        (row,) = await queue.claim_uncategorized(5)
        assert isinstance(row, UnclassifiedTask)
        assert (
            await queue.assign_categories([row], ["creative"], [0.7], ["classifier: creative at 0.70"]) == 1
        )
        assert await queue.claim_uncategorized(5) == []
