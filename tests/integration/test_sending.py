"""One permitted call, by a real limiter to a real backend: how long it may take, and what its end means."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import redis.asyncio
import requests

from models_backend.process import BackendServer, start_backend
from router.backend import ModelsBackend
from router.breaker import BreakerSettings
from router.limiter import LimiterSettings, Permit, TrafficLimiter
from router.permits import AFTER_TIMEOUT_SECONDS
from router.sending import CallOrder, send_permitted
from router.settings import BackendSettings
from router.task import CallResult, Outcome

MODEL = "phi-4"
LONGEST_SECONDS = 0.5
SETTINGS = LimiterSettings(
    call_longest_seconds=AFTER_TIMEOUT_SECONDS + LONGEST_SECONDS,
    breaker=BreakerSettings(failures_borne=1, first_rest_seconds=0.2),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendServer]:
    started = start_backend(tmp_path_factory.mktemp("backend"), "--time-scale", "20")
    requests.post(
        f"{started.url}/faults", json={"kind": "hang", "model": MODEL, "share": 1, "seconds": 600}, timeout=5
    ).raise_for_status()
    yield started
    started.stop()


@pytest.fixture
async def backend(server: BackendServer) -> AsyncIterator[ModelsBackend]:
    async with ModelsBackend(server.url, BackendSettings()) as opened:
        yield opened


@pytest.fixture
async def limiter(redis_client: redis.asyncio.Redis) -> AsyncIterator[TrafficLimiter]:
    async with TrafficLimiter(redis_client, settings=SETTINGS) as opened:
        await opened.set_target(MODEL, "1000/s, burst, 5 at once")
        yield opened


def order() -> CallOrder:
    return CallOrder(uuid.uuid4(), MODEL, MODEL, "hello", 16, 21, timeout_seconds=600.0)


async def test_a_call_ends_before_its_place_does(limiter: TrafficLimiter, backend: ModelsBackend) -> None:
    began = time.monotonic()
    result = await send_permitted(
        limiter, backend, order(), permit_seconds=1, going_out=lambda permit: permit.check()
    )
    assert result.outcome is Outcome.TIMEOUT
    assert time.monotonic() - began < LONGEST_SECONDS + 1


async def test_a_usage_that_cannot_be_does_not_cost_the_answer(
    limiter: TrafficLimiter, backend: ModelsBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 1.5 thousand million tokens, say, which the call log can hold and the limiter cannot."""
    said = CallResult(Outcome.ANSWERED, answer="Yes.", completion_tokens=1_500_000_000)

    async def answered(self: ModelsBackend, *, before_send: Callable[[], None], **_call: Any) -> CallResult:
        before_send()
        return said

    monkeypatch.setattr(ModelsBackend, "call", answered)
    for _ in range(10):  # twice as many as there are places
        result = await send_permitted(
            limiter, backend, order(), permit_seconds=1, going_out=lambda permit: permit.check()
        )
        assert result is said


async def test_a_probe_that_is_cancelled_makes_way_for_the_next(
    limiter: TrafficLimiter, backend: ModelsBackend
) -> None:
    assert isinstance(await limiter.reserve(MODEL), Permit)
    await limiter.heed(MODEL, Outcome.ERROR)
    await asyncio.sleep(0.25)
    sent = asyncio.Event()

    def going_out(permit: Permit) -> None:
        permit.check()
        sent.set()

    sending = asyncio.create_task(
        send_permitted(limiter, backend, order(), permit_seconds=1, going_out=going_out)
    )
    await asyncio.wait_for(sent.wait(), 2)
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    assert isinstance(await limiter.reserve(MODEL), Permit)
