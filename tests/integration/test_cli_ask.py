"""`router ask` and `router log`, as a person calls them, on real parts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from local.redis import RedisServer
from models_backend.process import BackendServer, start_backend
from tests.command_line import CommandLine


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendServer]:
    folder = tmp_path_factory.mktemp("backend")
    server = start_backend(folder, "--time-scale", "20", "--latency", "even:2:4")
    yield server
    server.stop()


@pytest.fixture
def router(
    database: str, redis_server: RedisServer, redis_client: object, backend: BackendServer, tmp_path: Path
) -> CommandLine:
    return CommandLine(
        {
            "ROUTER_DATABASE_URL": database,
            "ROUTER_REDIS_URL": redis_server.url,
            "MODELS_BACKEND_URL": backend.url,
            "ROUTER_DATA": str(tmp_path),
        }
    )


@pytest.mark.parametrize("prompt", ["Why is the sky blue?", "-"])
async def test_a_prompt_is_answered_and_shown(router: CommandLine, prompt: str) -> None:
    process = router.start("ask", "--category", "general", prompt)
    out, err = process.communicate(b"Why is the sky blue?", timeout=60)
    assert process.returncode == 0
    assert out.strip()
    assert "llama-3.3-70b is asked, as the first for this category" in err.decode()


async def test_json_is_one_object(router: CommandLine) -> None:
    process = router.start("ask", "--json", "Write a haiku about the sea")
    out, err = process.communicate(timeout=60)
    found = json.loads(out)
    assert found["category"] == "creative"
    assert found["late"] is None
