"""Claims, and every way in which a claim ends."""

from __future__ import annotations

import asyncio
import time
import uuid

import asyncpg
import pytest

from router.task import new_call_id
from tests.support.queue import Probe, probing


async def test_higher_priority_first_then_in_order_of_arrival(probe: Probe) -> None:
    priorities = [0, 5, -3, 5, 0, 9]
    ids = [await probe.add(priority=priority) for priority in priorities]
    taken = [(await probe.must_claim()).task_id for _ in ids]
    assert taken == [ids[5], ids[1], ids[3], ids[0], ids[4], ids[2]]
    assert await probe.claim() is None


async def test_the_order_of_categories_precedes_priority(probe: Probe) -> None:
    urgent = await probe.add(category="creative", priority=9)
    usual = await probe.add(category="technical")
    assert (await probe.must_claim("technical", "creative")).task_id == usual
    assert (await probe.must_claim("technical", "creative")).task_id == urgent
    assert await probe.claim("technical", "creative") is None


async def test_only_tasks_of_the_given_categories_are_claimed(probe: Probe) -> None:
    await probe.add(category="creative")
    assert await probe.claim("technical") is None
    assert await probe.claim("technical", "creative") is not None


async def test_only_ready_tasks_are_claimed(probe: Probe) -> None:
    await probe.add()
    first = await probe.must_claim()
    assert await probe.claim() is None, "claimed"
    await probe.settle(first, "error")
    assert await probe.claim() is None, "waiting for its retry"
    await probe.wake()
    second = await probe.must_claim()
    assert second.attempt == 2
    await probe.settle(second)
    assert await probe.claim() is None, "solved"


async def test_a_claim_logs_its_call(probe: Probe) -> None:
    await probe.add("p" * 100, max_tokens=50)
    taken = await probe.must_claim(model="m7")
    call = await probe.call(taken.call_id)
    assert (call["model"], call["task_id"], call["worker"], call["attempt"]) == ("m7", taken.task_id, "w1", 1)
    assert (call["reserved_tokens"], call["outcome"], call["sent_at"]) == (150, None, None)


async def test_requeued_tasks_are_claimed_first(probe: Probe) -> None:
    ids = [await probe.add() for _ in range(4)]
    unclaimed, failed = await probe.must_claim(), await probe.must_claim()
    assert await probe.unclaim(unclaimed)
    await probe.settle(failed, "error")
    await probe.wake()
    again = [(await probe.must_claim()) for _ in ids]
    assert [t.task_id for t in again] == ids
    assert [t.attempt for t in again] == [1, 2, 1, 1], "an unclaim is no attempt, an error is one"


async def test_unclaim_deletes_the_call_and_is_fenced(probe: Probe) -> None:
    await probe.add()
    first = await probe.must_claim()
    assert await probe.unclaim(first)
    assert await probe.unclaim(first) is False
    assert await probe.value("SELECT count(*) FROM model_calls") == 0
    second = await probe.must_claim()
    assert await probe.unclaim(first) is False
    assert await probe.settle(second) == "solved"


async def test_settling_twice_returns_the_first_settlement(probe: Probe) -> None:
    task_id = await probe.add()
    taken = await probe.must_claim()
    assert await probe.settle(taken, answer="one") == "solved"
    assert await probe.settle(taken, answer="two") == "solved"
    assert await probe.settle(taken, "error") == "solved"
    assert (await probe.task(task_id))["answer"] == "one"
    await probe.assert_counts_exact()


async def test_concurrent_settlements_of_one_call_count_once(probe: Probe, database: str) -> None:
    async with probing(database) as a, probing(database) as b:
        for outcome in ("answered", "error") * 10:
            await probe.add()
            taken = await probe.must_claim()
            both = await asyncio.gather(a.settle(taken, outcome), b.settle(taken, outcome))
            assert set(both) == {"solved" if outcome == "answered" else "retry"}
    await probe.assert_counts_exact()
    assert await probe.value("SELECT max(attempt) FROM queue") == 1


async def test_the_last_attempt_fails_the_task_with_reasons_newest_first(probe: Probe) -> None:
    await probe.run("UPDATE queue_settings SET max_attempts = 3")
    task_id = await probe.add()
    settled = []
    for n in range(3):
        taken = await probe.must_claim(model=f"m{n}")
        settled.append(await probe.settle(taken, "error", error=f"reason {n}"))
        await probe.wake()
    assert settled == ["retry", "retry", "failed"]
    task = await probe.task(task_id)
    assert task["status"] == "failed"
    assert task["failure"] == "m2: error: reason 2\nm1: error: reason 1\nm0: error: reason 0"
    assert await probe.queued(task_id) is None
    await probe.assert_counts_exact()


async def test_uncounted_failures_are_not_attempts(probe: Probe) -> None:
    await probe.run("UPDATE queue_settings SET max_attempts = 1")
    await probe.add()
    for _ in range(5):
        assert await probe.settle(await probe.must_claim(), "rate_limited", counted=False) == "retry"
    assert (await probe.must_claim()).attempt == 1


async def test_retry_delay_grows_exponentially_with_jitter_up_to_the_cap(probe: Probe) -> None:
    await probe.run("UPDATE queue_settings SET retry_base_seconds = 2, retry_cap_seconds = 10")
    for attempt, expected in [(1, 2), (2, 4), (3, 8), (4, 10), (1000, 10)]:
        waits = await probe.all(
            "SELECT extract(epoch FROM retry_delay($1))::float8 AS s FROM generate_series(1, 200)", attempt
        )
        seconds = [row["s"] for row in waits]
        assert expected * 0.75 <= min(seconds) < expected * 0.85
        assert expected * 1.15 < max(seconds) <= expected * 1.25


async def test_a_retry_prefers_another_model_for_a_limited_time(probe: Probe) -> None:
    task_id = await probe.add()
    await probe.settle(await probe.must_claim(model="m1"), "error")
    await probe.run("UPDATE queue SET wake_at = clock_timestamp()")
    await probe.run("SELECT promote_waiting()")
    assert await probe.claim(model="m1") is None
    other = await probe.must_claim(model="m2")
    assert (other.task_id, other.attempt) == (task_id, 2)
    await probe.unclaim(other)
    await probe.run("UPDATE queue SET not_by_until = clock_timestamp()")
    await probe.unclaim(await probe.must_claim(model="m1"))
    await probe.run("UPDATE queue SET not_by_until = clock_timestamp() + interval '1 h'")
    await probe.run("UPDATE tasks SET prompt = 'edited'")
    assert await probe.claim(model="m1") is not None, "the new prompt has not failed with anyone"


async def test_a_task_goes_to_models_that_have_not_failed_it(probe: Probe) -> None:
    await probe.add()
    for model in ["m1", "m2"]:  # two that would otherwise alternate
        await probe.settle(await probe.must_claim(model=model), "error")
        await probe.run("UPDATE queue SET wake_at = clock_timestamp()")
        await probe.run("SELECT promote_waiting()")
    assert await probe.claim(model="m1") is None
    assert await probe.claim(model="m2") is None
    assert (await probe.must_claim(model="m3")).attempt == 3


async def test_an_unusable_answer_sends_the_task_to_another_model_immediately(probe: Probe) -> None:
    task_id = await probe.add()
    assert await probe.settle(await probe.must_claim(model="m1"), "garbage") == "retry"
    assert await probe.claim(model="m1") is None
    assert (await probe.must_claim(model="m2")).task_id == task_id


async def test_a_task_that_every_model_failed_may_be_retried_by_any(probe: Probe) -> None:
    await probe.add()
    await probe.run("UPDATE roster SET state = 'paused' WHERE model NOT IN ('phi-4', 'gemma-2-27b')")
    for model in ["phi-4", "gemma-2-27b"]:
        await probe.settle(await probe.must_claim(model=model), "error")
        await probe.run("UPDATE queue SET wake_at = clock_timestamp()")
        await probe.run("SELECT promote_waiting()")
    assert await probe.claim(model="phi-4") is not None


async def test_promotion_is_bounded_and_takes_the_earliest(probe: Probe) -> None:
    for _ in range(5):
        await probe.add()
    for _ in range(5):
        await probe.settle(await probe.must_claim(), "error")
    await probe.run(
        "UPDATE queue SET wake_at = clock_timestamp() - make_interval(secs => task_id), not_by = NULL"
    )
    latest = await probe.value("SELECT array_agg(task_id ORDER BY task_id DESC) FROM queue")
    assert await probe.value("SELECT promote_waiting(2)") == 2
    assert [(await probe.must_claim()).task_id for _ in range(2)] == latest[:2]
    assert await probe.claim() is None
    assert await probe.value("SELECT promote_waiting()") == 3


# Leases.


async def test_a_worker_with_an_expired_lease_loses_its_claims_and_cannot_claim(
    probe: Probe,
) -> None:
    task_id = await probe.add()
    taken = await probe.must_claim(worker="w1")
    assert await probe.lose_lease("w1") == 1
    call = await probe.call(taken.call_id)
    assert (call["outcome"], call["settlement"]) == ("lost", "retry")
    again = await probe.must_claim(worker="w2")
    assert (again.task_id, again.attempt) == (task_id, 1), "at once, and not as an attempt"
    await probe.add()
    with pytest.raises(asyncpg.PostgresError) as refused:
        await probe.claim(worker="w1")
    assert refused.value.sqlstate == "RT001"
    assert await probe.value("SELECT heartbeat('w1')") is False
    assert await probe.value("SELECT heartbeat('w2')") is True
    await probe.assert_counts_exact()


async def test_a_renewed_lease_keeps_its_claims(probe: Probe) -> None:
    await probe.add()
    taken = await probe.must_claim()
    await probe.run("UPDATE workers SET lease_until = clock_timestamp() - interval '1 s'")
    assert await probe.value("SELECT heartbeat('w1')")
    assert await probe.value("SELECT release_lost_claims()") == 0
    assert await probe.settle(taken) == "solved"


async def test_the_answer_of_a_lost_call_is_stored_if_it_is_the_first(probe: Probe) -> None:
    task_id = await probe.add()
    lost = await probe.must_claim(worker="w1")
    await probe.lose_lease("w1")
    again = await probe.must_claim(worker="w2")
    assert await probe.settle(lost, answer="late, but real") == "solved"
    assert await probe.settle(again, answer="second") == "superseded"
    assert (await probe.task(task_id))["answer"] == "late, but real"
    first, second = await probe.call(lost.call_id), await probe.call(again.call_id)
    assert (first["outcome"], first["settlement"], first["late"]) == ("answered", "solved", True)
    assert (second["outcome"], second["settlement"]) == ("answered", "superseded")
    await probe.assert_counts_exact()


async def test_an_open_call_of_a_lost_worker_is_closed_after_its_task_is_solved(probe: Probe) -> None:
    await probe.add()
    lost = await probe.must_claim(worker="w1")
    await probe.lose_lease("w1")
    left = await probe.must_claim(worker="w2")
    open_still = await probe.fallback_call(await probe.add("another"), 2)
    assert await probe.settle(lost, answer="late, but real") == "solved"
    await probe.lose_lease("w2")
    assert (await probe.call(left.call_id))["outcome"] is None, "what others are at may still end"
    await probe.run("UPDATE workers SET released_at = released_at - interval '6 s' WHERE worker = 'w2'")
    await probe.run("SELECT release_lost_claims()")
    call = await probe.call(left.call_id)
    assert (call["outcome"], call["settlement"]) == ("lost", "late")
    assert (await probe.call(open_still.call_id))["outcome"] is None
    assert await probe.settle(left, answer="later still") == "superseded"
    assert (await probe.call(left.call_id))["outcome"] == "answered"


async def test_the_answer_of_a_lost_call_is_superseded_by_an_earlier_one(probe: Probe) -> None:
    task_id = await probe.add()
    lost = await probe.must_claim(worker="w1")
    await probe.lose_lease("w1")
    await probe.settle(await probe.must_claim(worker="w2"), answer="first")
    assert await probe.settle(lost, answer="late") == "superseded"
    assert (await probe.task(task_id))["answer"] == "first"
    assert (await probe.call(lost.call_id))["outcome"] == "answered"
    await probe.assert_counts_exact()


async def test_a_failure_reported_after_the_lease_expired_changes_nothing(probe: Probe) -> None:
    task_id = await probe.add()
    zombie = await probe.must_claim(worker="w1")
    await probe.lose_lease("w1")
    alive = await probe.must_claim(worker="w2")
    before = await probe.queued(task_id)
    assert await probe.settle(zombie, "error", error="broken") == "late"
    assert await probe.queued(task_id) == before
    assert await probe.settle(alive) == "solved"
    await probe.assert_counts_exact()


async def test_a_late_answer_to_a_failed_task_solves_it(probe: Probe) -> None:
    await probe.run("UPDATE queue_settings SET max_lost_claims = 1")
    task_id = await probe.add()
    lost = await probe.must_claim()
    await probe.lose_lease()
    assert (await probe.task(task_id))["status"] == "failed"
    assert await probe.settle(lost, answer="late") == "solved"
    task = await probe.task(task_id)
    assert (task["status"], task["answer"], task["failure"]) == ("solved", "late", None)
    await probe.assert_counts_exact()


async def test_a_released_worker_returns_its_claims_immediately(probe: Probe) -> None:
    for _ in range(3):
        await probe.add()
        await probe.must_claim(worker="leaving")
    assert await probe.value("SELECT release_worker('leaving')") == 3
    assert [(await probe.must_claim(worker="w2")).attempt for _ in range(3)] == [1, 1, 1]


async def test_release_skips_locked_tasks(probe: Probe, database: str) -> None:
    locked, free = await probe.add(), await probe.add()
    for _ in range(2):
        await probe.must_claim()
    async with probing(database) as person:
        transaction = person.connection.transaction()
        await transaction.start()
        await person.run("UPDATE tasks SET answer = 'being edited' WHERE id = $1", locked)
        assert await asyncio.wait_for(probe.lose_lease(), 5) == 1
        assert (await probe.must_claim(worker="w2")).task_id == free
        await transaction.rollback()
    assert await probe.value("SELECT release_lost_claims()") == 1


# Answers and their ranks.


async def test_a_provisional_answer_does_not_solve_and_is_replaced(probe: Probe) -> None:
    task_id = await probe.add()
    taken = await probe.must_claim()
    assert await probe.settle(await probe.fallback_call(task_id, 1), answer="passages") == "kept"
    assert await probe.settle(await probe.fallback_call(task_id, 2), answer="fallback") == "kept"
    task = await probe.task(task_id)
    assert (task["status"], task["answer"], task["answer_rank"]) == ("unsolved", "fallback", 2)
    assert await probe.settle(await probe.fallback_call(task_id, 1), answer="passages again") == "superseded"
    assert await probe.settle(await probe.fallback_call(task_id, 2), answer="fallback again") == "superseded"
    assert await probe.settle(taken, answer="chosen") == "solved"
    assert await probe.settle(await probe.fallback_call(task_id, 2), answer="too late") == "superseded"
    assert (await probe.task(task_id))["answer"] == "chosen"
    await probe.assert_counts_exact()


@pytest.mark.parametrize(("rank", "status"), [(1, "failed"), (2, "solved")])
async def test_the_last_attempt_solves_with_a_fallback_answer_or_fails_with_passages(
    probe: Probe, rank: int, status: str
) -> None:
    await probe.run("UPDATE queue_settings SET max_attempts = 1")
    task_id = await probe.add()
    taken = await probe.must_claim()
    await probe.settle(await probe.fallback_call(task_id, rank), answer="provisional")
    assert await probe.settle(taken, "error") == "failed"
    task = await probe.task(task_id)
    assert (task["status"], task["answer"], task["answer_rank"]) == (status, "provisional", rank)
    assert (task["failure"] is None) == (status == "solved")
    await probe.assert_counts_exact()


async def test_the_chosen_models_answer_replaces_the_fallbacks_on_a_solved_task(probe: Probe) -> None:
    await probe.run("UPDATE queue_settings SET max_lost_claims = 1")
    task_id = await probe.add()
    lost = await probe.must_claim()
    await probe.settle(await probe.fallback_call(task_id, 2), answer="fallback")
    await probe.lose_lease()
    assert (await probe.task(task_id))["status"] == "solved"
    assert await probe.settle(lost, answer="real") == "solved"
    task = await probe.task(task_id)
    assert (task["answer"], task["answer_rank"]) == ("real", 3)
    await probe.assert_counts_exact()


async def test_a_fallback_models_answer_to_a_failed_task_solves_it(probe: Probe) -> None:
    await probe.run("UPDATE queue_settings SET max_attempts = 1")
    task_id = await probe.add()
    await probe.settle(await probe.must_claim(), "error")
    assert await probe.settle(await probe.fallback_call(task_id, 1), answer="passages") == "kept"
    assert await probe.settle(await probe.fallback_call(task_id, 2), answer="fallback") == "solved"
    await probe.assert_counts_exact()


async def test_provisional_answers_of_an_older_version_are_stale(probe: Probe) -> None:
    task_id = await probe.add()
    old = await probe.fallback_call(task_id, 2)
    await probe.run("UPDATE tasks SET prompt = 'edited'")
    assert await probe.settle(old, answer="to the old one") == "stale"
    assert (await probe.task(task_id))["answer"] is None


async def test_a_missing_answer_counts_as_garbage(probe: Probe) -> None:
    task_id = await probe.add()
    taken = await probe.must_claim()
    assert await probe.settle(taken, answer=None) == "retry"
    assert (await probe.call(taken.call_id))["outcome"] == "garbage"
    assert (await probe.task(task_id))["status"] == "unsolved"


# Crashes: a claim commits asynchronously and may be lost.


async def test_a_log_row_lost_in_a_crash_is_restored(probe: Probe) -> None:
    task_id = await probe.add()
    taken = await probe.must_claim()
    await probe.run("DELETE FROM model_calls")
    await probe.run(
        "UPDATE queue SET state = 'ready', call_id = NULL, worker = NULL, claimed_at = NULL, attempt = 0"
    )
    settled = await probe.settle(
        taken, task_id=task_id, model="m1", prompt_version=taken.prompt_version, reserved_tokens=12
    )
    assert settled == "solved"
    call = await probe.call(taken.call_id)
    assert (call["model"], call["task_id"], call["outcome"], call["reserved_tokens"]) == (
        "m1",
        task_id,
        "answered",
        12,
    )
    assert await probe.queued(task_id) is None
    await probe.assert_counts_exact()


async def test_settling_an_unknown_call_is_refused(probe: Probe) -> None:
    with pytest.raises(asyncpg.PostgresError, match="is not in the log") as refused:
        await probe.value("SELECT settle_call($1, 'answered', 'a')", new_call_id(time.time()))
    assert refused.value.sqlstate == "RT002"


async def test_claims_commit_asynchronously_and_answers_synchronously(probe: Probe) -> None:
    await probe.add()
    async with probe.connection.transaction():
        taken = await probe.must_claim()
        assert await probe.value("SHOW synchronous_commit") == "off"
        await probe.settle(taken)
        assert await probe.value("SHOW synchronous_commit") == "on"
    assert await probe.value("SHOW synchronous_commit") == "on"


async def test_token_counts_beyond_an_integer_are_clamped(probe: Probe) -> None:
    await probe.add()
    taken = await probe.must_claim()
    assert await probe.settle(taken, prompt_tokens=2**31 - 1, completion_tokens=2**31 - 1) == "solved"
    assert (await probe.call(taken.call_id))["tokens"] == 2**31 - 1


async def test_a_call_id_is_used_once(probe: Probe) -> None:
    await probe.add()
    await probe.add()
    call_id = uuid.UUID(int=new_call_id(time.time()).int)
    await probe.run("SELECT claim_task('m', '{}', 'w1', $1)", call_id)
    with pytest.raises(asyncpg.UniqueViolationError):
        await probe.run("SELECT claim_task('m', '{}', 'w1', $1)", call_id)
    assert await probe.value("SELECT count(*) FROM queue WHERE state = 'ready'") == 1


async def test_tasks_failed_by_another_model_precede_the_lanes(probe: Probe) -> None:
    failed = await probe.add(category="creative")
    call = await probe.must_claim("creative", model="m1")
    await probe.settle(call, "error")
    await probe.wake()
    for _ in range(3):
        await probe.add(category="technical")
    own = await probe.must_claim("technical", "creative", model="m1")
    assert own.task_id != failed, "the model that failed it is not the next to try"
    other = await probe.must_claim("technical", "creative", model="m2")
    assert other.task_id == failed, "though its own lane is full"


@pytest.mark.parametrize(
    ("state", "columns"),
    [
        ("ready", "call_id = gen_random_uuid()"),
        ("ready", "wake_at = now()"),
        ("claimed", "call_id = gen_random_uuid()"),
        ("claimed", "worker = 'w1'"),
        ("claimed", "call_id = gen_random_uuid(), worker = 'w1', wake_at = now()"),
        ("waiting", "priority = 0"),
        ("waiting", "wake_at = now(), worker = 'w1'"),
        ("uncategorised", "priority = 0"),
        ("uncategorised", "wake_at = now(), call_id = gen_random_uuid()"),
        ("lost", "priority = 0"),
    ],
)
async def test_a_queue_row_inconsistent_with_its_state_is_refused(
    probe: Probe, state: str, columns: str
) -> None:
    await probe.add()
    with pytest.raises(asyncpg.CheckViolationError, match="queue_state_holds"):
        await probe.run(f"UPDATE queue SET state = $1, {columns}", state)
