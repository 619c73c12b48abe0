"""1. The Models Backend: the only way to a model.

A model is reached by one HTTP call, and whatever happens comes back as a value: there is nothing to catch.
The one thing that can stop a call is its permit, asked at the last moment at which that is possible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from models_backend.process import BackendServer, start_backend
from router.errors import PermitExpired
from router.models.backend import ModelsBackend
from router.settings.router import BackendSettings
from router.task import CallResult, Outcome


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendServer]:
    """The stand-in. Its models take 1 s to 2 min; here everything goes a hundred times faster."""
    server = start_backend(
        tmp_path_factory.mktemp("backend"), "--time-scale", "100", "--quota", "phi-4=1/min"
    )
    yield server
    server.stop()


async def call(
    backend: ModelsBackend, model: str, before_send: Callable[[], None] | None = None
) -> CallResult:
    return await backend.call(
        model_endpoint=model,
        prompt="Why is the sky blue?",
        max_tokens=200,  # the answer's bound
        request_id="the call's own name, in our log and in theirs",
        tokens_reserved=250,  # what the limiter set aside for prompt and answer
        timeout_seconds=10,
        before_send=before_send,
    )


async def test_a_call_that_went_well_holds_answer_usage_and_cost(server: BackendServer) -> None:
    async with ModelsBackend(server.url, BackendSettings()) as backend:
        result = await call(backend, "gpt-4o-mini")
    assert result.outcome is Outcome.ANSWERED
    assert "Why is the sky blue?" in (result.answer or "")
    assert 0 < (result.used_tokens or 0) <= 250
    assert (result.cost_usd or 0) > 0


async def test_a_model_over_its_quota_says_when_to_come_back(server: BackendServer) -> None:
    async with ModelsBackend(server.url, BackendSettings()) as backend:
        await call(backend, "phi-4")
        result = await call(backend, "phi-4")
    assert result.outcome is Outcome.RATE_LIMITED
    assert 0 < (result.retry_after_seconds or 0) <= 60
    assert not result.outcome.counts_as_attempt  # a quota that is used up is not the task's fault


async def test_a_model_that_is_not_there_is_a_value_too(server: BackendServer) -> None:
    async with ModelsBackend(server.url, BackendSettings()) as backend:
        result = await call(backend, "gpt-17")
        assert "gpt-17" not in await backend.models()
    assert result.outcome is Outcome.UNKNOWN_MODEL


async def test_a_dead_permit_stops_the_call_with_nothing_written(server: BackendServer) -> None:
    def permit_is_dead() -> None:
        raise PermitExpired("the moment has passed")

    async with ModelsBackend(server.url, BackendSettings()) as backend:
        with pytest.raises(PermitExpired):
            await call(backend, "command-r-plus", permit_is_dead)
    server.stop()  # the log of arrivals is whole once the backend has stopped
    assert "command-r-plus" not in {row["model"] for row in server.arrivals()}
