"""The queue by example: how a prompt gets exactly one answer.

Every step is a SQL function or a plain statement on `tasks`; `probe` only shortens them. The terms are
defined at the head of `sql/functions/10_helpers.sql`.
"""

from __future__ import annotations

from tests.support.queue import Probe


async def test_a_producer_only_inserts(probe: Probe) -> None:
    await probe.run("INSERT INTO tasks (prompt) VALUES ('Why is the sky blue?')")

    task = await probe.row("SELECT status, answer FROM tasks")
    assert (task["status"], task["answer"]) == ("unsolved", None)
    # A trigger adds a queue row, which exists while the task is unsolved.
    assert await probe.value("SELECT state FROM queue") == "ready"


async def test_a_worker_claims_one_task_and_settles_its_call(probe: Probe) -> None:
    task_id = await probe.add("Why is the sky blue?")

    # One round trip claims the task, logs the call, and returns the prompt.
    taken = await probe.must_claim("technical", "general", worker="w1", model="llama")
    assert taken.prompt == "Why is the sky blue?"
    assert await probe.value("SELECT state FROM task_states") == "running"
    assert (await probe.call(taken.call_id))["outcome"] is None

    # The worker sends the prompt to the model. The answer closes call and task in one transaction.
    assert await probe.settle(taken, answer="Rayleigh scattering.") == "solved"
    task = await probe.task(task_id)
    assert (task["status"], task["answer"], task["answered_by"]) == (
        "solved",
        "Rayleigh scattering.",
        "llama",
    )
    assert await probe.queued(task_id) is None


async def test_no_two_workers_get_the_same_task(probe: Probe) -> None:
    await probe.add("only one")
    assert await probe.claim(worker="w1") is not None
    assert await probe.claim(worker="w2") is None


async def test_higher_priority_goes_first_then_first_in_first_out(probe: Probe) -> None:
    first, second = await probe.add("first"), await probe.add("second")
    urgent = await probe.add("urgent", priority=5)
    assert [(await probe.must_claim()).task_id for _ in range(3)] == [urgent, first, second]


async def test_a_worker_that_cannot_send_releases_its_claim(probe: Probe) -> None:
    task_id = await probe.add()
    taken = await probe.must_claim()
    assert await probe.unclaim(taken)
    again = await probe.must_claim()
    assert (again.task_id, again.attempt) == (task_id, 1)  # claimed first, and no attempt was counted


async def test_a_failed_call_is_retried_until_attempts_are_used_up(probe: Probe) -> None:
    await probe.run("UPDATE queue_settings SET max_attempts = 2")
    task_id = await probe.add()
    assert await probe.settle(await probe.must_claim(), "timeout", error="no answer in 180 s") == "retry"
    assert await probe.value("SELECT state FROM task_states") == "waiting"
    await probe.wake()
    assert await probe.settle(await probe.must_claim(), "error", error="connection reset") == "failed"
    task = await probe.task(task_id)
    assert task["failure"].splitlines() == ["m1: error: connection reset", "m1: timeout: no answer in 180 s"]

    # A person or program may reset it.
    await probe.run("UPDATE tasks SET status = 'unsolved'")
    assert (await probe.must_claim()).attempt == 1


async def test_a_lost_workers_claims_are_released_when_its_lease_expires(probe: Probe) -> None:
    task_id = await probe.add()
    zombie = await probe.must_claim(worker="w1")

    # w1 stops sending heartbeats. After its lease expires, any worker's maintenance releases its claims.
    await probe.lose_lease("w1")
    alive = await probe.must_claim(worker="w2")
    assert alive.task_id == task_id

    # A failure that w1 reports now changes nothing: its call no longer holds the claim.
    assert await probe.settle(zombie, "error") == "late"
    assert await probe.settle(alive, answer="from w2") == "solved"


async def test_a_late_answer_is_stored_if_it_is_the_first(probe: Probe) -> None:
    task_id = await probe.add()
    slow = await probe.must_claim(worker="w1")
    await probe.lose_lease("w1")
    quick = await probe.must_claim(worker="w2")
    assert await probe.settle(slow, answer="from w1, late") == "solved"
    assert await probe.settle(quick, answer="from w2") == "superseded"
    assert (await probe.task(task_id))["answer"] == "from w1, late"


async def test_an_answer_replaces_only_one_of_lower_rank(probe: Probe) -> None:
    task_id = await probe.add()
    chosen = await probe.must_claim()
    passages, fallback = await probe.fallback_call(task_id, 1), await probe.fallback_call(task_id, 2)

    assert await probe.settle(fallback, answer="from the fallback model") == "kept"
    assert await probe.settle(passages, answer="passages") == "superseded"
    assert (await probe.task(task_id))[
        "status"
    ] == "unsolved"  # provisional: the chosen model may still answer
    assert await probe.settle(chosen, answer="from the chosen model") == "solved"
    assert (await probe.task(task_id))["answer"] == "from the chosen model"


async def test_settling_is_idempotent(probe: Probe) -> None:
    task_id = await probe.add()
    taken = await probe.must_claim()
    assert [await probe.settle(taken, answer=answer) for answer in ("one", "two")] == ["solved", "solved"]
    assert (await probe.task(task_id))["answer"] == "one"


async def test_an_edited_prompt_is_a_new_version(probe: Probe) -> None:
    task_id = await probe.add("2 + 2?")
    old = await probe.must_claim()
    await probe.run("UPDATE tasks SET prompt = '3 + 3?'")
    assert await probe.settle(old, answer="4") == "stale"
    assert await probe.settle(await probe.must_claim(), answer="6") == "solved"
    assert (await probe.task(task_id))["answer"] == "6"


async def test_the_backlog_is_read_from_counters(probe: Probe) -> None:
    await probe.run(
        "INSERT INTO tasks (prompt, category) SELECT 'p', 'technical' FROM generate_series(1, 100)"
    )
    await probe.settle(await probe.must_claim())
    assert await probe.counts() == {"technical": (99, 1, 0)}
