"""5. Asking: one prompt, answered in time, always; and the better answer kept when it comes late.

The preferred model and a fallback are asked at once. Read this from top to bottom: each test takes something
more away from the router, and it still answers.
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
from tests.support.answering import CHEAP, PREFERRED, SECOND, Asking, asking_config, asking_router


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendServer]:
    """Models that take 0.1 to 0.2 s."""
    folder = tmp_path_factory.mktemp("backend")
    server = start_backend(folder, "--time-scale", "20", "--latency", "even:2:4")
    yield server
    server.stop()


@pytest.fixture
async def router(
    database: str, redis_server: RedisServer, redis_client: Any, backend: BackendServer, tmp_path: Path
) -> AsyncIterator[Asking]:
    """Three models in rank (PREFERRED, SECOND and a third), CHEAP as fallback, and one fact in knowledge."""
    (tmp_path / "knowledge").mkdir()
    (tmp_path / "knowledge" / "sky.md").write_text(
        "# The blue sky\n\nThe sky is blue because air scatters short waves most.\n"
    )
    addresses = Addresses(database_url=database, redis_url=redis_server.url, backend_url=backend.url)
    async with asking_router(addresses, backend, asking_config(), tmp_path) as asking:
        yield asking
        asking.heal()


async def test_a_prompt_is_answered_by_the_best_model_of_its_category(router: Asking) -> None:
    answer = await router.ask("Why is the sky blue?", category="general")
    assert (answer.model, answer.rank) == (PREFERRED, AnswerRank.CHOSEN_MODEL)
    # It is a task like any other, and its calls are in the log.
    assert router.task()["answer"] == answer.text
    assert {call.role.value for call in answer.calls} == {"asked", "fallback"}


async def test_if_that_model_fails_the_fallback_or_the_next_in_rank_is_quick(router: Asking) -> None:
    router.fault("error", PREFERRED)
    answer = await router.ask()
    assert answer.model in {CHEAP, SECOND}
    assert answer.seconds < 1


async def test_if_it_hangs_the_fallback_answers_at_the_deadline(router: Asking) -> None:
    router.fault("hang", PREFERRED)
    answer = await router.ask(deadline_seconds=1)
    assert (answer.model, answer.rank) == (CHEAP, AnswerRank.FALLBACK_MODEL)
    # The fallback was given what knowledge holds, and says where that is from.
    assert answer.sources == ("sky.md: The blue sky",)
    assert answer.provisional


async def test_if_every_model_fails_there_is_what_knowledge_holds(router: Asking) -> None:
    router.fault("error", "*")
    answer = await router.ask()
    assert (answer.model, answer.rank) == (None, AnswerRank.PASSAGES)
    assert "air scatters short waves most" in answer.text


async def test_what_is_not_known_is_not_made_up(router: Asking) -> None:
    router.fault("error", "*")
    answer = await router.ask("How many eggs go into a souffle?")
    assert answer.text.startswith("No model answered")
    assert answer.sources == ()


async def test_a_better_answer_that_comes_late_replaces_the_one_given(router: Asking) -> None:
    answer = await router.ask_too_late()  # its deadline is too soon for any model
    assert (answer.rank, answer.provisional) == (AnswerRank.PASSAGES, True)
    better = answer
    while (late := await router.router.late(better)) is not None:
        better = late
    assert (better.model, better.late) == (PREFERRED, True)
    (task,) = router.rows("SELECT * FROM tasks WHERE id = %s", answer.task_id)
    assert (task["answered_by"], task["status"]) == (PREFERRED, "solved")
