"""Calls that an outage or wrong access ended: no attempt, growing delays, and a bound for one prompt."""

from __future__ import annotations

import pytest

from tests.support.queue import Probe


async def outage(probe: Probe, outcome: str) -> str:
    taken = await probe.must_claim(model="phi-4")
    settled = await probe.settle(taken, outcome, counted=False, error="502 Bad Gateway")
    await probe.wake()
    return settled


@pytest.mark.parametrize("outcome", ["unavailable", "denied"])
async def test_outage_of_any_length_fails_no_task(probe: Probe, outcome: str) -> None:
    task_id = await probe.add()
    assert [await outage(probe, outcome) for _ in range(30)] == ["retry"] * 30
    assert (await probe.task(task_id))["status"] == "unsolved"
    queued = await probe.queued(task_id)
    assert queued is not None
    assert queued["attempt"] == 0


@pytest.mark.parametrize("outcome", ["unavailable", "denied"])
async def test_prompt_that_causes_them_while_others_are_answered_fails_in_the_end(
    probe: Probe, outcome: str
) -> None:
    await probe.add("another prompt")
    await probe.settle(await probe.must_claim(model="phi-4"))
    task_id = await probe.add()
    settled = [await outage(probe, outcome) for _ in range(15)]
    assert settled == ["retry"] * 14 + ["failed"]
    assert "502 Bad Gateway" in (await probe.task(task_id))["failure"]


async def test_repetition_is_delayed_and_left_to_other_models_first(probe: Probe) -> None:
    task_id = await probe.add()
    taken = await probe.must_claim(model="phi-4")
    await probe.settle(taken, "unavailable", counted=False)
    row = await probe.row(
        "SELECT state, not_by, wake_at > clock_timestamp() + interval '0.5 s' AS later FROM queue"
        " WHERE task_id = $1", task_id,
    )  # fmt: skip
    assert (row["state"], row["not_by"], row["later"]) == ("waiting", ["phi-4"], True)
