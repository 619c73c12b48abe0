"""What the console reads from Postgres: failures, calls, one task's story, sends, priorities."""

from __future__ import annotations

import uuid
from datetime import datetime, timedelta, timezone

import pytest

from plugins.console import board, work
from router.database import connect, rows
from router.errors import InputError
from tests.queueing import Probe

EVERYTHING = work.Wanted(None, None, None, None, 50)


def failed(database: str) -> list[int]:
    with connect(database) as connection:
        return [row["task_id"] for row in work.failures(connection, None, None, 20)["failures"]]


async def test_failures_are_noted_however_they_come_and_go(probe: Probe, database: str) -> None:
    await probe.run("INSERT INTO tasks (prompt) VALUES ('one'), ('   '), ('three')")
    await probe.run("INSERT INTO tasks (prompt, status, failure) VALUES ('four', 'failed', 'from outside')")
    one, empty, three, four = [
        row["id"] for row in await probe.connection.fetch("SELECT id FROM tasks ORDER BY id")
    ]
    assert sorted(failed(database)) == [empty, four]
    await probe.run("UPDATE tasks SET status = 'failed', failure = 'by hand' WHERE id = $1", three)
    assert failed(database)[0] == three, "the newest failure comes first"
    await probe.run("UPDATE tasks SET status = 'unsolved' WHERE id = $1", three)
    await probe.run("DELETE FROM tasks WHERE id = $1", four)
    assert failed(database) == [empty]
    assert await probe.value("SELECT count(*) FROM task_failures") == 1
    await probe.run("TRUNCATE tasks")
    assert await probe.value("SELECT count(*) FROM task_failures") == 0
    assert one


async def test_a_call_that_fails_its_task_for_good_is_among_the_failures(probe: Probe, database: str) -> None:
    await probe.run("UPDATE queue_settings SET max_attempts = 1")
    await probe.add()
    taken = await probe.must_claim()
    settled = await probe.value("SELECT settle_call($1, 'error', p_error => 'it broke')", taken.call_id)
    assert settled == "failed"
    with connect(database) as connection:
        (found,) = work.failures(connection, None, None, 20)["failures"]
        story = work.story(connection, taken.task_id)
    assert "it broke" in found["failure"]
    assert story is not None
    assert story["task"]["status"] == "failed"
    assert [call.outcome for call in story["calls"]] == ["error"]


async def test_retrying_takes_what_is_named_or_all_of_a_category(probe: Probe, database: str) -> None:
    await probe.run(
        "INSERT INTO tasks (prompt, category, status) VALUES ('a', 'general', 'failed'),"
        " ('b', 'general', 'failed'), ('c', 'technical', 'failed'), ('d', 'technical', 'solved')"
    )
    ids = failed(database)
    with connect(database) as connection:
        assert work.retry(connection, None, [ids[-1]]).unsolved == 1
    with connect(database) as connection:
        assert work.retry(connection, "general", None).unsolved == 1
    assert await probe.value("SELECT count(*) FROM tasks WHERE status = 'unsolved'") == 2
    assert len(failed(database)) == 1
    with connect(database) as connection:
        assert work.retry(connection, None, None).unsolved == 1
        assert work.retry(connection, None, []).unsolved == 0


async def test_calls_are_filtered_and_paged(probe: Probe, database: str) -> None:
    for _ in range(4):
        await probe.add()
    taken = [await probe.must_claim() for _ in range(4)]
    await probe.value("SELECT settle_call($1, 'answered', 'yes')", taken[0].call_id)
    await probe.value("SELECT settle_call($1, 'timeout')", taken[1].call_id)
    with connect(database) as connection:

        def found(**more: object) -> list[str]:
            wanted = work.Wanted(**{**{n: getattr(EVERYTHING, n) for n in EVERYTHING.__slots__}, **more})  # type: ignore[arg-type]
            return [str(call["call_id"]) for call in work.calls(connection, wanted)["calls"]]

        ids = [str(one.call_id) for one in taken]
        everything = found()
        assert sorted(everything) == sorted(ids)
        assert found(outcome="answered") == [ids[0]]
        assert found(outcome="wrong") == [ids[1]]
        assert sorted(found(outcome="under way")) == sorted(ids[2:])
        assert found(model="nobody") == []
        assert found(limit=2) == everything[:2]
        assert found(before=everything[1]) == everything[2:]


async def test_sends_are_counted_by_model_and_stretch(probe: Probe, database: str) -> None:
    now = datetime.now(timezone.utc)
    for _ in range(3):
        await probe.add()
        await probe.must_claim()
    with connect(database) as connection:
        seen = board.sends(connection, now - timedelta(seconds=60), 1000)
        few = board.sends(connection, now - timedelta(seconds=60), 2)
    assert sum(sum(line) for line in seen["models"].values()) == 3
    assert all(len(line) == seen["last"] - seen["first"] + 1 for line in seen["models"].values())
    assert sum(sum(line) for line in few["models"].values()) == 2, "no more calls are read than that"


async def test_priorities_name_what_reviews_moved(probe: Probe, database: str) -> None:
    with connect(database) as connection:
        before = work.priorities(connection)["categories"]["general"]
    first, second = before[0]["model"], before[1]["model"]
    review = await probe.value(
        "INSERT INTO reviews (kind, by, period_seconds, period, moved, settings)"
        " VALUES ('review', 'night', 86400, 1, 2, '{}') RETURNING review"
    )
    for model, was, place in ((second, 2, 1), (first, 1, 2)):
        await probe.run(
            "INSERT INTO review_places (review, category, model, place_before, place, standing, before,"
            " least_share, most_share, reason, evidence)"
            " VALUES ($1, 'general', $2, $3, $4, 'ranked', '{}', 0, 1, 'better', '{}')",
            review, model, was, place,
        )  # fmt: skip
    with connect(database) as connection:
        (seen,) = work.priorities(connection)["reviews"]
    assert seen["order"] == [second, first]
    assert seen["moves"][0] == {"model": second, "before": 2, "after": 1, "reason": "better"}


async def test_odd_questions_are_refused_or_answered_with_nothing(database: str) -> None:
    with connect(database) as connection:
        assert work.story(connection, 1) is None
        assert work.story(connection, 2**70) is None
        with pytest.raises(InputError, match="no moment"):
            work.failures(connection, None, "yesterday'; DROP TABLE tasks", 5)
        with pytest.raises(InputError, match="no model"):
            work.require_model(connection, "gpt-17")
        with pytest.raises(InputError, match="at most"):
            work.retry(connection, None, [2**63])
        unknown = work.Wanted(None, None, None, str(uuid.UUID(int=0)), 5)
        assert work.calls(connection, unknown)["calls"] == []
        assert rows(connection, "SELECT 1 AS one") == [{"one": 1}]
