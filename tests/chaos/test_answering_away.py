"""Every request returns by its deadline, whatever service hangs or is down; if need be with passages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from local.postgres import PostgresServer
from local.redis import RedisServer
from models_backend.process import BackendServer, start_backend
from router.answering.router import Event, EventKind, Router
from router.database import connect
from router.errors import ModelFailed
from router.models.roster import sync_roster
from router.settings.environment import Addresses
from router.task import AnswerRank
from tests.support.answering import CHEAP, PREFERRED, Harness, answering_config
from tests.support.stalls import Stall, stalling

DEADLINE_SECONDS = 1.0
MAX_OVER_SECONDS = 0.1
KNOWN = "The router pauses a model whose traffic target is 0."


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendServer]:
    folder = tmp_path_factory.mktemp("backend")
    server = start_backend(folder, "--time-scale", "20", "--latency", "even:2:4")
    yield server
    server.stop()


class Fragile(Harness):
    """A harness whose servers can be stalled, by name."""

    stalls: dict[str, Stall]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A config folder whose knowledge is one fact."""
    (tmp_path / "knowledge").mkdir()
    (tmp_path / "knowledge" / "facts.md").write_text(f"# Pausing a model\n\n{KNOWN}\n")
    return tmp_path


@pytest.fixture
def redis_port(redis_server: RedisServer, redis_client: Any) -> int:
    """Port of an empty Redis."""
    return int(urlsplit(redis_server.url).port or 0)


@pytest.fixture
async def fragile(
    database: str, postgres: PostgresServer, redis_port: int, backend: BackendServer, folder: Path
) -> AsyncIterator[Fragile]:
    socket = f"{postgres.socket_folder}/.s.PGSQL.{postgres.port}"
    backend_port = urlsplit(backend.url).port
    async with AsyncExitStack() as stack:
        stalls = {
            "postgres": await stack.enter_async_context(
                stalling(lambda: asyncio.open_unix_connection(socket))
            ),
            "redis": await stack.enter_async_context(
                stalling(lambda: asyncio.open_connection("127.0.0.1", redis_port))
            ),
            "backend": await stack.enter_async_context(
                stalling(lambda: asyncio.open_connection("127.0.0.1", backend_port))
            ),
        }
        name = urlsplit(database).path.strip("/")
        through = Addresses(
            database_url=f"postgresql://postgres@127.0.0.1:{stalls['postgres'].port}/{name}",
            redis_url=f"redis://127.0.0.1:{stalls['redis'].port}/0",
            backend_url=f"http://127.0.0.1:{stalls['backend'].port}",
        )
        config = answering_config()
        with connect(database) as connection:
            sync_roster(connection, config)
        router = Router(through, config, folder)
        await router.open(classify=False)
        harness = Fragile(router, through.model_copy(update={"database_url": database}), backend)
        harness.stalls = stalls
        for model in config.models:
            await harness.limiter.cancel(await harness.limiter.acquire(model, timeout_seconds=10))
        yield harness
        for stall in stalls.values():
            stall.go_on()
        await router.close()


@pytest.mark.parametrize(
    "hanging", [("postgres",), ("redis",), ("backend",), ("postgres", "redis", "backend")]
)
async def test_a_hanging_service_costs_the_deadline_at_most(
    fragile: Fragile, hanging: tuple[str, ...]
) -> None:
    for name in hanging:
        fragile.stalls[name].stall()
    answers = await asyncio.gather(
        *(fragile.ask("How is a model paused?", deadline_seconds=DEADLINE_SECONDS) for _ in range(5))
    )
    for answer in answers:
        assert answer.rank is AnswerRank.PASSAGES
        assert KNOWN in answer.text
        assert answer.seconds <= DEADLINE_SECONDS + MAX_OVER_SECONDS
    assert all((answer.task_id is None) == ("postgres" in hanging) for answer in answers)
    if "backend" not in hanging:  # without a log row or a permit nothing is sent
        assert all(call.sent_seconds is None for answer in answers for call in answer.calls)


async def test_an_answer_does_not_wait_for_the_release_of_its_permit(fragile: Fragile) -> None:
    def redis_hangs_once_sent(event: Event) -> None:
        if event.kind is EventKind.SENT and event.call is not None and event.call.model == PREFERRED:
            fragile.stalls["redis"].stall()

    answer = await fragile.ask(on_event=redis_hangs_once_sent)
    assert answer.model == PREFERRED
    assert answer.seconds < 1.5, "the client of Redis waits for 2 s"


async def test_models_answer_again_once_services_are_back(fragile: Fragile) -> None:
    for stall in fragile.stalls.values():
        stall.stall()
    answer = await fragile.ask(deadline_seconds=0.5)
    assert answer.rank is AnswerRank.PASSAGES
    for stall in fragile.stalls.values():
        stall.go_on()
    for _ in range(100):
        answer = await fragile.ask()
        if answer.model == PREFERRED:
            break
    assert answer.model == PREFERRED
    assert fragile.rows("SELECT FROM queue WHERE state = 'claimed'") == []


async def test_a_router_opens_while_every_service_is_unavailable(folder: Path) -> None:
    nowhere = Addresses(
        database_url="postgresql://nobody@127.0.0.1:1/none", redis_url="redis://127.0.0.1:1/0",
        backend_url="http://127.0.0.1:1",
    )  # fmt: skip
    async with Router(nowhere, answering_config(), folder) as router:
        answer = await router.answer("How is a model paused?", category="general")
        with pytest.raises(ModelFailed, match="Postgres is unavailable"):
            await router.answer("How is a model paused?", model=PREFERRED)
    assert KNOWN in answer.text
    assert (answer.task_id, answer.provisional, answer.calls) == (None, False, ())


async def test_an_answer_without_a_log_row_has_no_task_id(fragile: Fragile) -> None:
    fragile.stalls["postgres"].stall()
    fragile.fault("error", CHEAP)
    answer = await fragile.ask(deadline_seconds=0.5)
    assert answer.task_id is None
    fragile.heal()
