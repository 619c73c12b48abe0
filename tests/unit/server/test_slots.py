"""Sharing slots and uploads between clients."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, suppress

import pytest

from router.server.responses import ApiError
from router.server.slots import Slots, Uploads


def taken(slots: Slots, stack: ExitStack, client: str, wanted: int) -> int:
    """Takes up to `wanted` slots for a client; returns how many there were."""
    number = 0
    with suppress(ApiError):
        while number < wanted:
            stack.enter_context(slots.take(client))
            number += 1
    return number


def test_a_request_without_a_slot_is_503() -> None:
    slots = Slots(1, lambda: False)
    with slots.take("one"), pytest.raises(ApiError) as caught, slots.take("other"):
        pass
    assert (caught.value.status, caught.value.code, caught.value.retry_after_seconds) == (
        503,
        "overloaded",
        1,
    )


@pytest.mark.parametrize(("limit", "one", "other"), [(64, 56, 8), (8, 7, 1), (7, 6, 1), (2, 1, 1), (1, 1, 0)])
def test_a_client_leaves_the_last_eighth_to_others(limit: int, one: int, other: int) -> None:
    slots = Slots(limit, lambda: True)
    with ExitStack() as stack:
        assert taken(slots, stack, "greedy", 100) == one
        assert taken(slots, stack, "other", 100) == other
    with ExitStack() as stack:
        assert taken(slots, stack, "other", 100) == one, "all slots were returned"


def test_a_client_alone_has_all_slots() -> None:
    with ExitStack() as stack:
        assert taken(Slots(64, lambda: False), stack, "only", 100) == 64


def test_a_greedy_client_falls_back_to_its_share_as_its_requests_end() -> None:
    slots = Slots(64, lambda: True)
    with ExitStack() as others:
        greedy = ExitStack()
        assert taken(slots, greedy, "greedy", 100) == 56
        for _ in range(100):
            taken(slots, others, "other", 1)
            assert taken(slots, greedy, "greedy", 1) == 0
            if len(greedy._exit_callbacks) > 32:
                greedy._exit_callbacks.popleft()[1](None, None, None)
        assert taken(slots, others, "other", 100) == 0
        assert slots._taken["other"] >= 24
        greedy.close()


async def never() -> bytes:
    await asyncio.sleep(3600)
    return b""


async def whole() -> bytes:
    return b"whole"


async def test_the_oldest_upload_of_the_client_with_the_most_gives_way() -> None:
    uploads = Uploads(4)
    slow = {
        name: asyncio.create_task(uploads.receive(name[0], never(), 60)) for name in ("a1", "b1", "b2", "b3")
    }
    await asyncio.sleep(0)
    assert await uploads.receive("c", whole(), 60) == b"whole"
    await asyncio.wait({slow["b1"]})
    error = slow["b1"].exception()
    assert isinstance(error, ApiError)
    assert (error.status, error.code) == (503, "overloaded")
    assert [name for name, task in slow.items() if task.done()] == ["b1"]
    for task in slow.values():
        task.cancel()
    await asyncio.gather(*slow.values(), return_exceptions=True)
    assert uploads._reading == {}


async def test_an_upload_that_takes_too_long_is_408() -> None:
    with pytest.raises(ApiError) as caught:
        await Uploads(1).receive("a", never(), 0.01)
    assert caught.value.status == 408
