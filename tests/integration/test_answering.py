"""Asking for one prompt now, on a real PostgreSQL, a real Redis and a real Models Backend process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from local.redis import RedisServer
from models_backend.process import BackendServer, start_backend
from router.settings import Addresses
from router.task import AnswerRank, Outcome
from tests.asking import CHEAP, PREFERRED, SECOND, Asking, asking_config, asking_router


@pytest.fixture(scope="module")
def shared_backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendServer]:
    server = start_backend(
        tmp_path_factory.mktemp("backend"), "--time-scale", "20", "--latency", "even:2:4"
    )
    yield server
    server.stop()


@pytest.fixture
def addresses(
    database: str, redis_server: RedisServer, redis_client: Any, shared_backend: BackendServer
) -> Addresses:
    return Addresses(database_url=database, redis_url=redis_server.url, backend_url=shared_backend.url)


@pytest.fixture
async def asking(
    addresses: Addresses, shared_backend: BackendServer, tmp_path: Path
) -> AsyncIterator[Asking]:
    async with asking_router(addresses, shared_backend, asking_config(), tmp_path) as opened:
        opened.heal()
        yield opened
        opened.heal()


async def test_the_preferred_model_answers(asking: Asking) -> None:
    answer = await asking.ask()
    assert (answer.model, answer.rank, answer.provisional) == (PREFERRED, AnswerRank.CHOSEN_MODEL, False)
    assert asking.task()["status"] == "solved"


async def test_both_start_at_once_and_the_log_says_who_was_to_answer(asking: Asking) -> None:
    answer = await asking.ask()
    assert await asking.router.late(answer) is None
    await settled(asking)
    calls = {row["role"]: row for row in asking.calls()}
    assert set(calls) == {"asked", "fallback"}
    assert {(row["preferred"], row["fallback"]) for row in calls.values()} == {(PREFERRED, CHEAP)}
    assert (calls["asked"]["settlement"], calls["asked"]["late"]) == ("solved", False)
    apart = calls["fallback"]["started_at"] - calls["asked"]["started_at"]
    assert abs(apart.total_seconds()) < 0.1


async def settled(asking: Asking) -> None:
    """Wait until nothing of what was asked is under way."""
    deadline = time.monotonic() + 15
    while asking.router._asked:
        assert time.monotonic() < deadline, "an asking does not end"
        await asyncio.sleep(0.02)


async def test_a_preferred_model_that_fails_is_followed_by_the_next_and_the_fallback(asking: Asking) -> None:
    asking.fault("error", PREFERRED)
    answer = await asking.ask()
    assert answer.model in (CHEAP, SECOND)
    assert answer.seconds < 1
    await asking.router.late(answer)
    await settled(asking)
    task = asking.task()
    assert (task["status"], task["answered_by"], task["answer_rank"]) == ("solved", SECOND, 3)
    assert [row["settlement"] for row in asking.calls() if row["role"] == "asked"] == ["passed"]


async def test_a_preferred_model_that_hangs_costs_no_more_than_the_deadline(asking: Asking) -> None:
    asking.fault("hang", PREFERRED)
    answer = await asking.ask(deadline_seconds=0.8)
    print(answer)
    for e in asking.events: print(e.seconds, e.kind, e.text)
    assert (answer.model, answer.provisional) == (CHEAP, True)
    assert 0.8 <= answer.seconds < 0.9
    assert asking.task()["status"] == "unsolved", "a provisional answer never solves"
    assert asking.task()["answer_rank"] == 2


async def test_a_late_answer_replaces_what_was_given(asking: Asking) -> None:
    answer = await asking.ask(deadline_seconds=0.05)
    assert (answer.model, answer.rank, answer.provisional) == (None, AnswerRank.PASSAGES, True)
    better = answer
    while (late := await asking.router.late(better)) is not None:
        assert late.rank > better.rank
        assert late.late
        better = late
    assert better.model == PREFERRED
    await settled(asking)
    assert (asking.task()["status"], asking.task()["answered_by"]) == ("solved", PREFERRED)
    by_role = {row["role"]: row for row in asking.calls()}
    assert by_role["asked"]["late"]
    assert by_role["passages"]["settlement"] in ("kept", "superseded")


async def test_when_every_model_fails_there_are_still_the_passages(asking: Asking) -> None:
    asking.fault("error", "*")
    answer = await asking.ask()
    assert (answer.model, answer.rank, answer.provisional) == (None, AnswerRank.PASSAGES, False)
    await settled(asking)
    task = asking.task()
    assert (task["status"], task["answer"], task["answer_rank"]) == ("failed", answer.text, 1)
    assert PREFERRED in task["failure"]
    assert len(answer.calls) == 4, "three of the ranking, one fallback"


async def test_a_model_without_a_permit_in_time_is_passed_over(asking: Asking) -> None:
    asking.fault("error", CHEAP)
    await asking.router._asker.limiter.set_target(PREFERRED, "0")
    answer = await asking.ask()
    assert answer.model == SECOND
    assert answer.seconds < 1
    first = answer.calls[0]
    assert (first.model, first.outcome) == (PREFERRED, Outcome.UNSENT)
    assert "target is 0" in first.error
