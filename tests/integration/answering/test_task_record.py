"""The task of a request: claimed by one open call at a time, handed on, and ended by the last."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from router.answering.context import RequestContext
from router.answering.store import CallRow
from router.answering.task_record import TaskRecord
from router.database import open_pool
from router.request import ModelRequest
from router.task import AnswerRank, CallResult, Outcome, Role, new_call_id
from tests.support.queue import Probe

FAILED = CallResult(Outcome.ERROR, error="500")


def row(model: str, rank: AnswerRank = AnswerRank.CHOSEN_MODEL) -> CallRow:
    role = Role.ASKED if rank is AnswerRank.CHOSEN_MODEL else Role.FALLBACK
    return CallRow(
        new_call_id(time.time()), model, role, rank, "general", 0.9, "client", 1, 100, "first", "cheap"
    )


@pytest.fixture
async def record(database: str) -> AsyncIterator[TaskRecord]:
    pool = await open_pool(database, connections=4)
    unused: Any = None
    context = RequestContext(pool, limiter=unused, backend=unused, queue=unused, config=unused, roster=unused)
    yield TaskRecord(context, ModelRequest.of_prompt("Why?"), 10.0)
    await pool.close()


async def test_a_failed_call_waits_for_its_successor(record: TaskRecord, probe: Probe) -> None:
    first, second = row("first"), row("second")
    await record.write(first)
    end_pending = record.expect_call()
    settling = asyncio.create_task(record.settle(first, FAILED, late=False))
    await asyncio.wait({settling}, timeout=0.3)
    assert not settling.done()
    assert await probe.value("SELECT call_id FROM queue") == first.call_id

    await record.write(second)
    end_pending()
    await settling
    assert await probe.value("SELECT call_id FROM queue") == second.call_id
    assert (await probe.call(first.call_id))["settlement"] == "passed"

    await record.settle(second, CallResult(Outcome.ANSWERED, answer="Because."), late=False)
    assert (await probe.row("SELECT status, answer FROM tasks"))["answer"] == "Because."
    await probe.assert_counts_exact()


async def test_the_last_call_ends_the_task(record: TaskRecord, probe: Probe) -> None:
    first, cheap = row("first"), row("cheap", AnswerRank.FALLBACK_MODEL)
    end_pending = record.expect_call()
    await record.write(first)
    await record.write(cheap)
    await record.settle(cheap, CallResult(Outcome.ANSWERED, answer="Perhaps."), late=False)
    assert await probe.value("SELECT status FROM tasks") == "unsolved", "the chosen model may still answer"
    settling = asyncio.create_task(record.settle(first, FAILED, late=False))
    await asyncio.wait({settling}, timeout=0.2)
    end_pending()
    end_pending()  # idempotent
    await settling
    task = await probe.row("SELECT status, answer, answer_rank FROM tasks")
    assert tuple(task) == ("solved", "Perhaps.", 2)
    assert await probe.all("SELECT FROM queue") == []
    await probe.assert_counts_exact()


async def test_an_unanswered_task_fails_with_all_reasons(record: TaskRecord, probe: Probe) -> None:
    first, cheap = row("first"), row("cheap", AnswerRank.FALLBACK_MODEL)
    await record.write(first)
    await record.write(cheap)
    await record.settle(first, FAILED, late=False)
    await record.settle(cheap, CallResult(Outcome.TIMEOUT, error="too slow"), late=True)
    task = await probe.row("SELECT status, failure FROM tasks")
    assert task["status"] == "failed"
    assert sorted(task["failure"].splitlines()) == ["cheap: timeout: too slow", "first: error: 500"]
    assert (await probe.call(cheap.call_id))["late"]
    await probe.assert_counts_exact()


async def test_a_lost_call_can_still_be_settled(record: TaskRecord, probe: Probe) -> None:
    first = row("first")
    await record.write(first)
    await probe.run("UPDATE workers SET lease_until = clock_timestamp() - interval '1 s'")
    await probe.run("SELECT release_lost_claims()")
    assert await probe.value("SELECT state FROM queue") == "ready"
    await record.settle(first, CallResult(Outcome.ANSWERED, answer="Late, but good."), late=True)
    assert await probe.value("SELECT answer FROM tasks") == "Late, but good."
    assert (await probe.call(first.call_id))["settlement"] == "solved"
    await probe.assert_counts_exact()


async def test_an_unconfirmed_call_is_discarded(record: TaskRecord, probe: Probe) -> None:
    first = row("first")
    await record.write(first)
    assert await probe.value("SELECT discard_request_call($1, 'its reply was lost')", first.call_id)
    assert await probe.value("SELECT status FROM tasks") == "failed"
    assert (await probe.call(first.call_id))["outcome"] == "unsent"
    assert not await probe.value("SELECT discard_request_call($1, 'again')", first.call_id)
    await probe.assert_counts_exact()
