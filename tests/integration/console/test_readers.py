"""The console's reads from Postgres: failures, calls, task details, sends, ranking, discovery."""

from __future__ import annotations

import asyncio
import json
import uuid
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from plugins.console import dashboard, discovery, tasks
from plugins.console.live import CachedReading
from plugins.console.readers import ReadPool
from router.database import connect, rows
from router.discovery.search import SEARCH_LOCK
from router.errors import InputError
from tests.support.queue import Probe

ALL_CALLS = tasks.CallFilter(None, None, None, None, 50)
SIDE = {"calls": 30, "answered": 30, "worth": 0.8, "score": 0.9, "seconds": 1.5, "cost_usd": 0.0001}
TRIAL = {
    "pairs": 30, "candidate": SIDE, "incumbent": {**SIDE, "worth": 0.7}, "difference": 0.1, "error": 0.02,
    "lower": 0.068,
}  # fmt: skip
ROW = {
    "model": "bright-9b", "endpoint": "bright-9b", "max_tokens": 512, "context_tokens": 8192,
    "timeout_seconds": 30, "default_target": "6/min", "input_price": 0.1, "output_price": 0.1,
}  # fmt: skip


def failed(database: str) -> list[int]:
    with connect(database) as connection:
        return [row["task_id"] for row in tasks.failures(connection, None, None, 20)["failures"]]


async def test_failures_follow_every_change_of_a_task(probe: Probe, database: str) -> None:
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


async def test_a_call_that_fails_its_task_is_among_the_failures(probe: Probe, database: str) -> None:
    await probe.run("UPDATE queue_settings SET max_attempts = 1")
    await probe.run(
        "INSERT INTO runs (run, left_at) VALUES ('a former one', now() - interval '1 hour'), ('now', NULL)"
    )
    await probe.add()
    taken = await probe.must_claim()
    settled = await probe.value("SELECT settle_call($1, 'error', p_error => 'it broke')", taken.call_id)
    assert settled == "failed"
    with connect(database) as connection:
        (found,) = tasks.failures(connection, None, None, 20)["failures"]
        details = tasks.task_details(connection, taken.task_id)
    assert "it broke" in found["failure"]
    assert details is not None
    assert details["task"]["status"] == "failed"
    assert [call.outcome for call in details["calls"]] == ["error"]
    assert details["runs"] == {str(taken.call_id): "now"}


async def test_retry_takes_tasks_by_id_or_category(probe: Probe, database: str) -> None:
    await probe.run(
        "INSERT INTO tasks (prompt, category, status) VALUES ('a', 'general', 'failed'),"
        " ('b', 'general', 'failed'), ('c', 'technical', 'failed'), ('d', 'technical', 'solved')"
    )
    ids = failed(database)
    with connect(database) as connection:
        assert tasks.retry(connection, None, [ids[-1]]).unsolved == 1
    with connect(database) as connection:
        assert tasks.retry(connection, "general", None).unsolved == 1
    assert await probe.value("SELECT count(*) FROM tasks WHERE status = 'unsolved'") == 2
    assert len(failed(database)) == 1
    with connect(database) as connection:
        assert tasks.retry(connection, None, None).unsolved == 1
        assert tasks.retry(connection, None, []).unsolved == 0


async def test_calls_are_filtered_and_paged(probe: Probe, database: str) -> None:
    for _ in range(4):
        await probe.add()
    taken = [await probe.must_claim() for _ in range(4)]
    await probe.value("SELECT settle_call($1, 'answered', 'yes')", taken[0].call_id)
    await probe.value("SELECT settle_call($1, 'timeout')", taken[1].call_id)
    with connect(database) as connection:

        def found(**more: object) -> list[str]:
            filters = tasks.CallFilter(**{**{n: getattr(ALL_CALLS, n) for n in ALL_CALLS.__slots__}, **more})  # type: ignore[arg-type]
            return [str(call["call_id"]) for call in tasks.calls(connection, filters)["calls"]]

        ids = [str(one.call_id) for one in taken]
        everything = found()
        assert sorted(everything) == sorted(ids)
        assert found(outcome="answered") == [ids[0]]
        assert found(outcome="wrong") == [ids[1]]
        assert sorted(found(outcome="under way")) == sorted(ids[2:])
        assert found(model="nobody") == []
        assert found(limit=2) == everything[:2]
        assert found(before=everything[1]) == everything[2:]


async def test_sends_are_counted_by_model_and_bucket(probe: Probe, database: str) -> None:
    now = datetime.now(timezone.utc)
    for _ in range(3):
        await probe.add()
        await probe.must_claim()
    with connect(database) as connection:
        seen = dashboard.sends(connection, now - timedelta(seconds=60), 1000)
        few = dashboard.sends(connection, now - timedelta(seconds=60), 2)
    assert sum(sum(line) for line in seen["models"].values()) == 3
    assert all(len(line) == seen["last"] - seen["first"] + 1 for line in seen["models"].values())
    assert sum(sum(line) for line in few["models"].values()) == 2, "at most max_calls are read"


async def test_ranking_contains_the_changes_of_reviews(probe: Probe, database: str) -> None:
    reviews = tasks.RecentReviews()
    with connect(database) as connection:
        before = tasks.ranking(connection, reviews)["categories"]["general"]
        assert tasks.ranking(connection, reviews)["reviews"] == []
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
        (seen,) = tasks.ranking(connection, reviews)["reviews"]
    assert seen["order"] == [second, first]
    assert seen["moves"][0] == {"model": second, "before": 2, "after": 1, "reason": "better"}


async def test_a_nul_character_is_reported(database: str) -> None:
    reads = ReadPool(lambda: database)
    try:
        with pytest.raises(InputError, match="contains a NUL character"):
            await reads.run(lambda connection: tasks.failures(connection, "a\0b", None, 20))
    finally:
        reads.close()


async def test_invalid_and_unknown_values(database: str) -> None:
    with connect(database) as connection:
        assert tasks.task_details(connection, 1) is None
        assert tasks.task_details(connection, 2**70) is None
        assert tasks.task_details(connection, -5) is None
        assert tasks.find(connection, "\u00b2") == {"tasks": []}, "a superscript is not a task id"
        with pytest.raises(InputError, match="no model"):
            tasks.require_model(connection, "gpt-17")
        unknown = tasks.CallFilter(None, None, None, str(uuid.UUID(int=0)), 5)
        assert tasks.calls(connection, unknown)["calls"] == []
        assert rows(connection, "SELECT 1 AS one") == [{"one": 1}]


@pytest.fixture
def criteria(tmp_path: Path) -> discovery.ProbationCriteria:
    (tmp_path / "search.yaml").write_text("probation: {min_calls: 40, max_days: 7, margin: 0.02}")
    return discovery.ProbationCriteria(tmp_path)


def searched(database: str, criteria: discovery.ProbationCriteria) -> dict[str, Any]:
    with connect(database) as connection:
        return discovery.read_discovery(connection, criteria)


async def find(
    probe: Probe, search: int, model: str, category: str | None, verdict: str, **more: Any
) -> None:
    trial = json.dumps(more["trial"]) if "trial" in more else None
    reason = more.get("reason", "because")
    await probe.run(
        "SELECT record_candidate($1, $2, $3, 'mock', $4, $5, $6::jsonb)",
        search, model, category, verdict, reason, trial,
    )  # fmt: skip


async def test_discovery_is_empty_before_the_first_search(
    probe: Probe, database: str, criteria: discovery.ProbationCriteria
) -> None:
    seen = searched(database, criteria)
    assert seen["search"] is None
    assert seen["probation"] == seen["events"] == []
    assert all(here == {"counts": {}, "findings": []} for here in seen["candidates"].values())
    assert set(seen["candidates"]) == {"technical", "creative", "general"}
    assert seen["needs"] == {"least_calls": 40, "most_nights": 7, "margin": 0.02}


async def test_only_a_search_that_holds_its_lock_is_running(probe: Probe, database: str) -> None:
    search = await probe.value(
        "INSERT INTO searches (by, progress) VALUES ('ann', '{\"calls\": 3}') RETURNING search"
    )
    with connect(database, autocommit=True) as connection:
        assert discovery.running_search(connection) == {"running": None}  # it crashed
        with connect(database, autocommit=True) as holder:
            rows(holder, "SELECT pg_advisory_lock(%s)", (SEARCH_LOCK,))
            found = discovery.running_search(connection)["running"]
            assert (found["search"], found["by"], found["progress"]) == (search, "ann", {"calls": 3})


async def test_the_newest_finding_of_each_candidate_is_shown(
    probe: Probe, database: str, criteria: discovery.ProbationCriteria, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await probe.value("INSERT INTO searches (by, ended_at) VALUES ('night', now()) RETURNING search")
    await find(probe, first, "dull-9b", "general", "refused", reason="too small")
    await find(probe, first, "odd-9b", None, "refused", reason="no license")
    second = await probe.value("INSERT INTO searches (by, notes) VALUES ('night', '{slow}') RETURNING search")
    await find(probe, second, "dull-9b", "general", "lost", reason="not surely better", trial=TRIAL)
    for number in range(5):
        await find(probe, second, f"small-{number}", "general", "refused")
    monkeypatch.setattr(discovery, "MAX_PER_VERDICT", 3)
    seen = searched(database, criteria)
    assert seen["search"]["search"] == second
    assert seen["search"]["ended_at"] is None
    assert seen["search"]["notes"] == ["slow"]
    general = seen["candidates"]["general"]
    assert general["counts"] == {"lost": 1, "refused": 5}
    assert [one["model"] for one in general["findings"]] == ["dull-9b", "small-4", "small-3", "small-2"]
    assert general["findings"][0]["trial"]["candidate"]["worth"] == 0.8
    assert seen["candidates"][""]["findings"][0]["reason"] == "no license"
    assert seen["candidates"]["technical"]["findings"] == []


async def test_a_model_on_probation_is_shown_with_its_trial_and_calls(
    probe: Probe, database: str, criteria: discovery.ProbationCriteria
) -> None:
    search = await probe.value("INSERT INTO searches (by) VALUES ('night') RETURNING search")
    await find(probe, search, "bright-9b", "general", "taken", trial=TRIAL)
    await probe.run(
        "SELECT admit_candidate($1, 'night', $2::jsonb, 'general', 0.01, 'better', '{}')",
        search, json.dumps(ROW),
    )  # fmt: skip
    await find(probe, search, "bright-9b", "general", "known", reason="it is of the roster")
    await probe.run("INSERT INTO evidence_periods VALUES (60, 1, 'epoch', true), (86400, 1, now(), true)")
    for period, seconds, calls in ((1, 86400, 12), (2, 86400, 5), (1, 60, 99)):
        await probe.run(
            "INSERT INTO evidence (period, period_seconds, category, model, calls, answered, excused,"
            " log_seconds, log_seconds_squares, timed, cost, cost_squares, priced)"
            " VALUES ($1, $2, 'general', 'bright-9b', $3, $3, 0, 0, 0, 0, 0, 0, 0)",
            period, seconds, calls,
        )  # fmt: skip
    seen = searched(database, criteria)
    (model,) = seen["probation"]
    assert (model["model"], model["by"], model["why"]) == ("bright-9b", "night", "better")
    assert (model["search"], model["target"]) == (search, "6/min")
    (here,) = model["categories"].values()
    assert here["calls"] == 17, "by the length of period that is summed now"
    assert here["trial"]["difference"] == 0.1, "also when a later search finds that it is known"
    active = rows_of(database, "SELECT model FROM rankings JOIN roster USING (model)"
                     " WHERE category = 'general' AND state = 'active' ORDER BY place, model")  # fmt: skip
    assert here["middle"] == {"model": active[(len(active) - 1) // 2]["model"], "bound": None}
    assert [event["what"] for event in seen["events"]] == ["taken"]
    await probe.run("SELECT promote_model('bright-9b', 'night', 'proved', '{}', '{}')")
    seen = searched(database, criteria)
    assert seen["probation"] == []
    assert [event["what"] for event in seen["events"]] == ["promoted", "taken"]


async def test_probation_settings_are_read_again_after_an_edit(
    probe: Probe, database: str, criteria: discovery.ProbationCriteria, tmp_path: Path
) -> None:
    assert searched(database, criteria)["needs"]["least_calls"] == 40
    (tmp_path / "search.yaml").write_text("probation: {min_calls: no number}")
    assert searched(database, criteria)["needs"] is None
    (tmp_path / "search.yaml").unlink()
    assert searched(database, criteria)["needs"]["least_calls"] > 0, "the shipped one"


def rows_of(database: str, statement: str) -> list[dict[str, Any]]:
    with connect(database) as connection:
        return rows(connection, statement)


async def test_a_cached_reading_is_read_once_for_concurrent_clients() -> None:
    reads = 0

    async def read() -> bytes:
        nonlocal reads
        reads += 1
        await asyncio.sleep(0)
        if reads == 2:
            raise InputError("away")
        return f"{reads}".encode()

    cached, expired = CachedReading(read, seconds=60), CachedReading(read, seconds=-1)
    assert await asyncio.gather(cached.line(), cached.line(), cached.line()) == [b"1", b"1", b"1"]
    with pytest.raises(InputError):
        await expired.line()
    assert await expired.line() == b"3", "errors are not cached"
    assert await expired.line() == b"4"
