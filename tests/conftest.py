"""Real parts: one PostgreSQL and one Redis a session, a fresh database and an empty Redis a test."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis.asyncio

from local.postgres import PostgresServer, start_postgres
from local.redis import RedisServer, start_redis
from router.database import connect, migrate
from router.roster import sync_roster
from router.settings import load_config
from tests.queueing import Probe, probing, without_categorising

pytest_plugins = ["tests.solving"]

_numbers = itertools.count()


def pytest_configure() -> None:
    """What a shell starts in the background ignores SIGINT, and so would programs that tests interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    # Not in pytest's own folder: another pytest that starts closes that one to PostgreSQL's user.
    folder = Path(tempfile.mkdtemp(prefix="router-test-pg-"))
    server = start_postgres(folder / "data", settings={"fsync": "off"})
    yield server
    server.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = start_redis(tmp_path_factory.mktemp("redis"), arguments=("--enable-debug-command", "yes"))
    yield server
    server.stop()


@pytest.fixture
async def redis_client(redis_server: RedisServer) -> AsyncIterator[redis.asyncio.Redis]:
    """A client of an empty Redis."""
    client = redis.asyncio.Redis.from_url(redis_server.url)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
def empty_database(postgres: PostgresServer) -> Iterator[str]:
    """The URL of a database that holds nothing."""
    name = f"test_{os.getpid()}_{next(_numbers)}"
    yield postgres.create_database(name)
    _drop(postgres, name)


@pytest.fixture
def shared_data() -> Path:
    """Real data collected beside the checkout; tests that need it skip where it is not."""
    folder = Path(os.environ.get("ROUTER_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}: set ROUTER_SHARED_DATA to measure against real data")
    return folder


@pytest.fixture(scope="session")
def migrated_template(postgres: PostgresServer) -> str:
    """The name of a database with the whole schema and the shipped config, to be copied and never used.

    But for one setting: a task without a category takes the default one at once, as most tests are about what
    comes after. `tests/integration/test_categorising.py` turns it on.
    """
    name = f"template_{os.getpid()}"
    url = postgres.create_database(name)
    migrate(url)
    with connect(url) as connection:
        sync_roster(connection, without_categorising(load_config()))
    return name


@pytest.fixture
def database(postgres: PostgresServer, migrated_template: str) -> Iterator[str]:
    """The URL of a database of its own with the whole schema and the shipped config, and no task."""
    name = f"test_{os.getpid()}_{next(_numbers)}"
    postgres.run("createdb", "--template", migrated_template, name)
    yield postgres.url(name)
    _drop(postgres, name)


def _drop(postgres: PostgresServer, name: str) -> None:
    # Hundreds of them would each have an autovacuum worker every minute, and take long to remove at the end.
    postgres.run("dropdb", "--force", "--if-exists", name)


@pytest.fixture
async def probe(database: str) -> AsyncIterator[Probe]:
    """One connection to `database`, with the words of `tests/queueing.py`."""
    async with probing(database) as opened:
        yield opened
