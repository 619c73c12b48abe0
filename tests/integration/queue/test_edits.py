"""Changes of tasks by people and other programs: the queue follows, and outdated answers are rejected."""

from __future__ import annotations

import asyncpg
import pytest

from tests.support.queue import Probe, probing


@pytest.mark.parametrize(
    "reset",
    [
        "status = 'unsolved'",
        "status = 'unsolved', answer = NULL, answered_by = NULL, answer_rank = NULL, answer_call_id = NULL",
    ],
)
async def test_a_reset_solved_task_is_solved_again(probe: Probe, reset: str) -> None:
    task_id = await probe.add()
    await probe.settle(await probe.must_claim(), answer="first")
    await probe.run(f"UPDATE tasks SET {reset}")
    await probe.assert_counts_exact()
    taken = await probe.must_claim()
    assert (taken.task_id, taken.attempt) == (task_id, 1)
    assert await probe.settle(taken, answer="second") == "solved"
    task = await probe.task(task_id)
    assert (task["status"], task["answer"], task["answer_rank"]) == ("solved", "second", 3)
    await probe.assert_counts_exact()


async def test_resetting_a_failed_task_clears_failure_and_attempts(probe: Probe) -> None:
    await probe.run("UPDATE queue_settings SET max_attempts = 1")
    task_id = await probe.add()
    await probe.settle(await probe.must_claim(), "error", error="broken pipe")
    assert (await probe.task(task_id))["failure"] == "m1: error: broken pipe"
    await probe.run("UPDATE tasks SET status = 'unsolved'")
    assert (await probe.task(task_id))["failure"] is None
    assert (await probe.must_claim()).attempt == 1
    await probe.assert_counts_exact()


async def test_a_reset_with_another_category_updates_both_counters(probe: Probe) -> None:
    await probe.add(category="technical")
    await probe.settle(await probe.must_claim())
    await probe.run("UPDATE tasks SET status = 'unsolved', category = 'creative'")
    assert await probe.counts() == {"creative": (1, 0, 0)}
    await probe.run("UPDATE tasks SET prompt = 'edited', category = 'technical'")
    assert await probe.counts() == {"technical": (1, 0, 0)}
    await probe.assert_counts_exact()


async def test_an_edit_makes_the_call_in_flight_stale(probe: Probe) -> None:
    task_id = await probe.add("2 + 2?")
    old = await probe.must_claim()
    await probe.run("UPDATE tasks SET prompt = '3 + 3?'")
    new = await probe.must_claim()
    assert (new.prompt, new.task_id) == ("3 + 3?", task_id)
    assert await probe.settle(old, answer="4") == "stale"
    queued = await probe.queued(task_id)
    assert queued is not None
    assert queued["call_id"] == new.call_id, "the stale call took nothing from the new one"
    assert await probe.settle(new, answer="6") == "solved"
    assert (await probe.task(task_id))["answer"] == "6"
    assert (await probe.call(old.call_id))["late"]
    await probe.assert_counts_exact()


async def test_editing_a_prompt_to_empty_fails_the_task(probe: Probe) -> None:
    task_id = await probe.add()
    await probe.run("UPDATE tasks SET prompt = ''")
    assert (await probe.task(task_id))["status"] == "failed"
    assert await probe.queued(task_id) is None
    await probe.assert_counts_exact()


@pytest.mark.parametrize("before", ["solved", "failed"])
@pytest.mark.parametrize(
    ("change", "status", "answer"),
    [
        ("prompt = 'new'", "unsolved", None),
        ("prompt = 'new', category = 'technical'", "unsolved", None),
        ("prompt = 'new', priority = 5, deadline_at = 'infinity'", "unsolved", None),
        ("prompt = 'new', status = status", "unsolved", None),
        ("prompt = 'new', answer = answer", "unsolved", None),
        ("prompt = 'new', status = 'unsolved'", "unsolved", None),
        ("prompt = 'new', answer = 'by hand', status = 'solved'", "solved", "by hand"),
        ("prompt = repeat('long', 300000)", "failed", None),
        ("prompt = prompt", "before", "before"),
        ("prompt = ''", "before", "before"),
    ],
)
async def test_an_edited_prompt_of_a_finished_task_is_solved_again(
    probe: Probe, before: str, change: str, status: str, answer: str | None
) -> None:
    task_id = await probe.add("old", category="general")
    taken = await probe.must_claim()
    await probe.settle(taken, answer="old answer")
    if before == "failed":
        await probe.run("UPDATE tasks SET status = 'failed', failure = 'f' WHERE id = $1", task_id)
    await probe.run(f"UPDATE tasks SET {change} WHERE id = $1", task_id)
    task = await probe.task(task_id)
    assert task["status"] == (before if status == "before" else status)
    assert task["answer"] == ("old answer" if answer == "before" else answer)
    assert (await probe.queued(task_id) is not None) == (task["status"] == "unsolved")
    await probe.assert_counts_exact()
    known = await probe.value("SELECT known FROM knowledge_slice($1, $1, 1)", task_id)
    assert known == (task["status"] == "solved")
    if answer == "by hand":
        assert task["answer_rank"] == 3
    if task["status"] == "unsolved":
        assert task["prompt_version"] != taken.prompt_version
        assert await probe.settle(await probe.must_claim(), answer="new answer") == "solved"
        assert (await probe.task(task_id))["answer"] == "new answer"


async def test_an_edited_prompt_is_classified_again_unless_its_producer_set_the_category(
    probe: Probe,
) -> None:
    await probe.run("UPDATE queue_settings SET categorise = true")
    own = await probe.add("old", category="technical")
    classified = await probe.add("old")
    (taken,) = await probe.all("SELECT * FROM claim_uncategorized(10)")
    arguments = [[classified], [taken["prompt_version"]], ["creative"], [0.9], ["a test"]]
    await probe.value("SELECT assign_categories($1, $2, $3, $4, $5)", *arguments)
    while claim := await probe.claim():
        await probe.settle(claim)
    assert (await probe.task(classified))["category"] == "creative"
    await probe.run("UPDATE tasks SET prompt = 'new'")
    assert (await probe.task(own))["category"] == "technical"
    assert (await probe.task(classified))["category"] is None
    assert [row["task_id"] for row in await probe.all("SELECT * FROM claim_uncategorized(10)")] == [
        classified
    ]
    await probe.assert_counts_exact()


async def test_the_answer_to_a_deleted_task_is_stale(probe: Probe) -> None:
    await probe.add()
    taken = await probe.must_claim()
    await probe.run("DELETE FROM tasks")
    assert await probe.settle(taken) == "stale"
    assert await probe.counts() == {}
    await probe.assert_counts_exact()


async def test_deleting_tasks_of_every_status_is_counted(probe: Probe) -> None:
    await probe.run(
        "INSERT INTO tasks (prompt, status, category) SELECT 'p', s, c"
        " FROM unnest('{unsolved,solved,failed}'::text[]) AS s,"
        " unnest('{technical,unknown,NULL}'::text[]) AS c"
    )
    await probe.assert_counts_exact()
    await probe.run("DELETE FROM tasks WHERE category IS DISTINCT FROM 'technical'")
    assert await probe.counts() == {"technical": (1, 1, 1)}
    await probe.run("DELETE FROM tasks")
    assert await probe.counts() == {}


async def test_a_reused_id_does_not_take_the_old_tasks_answer(probe: Probe) -> None:
    first = await probe.add("old prompt")
    old = await probe.must_claim()
    await probe.run("TRUNCATE tasks RESTART IDENTITY")
    assert await probe.counts() == {}
    second = await probe.add("new prompt")
    assert second == first, "the trap is set"
    assert await probe.settle(old, answer="to the old prompt") == "stale"
    task = await probe.task(second)
    assert (task["status"], task["answer"]) == ("unsolved", None)
    await probe.run("DELETE FROM tasks")
    await probe.add("a third", id=first)
    assert await probe.settle(await probe.must_claim(), answer="to the third") == "solved"
    await probe.assert_counts_exact()


async def test_a_failure_or_unclaim_after_truncate_changes_nothing(probe: Probe) -> None:
    await probe.add()
    await probe.add()
    one, two = await probe.must_claim(), await probe.must_claim()
    await probe.run("TRUNCATE tasks")
    assert await probe.settle(one, "timeout") == "late"
    assert await probe.unclaim(two) is False
    assert await probe.counts() == {}


async def test_an_external_answer_wins_over_the_call_in_flight(probe: Probe) -> None:
    task_id = await probe.add()
    taken = await probe.must_claim()
    await probe.run("UPDATE tasks SET status = 'solved', answer = 'by the old program'")
    assert await probe.queued(task_id) is None
    assert await probe.settle(taken, answer="too late") == "superseded"
    task = await probe.task(task_id)
    assert (task["answer"], task["answer_rank"]) == ("by the old program", 3)
    assert task["solved_at"] is not None
    await probe.assert_counts_exact()


async def test_an_external_answer_may_follow_the_status(probe: Probe) -> None:
    task_id = await probe.add()
    taken = await probe.must_claim()
    await probe.run("UPDATE tasks SET status = 'solved'")
    await probe.run("UPDATE tasks SET answer = 'by the old program'")
    assert await probe.settle(taken, answer="too late") == "superseded"
    assert (await probe.task(task_id))["answer"] == "by the old program"


async def test_a_change_of_category_or_priority_moves_the_task(probe: Probe) -> None:
    first, second = await probe.add(), await probe.add()
    await probe.run("UPDATE tasks SET priority = 3 WHERE id = $1", second)
    assert (await probe.must_claim()).task_id == second
    await probe.run("UPDATE tasks SET category = 'technical' WHERE id = $1", first)
    await probe.assert_counts_exact()
    assert await probe.claim("general") is None
    assert (await probe.must_claim("technical")).task_id == first


async def test_changing_the_category_of_a_claimed_task_moves_only_its_count(probe: Probe) -> None:
    await probe.add()
    taken = await probe.must_claim()
    await probe.run("UPDATE tasks SET category = 'technical'")
    await probe.assert_counts_exact()
    assert await probe.settle(taken) == "solved"
    assert await probe.counts() == {"technical": (0, 1, 0)}
    await probe.assert_counts_exact()


async def test_an_unknown_status_is_refused(probe: Probe) -> None:
    await probe.add()
    with pytest.raises(asyncpg.CheckViolationError):
        await probe.run("UPDATE tasks SET status = 'running'")


# Changes without triggers, as in a restore: the reconciler repairs both tables.


@pytest.fixture
async def unseen(database: str, probe: Probe) -> Probe:
    """A second connection that bypasses triggers."""
    async with probing(database) as other:
        await other.run("SET session_replication_role = replica")
        yield other  # type: ignore[misc]


async def test_reconcile_queues_tasks_inserted_without_triggers(probe: Probe, unseen: Probe) -> None:
    await unseen.run("INSERT INTO tasks (prompt) SELECT 'p' FROM generate_series(1, 1200)")
    await unseen.run("INSERT INTO tasks (prompt) VALUES ('')")
    assert await probe.claim() is None
    assert await probe.reconcile() == (1200, 0)
    assert await probe.counts() == {"general": (1200, 0, 1)}
    assert await probe.reconcile() == (0, 0)
    await probe.assert_counts_exact()
    assert (await probe.must_claim()).prompt == "p"


async def test_reconcile_removes_tasks_finished_or_deleted_without_triggers(
    probe: Probe, unseen: Probe
) -> None:
    solved, failed, gone, stays = [await probe.add() for _ in range(4)]
    await unseen.run("UPDATE tasks SET status = 'solved', answer = 'a' WHERE id = $1", solved)
    await unseen.run("UPDATE tasks SET status = 'failed' WHERE id = $1", failed)
    await unseen.run("DELETE FROM tasks WHERE id = $1", gone)
    assert await probe.reconcile() == (0, 3)
    assert await probe.counts() == {"general": (1, 1, 1)}
    await probe.assert_counts_exact()
    assert (await probe.must_claim()).task_id == stays


async def test_a_claim_skips_a_task_deleted_without_triggers(probe: Probe, unseen: Probe) -> None:
    gone, stays = await probe.add(), await probe.add()
    await unseen.run("DELETE FROM tasks WHERE id = $1", gone)
    assert (await probe.must_claim()).task_id == stays
    assert await probe.counts() == {"general": (1, 0, 0)}


async def test_a_reset_without_triggers_is_a_new_version_after_reconcile(probe: Probe, unseen: Probe) -> None:
    task_id = await probe.add()
    await probe.settle(await probe.must_claim(), answer="first")
    await unseen.run(
        "UPDATE tasks SET status = 'unsolved'"
    )  # its rank is still 3, which no answer could replace
    assert await probe.reconcile() == (1, 0)
    await probe.assert_counts_exact()
    assert await probe.settle(await probe.must_claim(), answer="second") == "solved"
    assert (await probe.task(task_id))["answer"] == "second"
    await probe.assert_counts_exact()


async def test_a_superseded_answer_ends_the_claim_as_an_attempt(probe: Probe, unseen: Probe) -> None:
    task_id = await probe.add()
    await unseen.run("UPDATE tasks SET answer = 'a', answer_rank = 3")  # unsolved, but with an answer
    for _ in range(5):
        await probe.wake()
        taken = await probe.claim()
        if taken is not None:
            assert await probe.settle(taken) == "superseded"
    assert (await probe.task(task_id))["status"] == "solved"
    assert await probe.queued(task_id) is None
    await probe.assert_counts_exact()


async def test_a_claim_reads_the_prompt_version_of_the_task(probe: Probe, unseen: Probe) -> None:
    await probe.add()
    await unseen.run("UPDATE tasks SET prompt = 'edited', prompt_version = 77")
    taken = await probe.must_claim()
    assert (taken.prompt, taken.prompt_version) == ("edited", 77)
    assert await probe.settle(taken) == "solved"


async def test_reconcile_moves_tasks_of_changed_or_removed_categories(probe: Probe, unseen: Probe) -> None:
    one, two = await probe.add(category="creative"), await probe.add()
    await unseen.run("UPDATE tasks SET category = 'technical', priority = 7 WHERE id = $1", two)
    await probe.run("DELETE FROM categories WHERE name = 'creative'")
    await probe.reconcile()
    await probe.assert_counts_exact()
    assert (await probe.must_claim("technical")).task_id == two
    assert (await probe.must_claim("general")).task_id == one


async def test_a_claim_of_an_unknown_worker_is_released(probe: Probe) -> None:
    task_id = await probe.add()
    await probe.must_claim(worker="forgotten")
    await probe.run("DELETE FROM workers")
    assert await probe.value("SELECT release_lost_claims()") == 0, (
        "without the worker's row it cannot be seen"
    )
    await probe.reconcile()
    assert await probe.value("SELECT release_lost_claims()") == 1
    assert (await probe.must_claim(worker="w2")).task_id == task_id


async def test_recount_repairs_the_counters(probe: Probe) -> None:
    await probe.run(
        "INSERT INTO tasks (prompt, status)"
        " SELECT 'p', s FROM unnest('{unsolved,solved,solved,failed}'::text[]) AS s"
    )
    await probe.run("INSERT INTO task_counts VALUES ('technical', 5, 5, 5)")
    await probe.run("SELECT recount_tasks()")
    assert await probe.counts() == {"general": (1, 2, 1)}
    await probe.assert_counts_exact()


async def test_recount_of_a_category_with_one_status_only(probe: Probe) -> None:
    await probe.add(status="solved")
    await probe.run("SELECT recount_tasks()")
    assert await probe.counts() == {"general": (0, 1, 0)}


async def test_a_restored_dump_of_another_cluster_keeps_the_counters_exact(probe: Probe) -> None:
    # The dump contains a compaction mark ahead of this cluster's transaction ids.
    await probe.run("INSERT INTO task_count_folds VALUES ('4000000000')")
    await probe.add()
    assert await probe.counts() == {"general": (1, 0, 0)}
    await probe.assert_counts_exact()
