"""One PostgreSQL and one Redis per session; a new database and an empty Redis per test."""

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
from router.classification import Classifier
from router.database import Connection, connect
from router.migrations import migrate
from router.models.roster import sync_roster
from router.settings.environment import DEFAULT_CONFIG_FOLDER
from router.settings.models import DISCOVERED
from router.settings.router import load_config
from tests.support.queue import Probe, probing, without_classification

pytest_plugins = ["tests.support.roles", "tests.support.stack"]

MEMORY_BYTES = 4 << 30

_numbers = itertools.count()


def pytest_configure() -> None:
    """Restores SIGINT, which background jobs of a shell ignore, for programs that tests interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _without_discovered_models(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Hides models that a stack running in this checkout has found: they would be on every roster."""
    if (DEFAULT_CONFIG_FOLDER / DISCOVERED).exists() and "ROUTER_CONFIG" not in os.environ:
        folder = tmp_path_factory.mktemp("shipped") / "config"
        shutil.copytree(DEFAULT_CONFIG_FOLDER, folder, ignore=shutil.ignore_patterns(DISCOVERED))
        os.environ["ROUTER_CONFIG"] = str(folder)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    folder = Path(tempfile.mkdtemp(prefix="router-test-pg-", dir=_memory()))
    folder.chmod(0o711)  # open to PostgreSQL's user
    server = start_postgres(folder / "data", settings={"fsync": "off"})
    yield server
    server.stop()
    shutil.rmtree(folder, ignore_errors=True)


def _memory() -> Path | None:
    """Returns a folder in memory, where copying a database is ten times faster; None if it is too small."""
    folder = Path("/dev/shm")
    if not os.access(folder, os.W_OK) or shutil.disk_usage(folder).free < MEMORY_BYTES:
        return None
    return folder


@pytest.fixture(scope="session")
def administrator(postgres: PostgresServer) -> Iterator[Connection]:
    """A connection that creates and drops databases, faster than `createdb` and `dropdb`."""
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
    """Client of an empty Redis."""
    client = redis.asyncio.Redis.from_url(redis_server.url)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
def empty_database(postgres: PostgresServer, administrator: Connection) -> Iterator[str]:
    """URL of an empty database."""
    with _copy(administrator, "template1") as name:
        yield postgres.url(name)


@pytest.fixture
def shared_data() -> Path:
    """Folder of real data next to the checkout; tests that need it are skipped without it."""
    folder = Path(os.environ.get("ROUTER_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}: set ROUTER_SHARED_DATA to measure against real data")
    return folder


@pytest.fixture(scope="module")
def trained_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data folder with a trained classifier: a request does not wait long for it to be trained."""
    folder = tmp_path_factory.mktemp("data")
    settings = load_config().classification
    assert settings is not None
    Classifier.build(settings, folder / "categories")
    return folder


@pytest.fixture(scope="session")
def bare_template(postgres: PostgresServer) -> str:
    """Name of a template database with the schema and no rows."""
    name = f"bare_{os.getpid()}"
    migrate(postgres.create_database(name))
    return name


@pytest.fixture(scope="session")
def migrated_template(postgres: PostgresServer, bare_template: str) -> str:
    """Name of a template database with the schema and the shipped config, but without classification.

    Tasks without a category take the default one immediately; tests of the classification enable it.
    """
    name = f"template_{os.getpid()}"
    postgres.run("createdb", "--template", bare_template, name)
    with connect(postgres.url(name)) as connection:
        sync_roster(connection, without_classification(load_config()))
    return name


@pytest.fixture
def database(postgres: PostgresServer, administrator: Connection, migrated_template: str) -> Iterator[str]:
    """URL of a new database with the schema, the shipped config and no task."""
    with _copy(administrator, migrated_template) as name:
        yield postgres.url(name)


@pytest.fixture
def bare_database(postgres: PostgresServer, administrator: Connection, bare_template: str) -> Iterator[str]:
    """URL of a new database with the schema, but without roster, categories and tasks."""
    with _copy(administrator, bare_template) as name:
        yield postgres.url(name)


@contextmanager
def _copy(administrator: Connection, template: str) -> Iterator[str]:
    """Yields the name of a copy, and drops it afterwards.

    Hundreds of databases would each get an autovacuum worker per minute.
    """
    name = f"test_{os.getpid()}_{next(_numbers)}"
    words = {"name": sql.Identifier(name), "template": sql.Identifier(template)}
    with administrator.cursor() as cursor:
        cursor.execute(
            sql.SQL("CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy").format(**words)
        )
        if template != "template1":  # a copy has the schema, but not the default path that the migration set
            cursor.execute(
                sql.SQL('ALTER DATABASE {name} SET search_path = "$user", public, router').format(**words)
            )
        yield name
        cursor.execute(sql.SQL("DROP DATABASE IF EXISTS {name} WITH (FORCE)").format(**words))


@pytest.fixture
async def probe(database: str) -> AsyncIterator[Probe]:
    """A connection to `database`, with the helpers of `tests/support/queue.py`."""
    async with probing(database) as opened:
        yield opened
