"""Real parts: one PostgreSQL and one Redis a session, a fresh database and an empty Redis a test."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg2
import pytest
import redis.asyncio
from psycopg2 import sql

from local.postgres import PostgresServer, start_postgres
from local.redis import RedisServer, start_redis
from router.database import Connection, connect
from router.migrations import migrate
from router.models.roster import sync_roster
from router.settings.router import load_config
from tests.support.queue import Probe, probing, without_classification

pytest_plugins = ["tests.support.stack"]

MEMORY_BYTES = 4 << 30

_numbers = itertools.count()


def pytest_configure() -> None:
    """What a shell starts in the background ignores SIGINT, and so would programs that tests interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    # Not in pytest's own folder: another pytest that starts closes that one to PostgreSQL's user.
    folder = Path(tempfile.mkdtemp(prefix="router-test-pg-", dir=_memory()))
    server = start_postgres(folder / "data", settings={"fsync": "off"})
    yield server
    server.stop()
    shutil.rmtree(folder, ignore_errors=True)


def _memory() -> Path | None:
    """A folder in memory, where a database is copied in a tenth of the time; None if there is too little."""
    folder = Path("/dev/shm")
    if not os.access(folder, os.W_OK) or shutil.disk_usage(folder).free < MEMORY_BYTES:
        return None
    return folder


@pytest.fixture(scope="session")
def administrator(postgres: PostgresServer) -> Iterator[Connection]:
    """A connection that makes databases and drops them: a program each would take longer than most tests."""
    connection = psycopg2.connect(postgres.url("postgres"))
    connection.autocommit = True
    yield connection
    connection.close()


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
def empty_database(postgres: PostgresServer, administrator: Connection) -> Iterator[str]:
    """The URL of a database that holds nothing."""
    with _copy(administrator, "template1") as name:
        yield postgres.url(name)


@pytest.fixture
def shared_data() -> Path:
    """Real data collected beside the checkout; tests that need it skip where it is not."""
    folder = Path(os.environ.get("ROUTER_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}: set ROUTER_SHARED_DATA to measure against real data")
    return folder


@pytest.fixture(scope="session")
def bare_template(postgres: PostgresServer) -> str:
    """The name of a database with the whole schema and nothing in it, to be copied and never used."""
    name = f"bare_{os.getpid()}"
    migrate(postgres.create_database(name))
    return name


@pytest.fixture(scope="session")
def migrated_template(postgres: PostgresServer, bare_template: str) -> str:
    """The name of a database with the whole schema and the shipped config, to be copied and never used.

    But for one setting: a task without a category takes the default one at once, as most tests are about what
    comes after. `tests/integration/test_categorising.py` turns it on.
    """
    name = f"template_{os.getpid()}"
    postgres.run("createdb", "--template", bare_template, name)
    with connect(postgres.url(name)) as connection:
        sync_roster(connection, without_classification(load_config()))
    return name


@pytest.fixture
def database(postgres: PostgresServer, administrator: Connection, migrated_template: str) -> Iterator[str]:
    """The URL of a database of its own with the whole schema and the shipped config, and no task."""
    with _copy(administrator, migrated_template) as name:
        yield postgres.url(name)


@pytest.fixture
def bare_database(postgres: PostgresServer, administrator: Connection, bare_template: str) -> Iterator[str]:
    """The URL of a database of its own with the whole schema, but no roster, no categories and no task."""
    with _copy(administrator, bare_template) as name:
        yield postgres.url(name)


@contextmanager
def _copy(administrator: Connection, template: str) -> Iterator[str]:
    """The name of a copy, gone afterwards.

    Hundreds of them would each have an autovacuum worker every minute, and take long to remove at the end.
    """
    name = f"test_{os.getpid()}_{next(_numbers)}"
    words = {"name": sql.Identifier(name), "template": sql.Identifier(template)}
    with administrator.cursor() as cursor:
        cursor.execute(
            sql.SQL("CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy").format(**words)
        )
        yield name
        cursor.execute(sql.SQL("DROP DATABASE IF EXISTS {name} WITH (FORCE)").format(**words))


@pytest.fixture
async def probe(database: str) -> AsyncIterator[Probe]:
    """One connection to `database`, with the words of `tests/queueing.py`."""
    async with probing(database) as opened:
        yield opened
