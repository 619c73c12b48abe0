"""Helpers for tests of answering: a router on real services, backend faults, and its tasks and calls."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from models_backend.process import BackendServer
from router.answering.router import Router
from router.database import connect, rows
from router.models.roster import sync_roster
from router.settings.environment import Addresses
from router.settings.models import ModelSettings
from router.settings.router import AnsweringSettings, FallbackSettings, RouterConfig, WorkerSettings
from router.task import AnswerRank

PREFERRED, SECOND, THIRD, CHEAP = "deepseek-v3", "llama-3.3-70b", "qwen-2.5-72b", "llama-3.1-8b"


def answering_config(
    *, answering: dict[str, Any] | None = None, fallback: dict[str, Any] | None = None, **targets: str
) -> RouterConfig:
    """Three models in rank, and a cheap one as fallback."""
    places = {PREFERRED: 1, SECOND: 2, THIRD: 3, CHEAP: 9}
    models = {
        name: ModelSettings(
            target=targets.get(name, "30000/min, burst"),
            ranks=dict.fromkeys(("technical", "creative", "general"), place),
            timeout_seconds=20,
        )
        for name, place in places.items()
    }
    return RouterConfig(
        models=models,
        worker=WorkerSettings(lease_seconds=2.0, heartbeat_seconds=0.5),
        answering=AnsweringSettings(
            **{"default_deadline_seconds": 5, "late_seconds": 10, **(answering or {})}
        ),
        fallback=FallbackSettings(**{"models": (CHEAP,), **(fallback or {})}),
    )


@dataclass
class Harness:
    """An open router, and access to its database and backend."""

    router: Router
    addresses: Addresses
    backend: BackendServer
    events: list[Any] = field(default_factory=list)

    @property
    def limiter(self) -> Any:
        assert self.router._service is not None
        return self.router._service.context.limiter

    async def ask(self, prompt: str = "Why is the sky blue?", **options: Any) -> Any:
        return await self.router.answer(
            prompt, **{"category": "general", "on_event": self.events.append, **options}
        )

    async def ask_with_short_deadline(self) -> Any:
        """Returns passages for a prompt that was sent to the preferred model just before its deadline."""
        for tries in range(50):  # on a busy machine it is sometimes not even sent in time
            answer = await self.ask(deadline_seconds=0.07 + 0.01 * (tries % 10))
            if answer.rank is AnswerRank.PASSAGES and answer.calls[0].sent_seconds is not None:
                return answer
        raise AssertionError("the preferred model was never sent a prompt in time")

    def fault(self, kind: str, *models: str, **more: Any) -> None:
        for model in models:
            order = {"kind": kind, "model": model, "share": 1, "seconds": 600, **more}
            requests.post(f"{self.backend.url}/faults", json=order, timeout=5).raise_for_status()

    def heal(self) -> None:
        requests.delete(f"{self.backend.url}/faults", timeout=5).raise_for_status()

    def rows(self, statement: str, *arguments: Any) -> list[dict[str, Any]]:
        with connect(self.addresses.database_url) as connection:
            return rows(connection, statement, arguments)

    def task(self) -> dict[str, Any]:
        """Returns the only task."""
        (task,) = self.rows("SELECT * FROM tasks")
        return task

    def calls(self) -> list[dict[str, Any]]:
        """Returns the call log, oldest first."""
        return self.rows("SELECT * FROM model_calls ORDER BY call_id")


@asynccontextmanager
async def open_harness(
    addresses: Addresses, backend: BackendServer, config: RouterConfig, folder: Path
) -> AsyncIterator[Harness]:
    """Opens a router, and closes it at the end."""
    with connect(addresses.database_url) as connection:
        sync_roster(connection, config)
    async with Router(addresses, config, folder) as router:
        harness = Harness(router, addresses, backend)
        for model in config.models:  # an empty Redis first rebuilds its state from the call log
            await harness.limiter.cancel(await harness.limiter.acquire(model, timeout_seconds=5))
        yield harness
