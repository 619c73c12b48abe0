"""One permitted call with a real limiter and a real backend: its timeout and the release of its permit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

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
from router.models.dispatch import send_permitted
from router.settings.router import BackendSettings
from router.task import Outcome
from tests.support.calls import call_request

MODEL = "phi-4"
REQUEST = call_request(MODEL, max_tokens=16, reserved_tokens=21, timeout_seconds=600.0)
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


async def test_call_ends_before_its_slot_in_the_limiter(
    limiter: TrafficLimiter, backend: ModelsBackend
) -> None:
    began = time.monotonic()
    result = await send_permitted(
        limiter, backend, REQUEST, permit_seconds=1, before_send=lambda permit: permit.check()
    )
    assert result.outcome is Outcome.TIMEOUT
    assert time.monotonic() - began < LONGEST_SECONDS + 1


async def test_impossible_usage_does_not_lose_the_answer(limiter: TrafficLimiter) -> None:
    """The number of tokens exceeds the maximum of the limiter, but not that of the call log."""

    async def reply(_request: web.Request) -> web.Response:
        return web.json_response({"answer": "Yes.", "usage": {"completion_tokens": 1_500_000_000}})

    app = web.Application()
    app.router.add_post("/single", reply)
    async with (
        TestServer(app) as server,
        ModelsBackend(str(server.make_url("/")), BackendSettings()) as backend,
    ):
        for _ in range(10):  # twice the number of slots
            result = await send_permitted(
                limiter, backend, REQUEST, permit_seconds=1, before_send=lambda permit: permit.check()
            )
            assert (result.answer, result.completion_tokens) == ("Yes.", 1_500_000_000)


async def test_canceled_probe_allows_the_next_one(limiter: TrafficLimiter, backend: ModelsBackend) -> None:
    assert isinstance(await limiter.reserve(MODEL), Permit)
    await limiter.record_outcome(MODEL, Outcome.ERROR)
    await asyncio.sleep(0.25)
    sent = asyncio.Event()

    def before_send(permit: Permit) -> None:
        permit.check()
        sent.set()

    sending = asyncio.create_task(
        send_permitted(limiter, backend, REQUEST, permit_seconds=1, before_send=before_send)
    )
    await asyncio.wait_for(sent.wait(), 2)
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    assert isinstance(await limiter.reserve(MODEL), Permit)


@pytest.mark.parametrize("free", [False, True])
async def test_slot_of_a_broken_connection(redis_client: redis.asyncio.Redis, free: bool) -> None:
    """It stays taken, since the backend may still be working, unless the configuration frees it."""

    async def crash(request: web.Request) -> web.Response:
        await request.read()
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    app = web.Application()
    app.router.add_post("/single", crash)
    settings = replace(SETTINGS, free_broken_slots=free)
    async with (
        TestServer(app) as server,
        ModelsBackend(str(server.make_url("/")), BackendSettings()) as backend,
        TrafficLimiter(redis_client, settings=settings) as limiter,
    ):
        await limiter.set_target(MODEL, "1000/s, burst, 5 at once")
        result = await send_permitted(
            limiter, backend, REQUEST, permit_seconds=1, before_send=lambda permit: permit.check()
        )
        assert result.outcome is Outcome.UNAVAILABLE
        assert (await limiter.snapshot([MODEL]))[MODEL].in_flight == (0 if free else 1)


@pytest.mark.parametrize(
    ("status", "content"),
    [
        (200, {"text": "the answer to another client: xylophone-7431"}),
        (500, {"error": {"message": "cannot process: Why is xylophone-7431 blue?"}}),
    ],
    ids=["unusable answer", "error that repeats the prompt"],
)
async def test_the_reason_of_a_cooldown_holds_no_prompt_and_no_answer(
    limiter: TrafficLimiter, status: int, content: dict[str, Any]
) -> None:
    """It is shown to every client whose request finds the model cooling down."""

    async def reply(_request: web.Request) -> web.Response:
        return web.json_response(content, status=status)

    app = web.Application()
    app.router.add_post("/single", reply)
    asked = replace(REQUEST, prompt="Why is xylophone-7431 blue?")
    async with (
        TestServer(app) as server,
        ModelsBackend(str(server.make_url("/")), BackendSettings()) as backend,
    ):
        result = await send_permitted(
            limiter, backend, asked, permit_seconds=1, before_send=lambda permit: permit.check()
        )
    assert result.outcome in {Outcome.GARBAGE, Outcome.ERROR}
    traffic = (await limiter.snapshot([MODEL]))[MODEL]
    assert traffic.cooldown_reason
    assert "7431" not in traffic.cooldown_reason
