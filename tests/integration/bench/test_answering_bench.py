"""A quick form of bench/answering.py: every scene with few prompts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.answering import SCENES, play, started
from models_backend.process import BackendServer
from router.settings.environment import Addresses
from tests.support.stack import crowding, say


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Addresses, BackendServer]]:
    with started() as running:
        yield running


@pytest.mark.alone
@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.soak
async def test_every_prompt_is_answered_in_time_without_leftovers(
    servers: tuple[Addresses, BackendServer], scene: str
) -> None:
    seen = await play(scene, *servers, asks=12, at_once=4, deadline=2.0)
    say(str(seen))
    assert seen.answered == seen.asks
    assert seen.over_p99 <= 0.1 * crowding()
    left_over = (seen.open_calls, seen.not_replaced, seen.holders, seen.asyncio_tasks, seen.connections_busy)
    assert left_over == (0, 0, 0, 0, 0)
    if scene in ("failing", "slow"):
        assert seen.provisional == 0 or seen.upgraded > 0
