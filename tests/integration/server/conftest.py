"""A server with two models and its services, shared by the tests of a module."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import closing

import pytest
import redis
import requests

from local.postgres import PostgresServer
from local.redis import RedisServer
from models_backend.process import BackendServer, start_backend
from router.database import connect
from router.models.roster import sync_roster
from router.settings.router import load_config
from tests.support.serving import Serving, classifies, config_folder, serving
from tests.support.waiting import until

_numbers = itertools.count()


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendServer]:
    server = start_backend(tmp_path_factory.mktemp("backend"), "--time-scale", "50", "--latency", "even:1:10")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def services(
    postgres: PostgresServer,
    migrated_template: str,
    redis_server: RedisServer,
    backend: BackendServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, str]:
    """Environment of the server: database, Redis, backend and config."""
    with closing(redis.Redis.from_url(redis_server.url)) as client:
        client.flushall()  # targets of other tests are newer than those of the config
    name = f"serve_{os.getpid()}_{next(_numbers)}"
    postgres.run("createdb", "--template", migrated_template, name)
    folder = config_folder(tmp_path_factory.mktemp("serve") / "config")
    with connect(postgres.url(name)) as connection:
        sync_roster(connection, load_config(folder))
    return {
        "ROUTER_DATABASE_URL": postgres.url(name),
        "ROUTER_REDIS_URL": redis_server.url,
        "MODELS_BACKEND_URL": backend.url,
        "ROUTER_CONFIG": str(folder),
        "ROUTER_DATA": str(folder.parent / "data"),
    }


@pytest.fixture(scope="module")
def server(
    services: dict[str, str], backend: BackendServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Serving]:
    options = ("--max-body", "1", "--at-once", "20", "--keep-alive", "0.3")
    with serving(tmp_path_factory.mktemp("server"), services, backend, *options) as server:
        until(lambda: classifies(server), 60)
        yield server


@pytest.fixture(autouse=True)
def healed(backend: BackendServer) -> Iterator[None]:
    yield
    requests.delete(f"{backend.url}/faults", timeout=5)
