"""A router with a simulated backend, shared by the tests of a module."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from local.redis import RedisServer
from models_backend.process import BackendServer, start_backend
from router.settings.environment import Addresses
from tests.support.answering import Harness, answering_config, open_harness


@pytest.fixture(scope="module")
def shared_backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendServer]:
    server = start_backend(tmp_path_factory.mktemp("backend"), "--time-scale", "20", "--latency", "even:2:4")
    yield server
    server.stop()


@pytest.fixture
def addresses(
    database: str, redis_server: RedisServer, redis_client: Any, shared_backend: BackendServer
) -> Addresses:
    return Addresses(database_url=database, redis_url=redis_server.url, backend_url=shared_backend.url)


@pytest.fixture
async def harness(
    addresses: Addresses, shared_backend: BackendServer, tmp_path: Path
) -> AsyncIterator[Harness]:
    async with open_harness(addresses, shared_backend, answering_config(), tmp_path) as opened:
        opened.heal()
        yield opened
        opened.heal()
