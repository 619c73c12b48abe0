"""5. Answering one prompt by its deadline, and storing a better answer that comes late.

The preferred model and a fallback are called in parallel. Read this from top to bottom: each test takes one
more thing away from the router, and it still answers.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from local.redis import RedisServer
from models_backend.process import BackendServer, start_backend
from router.settings.environment import Addresses
from router.task import AnswerRank
from tests.support.answering import CHEAP, PREFERRED, SECOND, Harness, answering_config, open_harness


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendServer]:
    """Models that answer in 0.1 to 0.2 s."""
    folder = tmp_path_factory.mktemp("backend")
    server = start_backend(folder, "--time-scale", "20", "--latency", "even:2:4")
    yield server
    server.stop()


@pytest.fixture
async def router(
    database: str, redis_server: RedisServer, redis_client: Any, backend: BackendServer, tmp_path: Path
) -> AsyncIterator[Harness]:
    """Three models in rank (PREFERRED, SECOND and a third), CHEAP as fallback, and one fact in knowledge."""
    (tmp_path / "knowledge").mkdir()
    (tmp_path / "knowledge" / "sky.md").write_text(
        "# The blue sky\n\nThe sky is blue because air scatters short waves most.\n"
    )
    addresses = Addresses(database_url=database, redis_url=redis_server.url, backend_url=backend.url)
    async with open_harness(addresses, backend, answering_config(), tmp_path) as harness:
        yield harness
        harness.heal()


async def test_the_best_model_of_the_category_answers(router: Harness) -> None:
    answer = await router.ask("Why is the sky blue?", category="general")
    assert (answer.model, answer.rank) == (PREFERRED, AnswerRank.CHOSEN_MODEL)
    # The prompt is stored as a task, and its calls are in the call log.
    assert router.task()["answer"] == answer.text
    assert {call.role.value for call in answer.calls} == {"asked", "fallback"}


async def test_the_next_model_or_the_fallback_replaces_a_failed_one(router: Harness) -> None:
    router.fault("error", PREFERRED)
    answer = await router.ask()
    assert answer.model in {CHEAP, SECOND}
    assert answer.seconds < 1


async def test_the_fallback_answers_at_the_deadline(router: Harness) -> None:
    router.fault("hang", PREFERRED)
    answer = await router.ask(deadline_seconds=1)
    assert (answer.model, answer.rank) == (CHEAP, AnswerRank.FALLBACK_MODEL)
    # The fallback model was given the retrieved passages; the answer names their source.
    assert answer.sources == ("sky.md: The blue sky",)
    assert answer.provisional


async def test_passages_are_returned_if_every_model_fails(router: Harness) -> None:
    router.fault("error", "*")
    answer = await router.ask()
    assert (answer.model, answer.rank) == (None, AnswerRank.PASSAGES)
    assert "air scatters short waves most" in answer.text


async def test_an_unknown_topic_is_reported_as_unknown(router: Harness) -> None:
    router.fault("error", "*")
    answer = await router.ask("How many eggs go into a souffle?")
    assert answer.text.startswith("No model answered")
    assert answer.sources == ()


async def test_a_late_answer_replaces_a_provisional_one(router: Harness) -> None:
    answer = await router.ask_with_short_deadline()  # too short for any model
    assert (answer.rank, answer.provisional) == (AnswerRank.PASSAGES, True)
    better = answer
    while (late := await router.router.late(better)) is not None:
        better = late
    assert (better.model, better.late) == (PREFERRED, True)
    (task,) = router.rows("SELECT * FROM tasks WHERE id = %s", answer.task_id)
    assert (task["answered_by"], task["status"]) == (PREFERRED, "solved")
