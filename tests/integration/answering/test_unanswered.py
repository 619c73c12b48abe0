"""Requests that no model answers, the first request of a router, and answers that are cut off."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import Self

from router.answering import service as service_module
from router.answering.router import Router
from router.answering.service import AnsweringService
from router.database import connect
from router.errors import CapacityExceeded, ModelFailed
from router.models.roster import sync_roster
from router.queue.tasks import failed_tasks, retry_failed
from router.request import Conversation, ModelRequest
from router.settings.environment import Addresses
from router.settings.router import load_config
from tests.support.answering import CHEAP, PREFERRED, Harness, answering_config


async def ended(harness: Harness) -> None:
    until = time.monotonic() + 15
    while harness.router._requests:
        assert time.monotonic() < until, "a request does not end"
        await asyncio.sleep(0.02)


def counts(harness: Harness) -> tuple[int, int, int]:
    """Unsolved, solved and failed tasks, by the counters; recounting them changes nothing."""
    select = (
        "SELECT coalesce(sum(unsolved), 0)::int AS unsolved, coalesce(sum(solved), 0)::int AS solved,"
        " coalesce(sum(failed), 0)::int AS failed FROM task_counts_now"
    )
    before = harness.rows(select)
    harness.rows("SELECT recount_tasks()")
    assert harness.rows(select) == before
    return before[0]["unsolved"], before[0]["solved"], before[0]["failed"]


async def test_a_request_that_no_model_answered_is_not_a_failed_task(harness: Harness) -> None:
    harness.fault("error", "*")
    answer = await harness.ask()
    assert answer.model is None
    await ended(harness)
    assert (harness.task()["status"], harness.task()["interactive"]) == ("failed", True)
    assert counts(harness) == (0, 0, 0)
    assert harness.rows("SELECT FROM task_failures") == [], "the console lists no failure"
    with connect(harness.addresses.database_url) as connection:
        assert failed_tasks(connection) == 0
        *_, everything = retry_failed(connection)
        assert everything.unsolved == 0, "nobody waits for it any more"
        *_, chosen = retry_failed(connection, task_ids=[answer.task_id])
        assert chosen.unsolved == 1
    assert harness.task()["interactive"] is None, "from now on a task of the batch"
    assert counts(harness) == (1, 0, 0)
    harness.rows("UPDATE tasks SET status = 'failed'")
    assert counts(harness) == (0, 0, 1), "a failed task of the batch counts"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("UPDATE tasks SET status = 'solved', answer = 'by hand'", (0, 1, 0)),
        ("UPDATE tasks SET category = 'creative'", (0, 0, 0)),
        ("UPDATE tasks SET status = 'unsolved', prompt = 'edited'", (1, 0, 0)),
        ("DELETE FROM tasks", (0, 0, 0)),
        ("TRUNCATE tasks", (0, 0, 0)),
    ],
)
async def test_counters_stay_right_when_an_unanswered_request_is_changed(
    harness: Harness, change: str, expected: tuple[int, int, int]
) -> None:
    harness.fault("error", "*")
    await harness.ask()
    await ended(harness)
    harness.rows(change)
    assert counts(harness) == expected


@pytest.mark.parametrize(("max_tokens", "is_known"), [(1, False), (None, True)])
async def test_an_answer_cut_off_by_its_max_tokens_is_no_knowledge(
    harness: Harness, max_tokens: int | None, is_known: bool
) -> None:
    answer = await harness.ask(max_tokens=max_tokens)
    await ended(harness)
    assert answer.model is not None
    assert harness.task()["max_tokens"] == max_tokens
    found = harness.rows("SELECT known FROM knowledge_slice(%s, 0, 10)", answer.task_id)
    assert found == [{"known": is_known}]
    assert len(harness.rows("SELECT * FROM knowledge_since(0, 0, 10)")) == is_known


async def test_a_cut_off_answer_of_the_batch_is_no_knowledge(harness: Harness) -> None:
    for tokens, known in ((9, True), (10, False)):
        harness.rows("DELETE FROM tasks")
        (task,) = harness.rows("INSERT INTO tasks (prompt, max_tokens) VALUES ('x', 10) RETURNING id")
        settle = (
            "SELECT settle_call(gen_random_uuid(), 'answered', 'a', 1, %s, NULL, 1, NULL, true, %s, 'm', v)"
        )
        harness.rows(f"{settle} FROM (SELECT prompt_version AS v FROM tasks) AS t", tokens, task["id"])
        assert harness.task()["status"] == "solved"
        assert harness.rows("SELECT known FROM knowledge_slice(%s, 0, 10)", task["id"]) == [{"known": known}]


async def never(*_arguments: Any, **_options: Any) -> None:
    await asyncio.sleep(3600)


@pytest.mark.parametrize("slow", ["open", "until_classifier", "_contact"])
@pytest.mark.parametrize("options", [{}, {"model": PREFERRED}, {"category": "general"}])
async def test_the_deadline_holds_for_the_first_request_of_a_router(
    addresses: Addresses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str, options: dict[str, str]
) -> None:
    with connect(addresses.database_url) as connection:
        sync_roster(connection, answering_config())
    monkeypatch.setattr(AnsweringService, slow, never)
    router = Router(addresses, answering_config(), tmp_path)
    began = time.monotonic()
    try:
        answer = await router.answer("Why?", deadline_seconds=1, **options)
        assert slow == "until_classifier" or answer.model is None
    except (ModelFailed, CapacityExceeded):
        assert "model" in options
    assert time.monotonic() - began < 1.1
    await router.close()


async def test_the_first_request_does_not_wait_for_the_classifier_to_train(
    addresses: Addresses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.classification.process.CHILD", ("sleep", "3600"))
    config = answering_config().model_copy(update={"classification": load_config().classification})
    with connect(addresses.database_url) as connection:
        sync_roster(connection, answering_config())
    router = Router(addresses, config, tmp_path)
    for deadline, why in ((1.5, "the classifier is starting"), (3, "no category within")):
        answer = await router.answer("Why is the sky blue?", deadline_seconds=deadline)
        assert (answer.category, answer.model is not None) == ("general", True)
        assert answer.reason.startswith(f"default: {why}")
        assert answer.seconds <= deadline + 0.1
    await router.close()


async def test_a_named_model_is_refused_by_its_deadline(harness: Harness) -> None:
    harness.fault("hang", PREFERRED)
    await harness.limiter.set_target(PREFERRED, "1000/min, 1 at once")
    for deadline in (0.05, 0.1, 0.3, 0.3):
        began = time.monotonic()
        with pytest.raises((CapacityExceeded, ModelFailed)):
            await harness.ask(model=PREFERRED, deadline_seconds=deadline)
        assert time.monotonic() - began < deadline + 0.05


@pytest.mark.alone
@pytest.mark.parametrize("model", [None, PREFERRED])
async def test_a_request_waits_for_its_permit_after_redis_lost_its_state(
    harness: Harness, redis_client: Any, model: str | None
) -> None:
    await harness.ask()
    await redis_client.flushall()
    answer = await harness.ask(model=model, deadline_seconds=20)
    assert answer.model is not None


async def test_category_and_knowledge_depend_on_the_last_user_turn(
    addresses: Addresses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Classifier:
        ready = True

        def __init__(self, _settings: object) -> None: ...
        async def __aenter__(self) -> Self:
            return self

        async def __aexit__(self, *_error: object) -> None: ...
        def warm_up(self) -> None: ...
        async def until_ready(self, _seconds: float) -> bool:
            return True

        async def classify(self, prompts: list[str]) -> list[service_module.Classification]:
            confidence = {"haiku": ("creative", 0.9), "and?": ("general", 0.1)}
            found = [confidence.get(prompt, ("technical", 0.7)) for prompt in prompts]
            return [service_module.Classification(*one, "classifier") for one in found]

    monkeypatch.setattr(service_module, "ClassifierProcess", Classifier)
    config = answering_config().model_copy(update={"classification": load_config().classification})
    (tmp_path / "knowledge").mkdir()
    (tmp_path / "knowledge" / "sky.md").write_text(
        "# The blue sky\n\nThe sky is blue because air scatters short waves most.\n"
    )
    with connect(addresses.database_url) as connection:
        sync_roster(connection, answering_config())
    async with Router(addresses, config, tmp_path) as router:
        code = "Assistant: ```python\nfor x in y: pass\n```"
        answer = await router.answer(ModelRequest(Conversation(f"{code}\n\nhaiku", "haiku", code)))
        assert (answer.category, answer.confidence) == ("creative", 0.9)
        answer = await router.answer(ModelRequest(Conversation(f"{code}\n\nand?", "and?", code)))
        assert answer.category == "technical", "the context decides where the question says too little"
        found: list[str] = []
        question = "Why is the sky blue?"
        await router.answer(
            ModelRequest(Conversation(f"{code}\n\n{question}", question, code)),
            on_event=lambda event: found.append(event.text),
        )
        assert any(text.startswith("found sky.md") for text in found), found
        found.clear()
        earlier = "Why is the sky blue? Because air scatters short waves."
        follow_up = ModelRequest(Conversation(f"{earlier}\n\nAnd why?", "And why?", earlier))
        await router.answer(follow_up, on_event=lambda event: found.append(event.text))
        assert any(text.startswith("found sky.md") for text in found), "by the context"


@pytest.mark.alone
async def test_the_first_request_of_a_new_stack_is_sent_at_once(addresses: Addresses, tmp_path: Path) -> None:
    config = answering_config(**dict.fromkeys((PREFERRED, CHEAP), "55/min"))
    with connect(addresses.database_url) as connection:
        sync_roster(connection, config)
    router = Router(addresses, config, tmp_path)
    answer = await router.answer("Why?", category="general", deadline_seconds=1.5)
    assert answer.model == PREFERRED
    first = answer.calls[0]
    assert first.sent_seconds is not None
    assert first.sent_seconds - first.started_seconds < 0.5, "its own log row does not count as sent"
    await router.close()
