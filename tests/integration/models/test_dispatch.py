"""One permitted call, by a real limiter to a real backend: how long it may take, and what its end means."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator

import pytest
import redis.asyncio
import requests
from aiohttp import web
from aiohttp.test_utils import TestServer

from models_backend.process import BackendServer, start_backend
from router.limiter.breaker import BreakerSettings
from router.limiter.limiter import LimiterSettings, Permit, TrafficLimiter
from router.limiter.settings import AFTER_TIMEOUT_SECONDS
from router.models.backend import ModelsBackend
from router.models.dispatch import CallRequest, send_permitted
from router.settings.router import BackendSettings
from router.task import Outcome

MODEL = "phi-4"
LONGEST_SECONDS = 0.5
SETTINGS = LimiterSettings(
    max_call_seconds=AFTER_TIMEOUT_SECONDS + LONGEST_SECONDS,
    breaker=BreakerSettings(failure_threshold=1, initial_cooldown_seconds=0.2),
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


def order() -> CallRequest:
    return CallRequest(uuid.uuid4(), MODEL, MODEL, "hello", 16, 21, timeout_seconds=600.0)


async def test_a_call_ends_before_its_place_does(limiter: TrafficLimiter, backend: ModelsBackend) -> None:
    began = time.monotonic()
    result = await send_permitted(
        limiter, backend, order(), permit_seconds=1, going_out=lambda permit: permit.check()
    )
    assert result.outcome is Outcome.TIMEOUT
    assert time.monotonic() - began < LONGEST_SECONDS + 1


async def test_a_usage_that_cannot_be_does_not_cost_the_answer(limiter: TrafficLimiter) -> None:
    """It is more than the limiter takes for a number of tokens, and less than the call log does."""

    async def boasts(_request: web.Request) -> web.Response:
        return web.json_response({"answer": "Yes.", "usage": {"completion_tokens": 1_500_000_000}})

    app = web.Application()
    app.router.add_post("/single", boasts)
    async with TestServer(app) as door, ModelsBackend(str(door.make_url("/")), BackendSettings()) as backend:
        for _ in range(10):  # twice as many as there are places
            result = await send_permitted(
                limiter, backend, order(), permit_seconds=1, going_out=lambda permit: permit.check()
            )
            assert (result.answer, result.completion_tokens) == ("Yes.", 1_500_000_000)


async def test_a_probe_that_is_cancelled_makes_way_for_the_next(
    limiter: TrafficLimiter, backend: ModelsBackend
) -> None:
    assert isinstance(await limiter.reserve(MODEL), Permit)
    await limiter.record_outcome(MODEL, Outcome.ERROR)
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
