"""1. The Models Backend: the only way to a model.

A model is called by one HTTP request, and every outcome is a value, not an exception. Only the permit can
stop a call; it is checked immediately before the first byte is written.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator

import pytest

from models_backend.process import BackendServer, start_backend
from router.errors import PermitExpired
from router.models.backend import ModelsBackend
from router.models.call_request import CallRequest
from router.settings.router import BackendSettings
from router.task import CallResult, Outcome


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendServer]:
    """The simulated backend. Its models take 1 s to 2 min, here divided by a hundred."""
    server = start_backend(
        tmp_path_factory.mktemp("backend"), "--time-scale", "100", "--quota", "phi-4=1/min"
    )
    yield server
    server.stop()


async def call(
    backend: ModelsBackend, model: str, before_send: Callable[[], None] | None = None
) -> CallResult:
    request = CallRequest(
        call_id=uuid.uuid4(),  # identifies the call in our log and in the backend's
        model=model,
        endpoint=model,
        prompt="Why is the sky blue?",
        max_tokens=200,  # limit of the answer
        reserved_tokens=250,  # reserved in the limiter for prompt and answer
        timeout_seconds=10,
    )
    return await backend.call(request, before_send=before_send)


async def test_successful_call_has_answer_usage_and_cost(server: BackendServer) -> None:
    async with ModelsBackend(server.url, BackendSettings()) as backend:
        result = await call(backend, "gpt-4o-mini")
    assert result.outcome is Outcome.ANSWERED
    assert "Why is the sky blue?" in (result.answer or "")
    assert 0 < (result.used_tokens or 0) <= 250
    assert (result.cost_usd or 0) > 0


async def test_model_over_its_quota_returns_retry_after(server: BackendServer) -> None:
    async with ModelsBackend(server.url, BackendSettings()) as backend:
        await call(backend, "phi-4")
        result = await call(backend, "phi-4")
    assert result.outcome is Outcome.RATE_LIMITED
    assert 0 < (result.retry_after_seconds or 0) <= 60
    assert not result.outcome.counts_as_attempt  # an exhausted quota is not the task's fault


async def test_unknown_model_is_an_outcome(server: BackendServer) -> None:
    async with ModelsBackend(server.url, BackendSettings()) as backend:
        result = await call(backend, "gpt-17")
        assert "gpt-17" not in await backend.models()
    assert result.outcome is Outcome.UNKNOWN_MODEL


async def test_expired_permit_stops_the_call_before_the_first_byte(server: BackendServer) -> None:
    def expired() -> None:
        raise PermitExpired("the permit has expired")

    async with ModelsBackend(server.url, BackendSettings()) as backend:
        with pytest.raises(PermitExpired):
            await call(backend, "command-r-plus", expired)
    server.stop()  # the log of arrivals is complete once the backend has stopped
    assert "command-r-plus" not in {row["model"] for row in server.arrivals()}
