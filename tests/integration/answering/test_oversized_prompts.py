"""What one client sends and no model takes changes no ranking."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from router.errors import RouterError
from router.settings.environment import Addresses
from tests.support.answering import Harness
from tests.support.reviews import Log

PROMPTS = 70
OVERSIZED = "word " * 120_000  # more tokens than the preferred model takes
RANKED = ("llama-3.3-70b", "deepseek-v3", "command-r-plus")  # for general, as shipped


async def read_again(service: Any, model: str) -> None:
    """Waits until the router has read the new context of the model."""
    while service.roster.models[model].context_tokens != 10_000_000:
        await asyncio.sleep(0.05)


async def test_70_oversized_prompts_from_one_key_move_no_ranking(
    harness: Harness, addresses: Addresses
) -> None:
    """Also where the router believes that they fit, so that each is sent and refused."""
    log = Log(addresses.database_url)
    for model in RANKED:
        log.add(model, 60, client="ann")
    log.review()
    before = log.places()
    harness.rows("UPDATE roster SET state = 'paused' WHERE model <> ALL (%s)", list(RANKED))
    harness.rows("UPDATE roster SET context_tokens = 10000000")
    model = min(before, key=lambda name: before[name])
    await asyncio.wait_for(read_again(harness.router._service, model), 10)
    await harness.limiter.set_target(model, "100000/s, burst")

    async def ask() -> None:
        with contextlib.suppress(RouterError):
            await harness.ask(OVERSIZED, client="mallory", deadline_seconds=60)

    for _ in range(PROMPTS // 10):
        await asyncio.gather(*(ask() for _ in range(10)))
    mine = [call for call in harness.calls() if call["client"] == "mallory"]
    assert sum(call["outcome"] == "too_long" for call in mine) >= PROMPTS
    assert {call["outcome"] for call in mine if call["model"] == model} <= {"too_long", "unsent"}
    assert log.review().changes == ()
    assert log.places() == before
    counted = log.value("SELECT sum(calls)::int FROM evidence WHERE model = %s", model)
    assert counted == 60
