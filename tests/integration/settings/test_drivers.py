"""Both Postgres drivers connect to the same address with the same settings."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from typing import Any
from urllib.parse import quote

import pytest

from local.postgres import PostgresServer
from router.database import connect, open_async_connection, open_connection, open_pool, rows
from router.errors import ConfigError, DatabaseError
from router.settings import PostgresAddress
from tests.support.stalls import stalling

SETTINGS = (
    "SELECT current_setting('application_name'), current_setting('search_path'), current_user, "
    "current_database()"
)


def keepalives(number: int) -> tuple[int, ...]:
    with socket.socket(fileno=os.dup(number)) as connected:
        return (
            connected.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
            *(
                connected.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
                for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
            ),
        )


async def seen_by_both(url: str) -> tuple[Any, Any]:
    """Returns settings, and keep-alives of a TCP connection, by psycopg2 and by asyncpg."""

    def by_psycopg2() -> Any:
        connection = open_connection(url)
        with contextlib.closing(connection), connection.cursor() as cursor:
            cursor.execute(SETTINGS)
            (found,) = cursor.fetchall()
            is_tcp = not connection.get_dsn_parameters()["host"].startswith("/")
            return (*found, *(keepalives(connection.fileno()) if is_tcp else ()))

    connection = await open_async_connection(url)
    try:
        found = tuple(await connection.fetchrow(SETTINGS))
        used = connection._transport.get_extra_info("socket")
        if used.family == socket.AF_INET:
            found += keepalives(used.fileno())
    finally:
        await connection.close()
    return await asyncio.to_thread(by_psycopg2), found


PARAMETERS = {
    "connect_timeout": "5", "application_name": "mine", "options": "-c search_path=elsewhere",
    "keepalives_idle": "33", "keepalives_interval": "7", "keepalives_count": "3", "tcp_user_timeout": "9000",
    "sslmode": "prefer", "gssencmode": "prefer", "channel_binding": "prefer", "client_encoding": "utf8",
    "target_session_attrs": "read-write",
}  # fmt: skip


async def test_parameters_mean_the_same_to_both_drivers(postgres: PostgresServer) -> None:
    query = "&".join(f"{name}={quote(value)}" for name, value in PARAMETERS.items())
    words = " ".join(f"{name}='{value}'" for name, value in PARAMETERS.items())
    path = f"{postgres.socket_folder}/.s.PGSQL.{postgres.port}"
    async with stalling(lambda: asyncio.open_unix_connection(path)) as relay:
        port = relay.port
        login = f"postgres@127.0.0.1:{port}/postgres"
        for url in (
            f"postgresql://{login}?{query}",
            f"postgres://{login}?{query}",
            f"postgresql+psycopg2://{login}?{query}",
            f"host=127.0.0.1 port={port} user=postgres dbname=postgres {words}",
            f"postgresql://postgres@127.0.0.1:1,127.0.0.1:{port}/postgres?{query}",
        ):
            first, second = await seen_by_both(url)
            expected = ("mine", "elsewhere", "postgres", "postgres", 1, 33, 7, 3, 9000)
            assert (first, second) == (expected, expected), url
        off = f"postgresql://{login}?keepalives=0"
        first, second = await seen_by_both(off)
        assert first[4] == second[4] == 0


async def test_a_unix_socket_in_every_notation(postgres: PostgresServer) -> None:
    folder, port = str(postgres.socket_folder), postgres.port
    for url in (
        f"postgresql://postgres@/postgres?host={quote(folder)}&port={port}",
        f"postgresql://postgres@{quote(folder, safe='')}:{port}/postgres",
        f"host={folder} port={port} user=postgres dbname=postgres",
        PostgresAddress.parse(postgres.url("postgres")).url,
    ):
        first, second = await seen_by_both(url)
        assert first == second, url
        assert first[2:] == ("postgres", "postgres")


@pytest.mark.parametrize("parameter", ["channel_binding=require", "connect_timeout=soon", "foo=1"])
async def test_every_program_refuses_an_unsupported_parameter_by_name(parameter: str) -> None:
    url = f"postgresql://u:p@127.0.0.1:1/d?{parameter}"
    name = parameter.partition("=")[0]
    with pytest.raises(ConfigError, match=name), connect(url):
        pass
    with pytest.raises(ConfigError, match=name):
        await open_pool(url, connections=1)


async def test_an_unreachable_server_is_reported_alike() -> None:
    url = "postgresql://u:Tr0ub4dor@127.0.0.1:1/d"
    with pytest.raises(DatabaseError, match=r"127\.0\.0\.1") as first, connect(url):
        pass
    with pytest.raises(DatabaseError, match=r"127\.0\.0\.1") as second:
        await open_pool(url, connections=1)
    assert "Tr0ub4dor" not in f"{first.value}{second.value}"


async def test_the_console_adds_its_options(postgres: PostgresServer) -> None:
    separator = "&" if "?" in postgres.url("postgres") else "?"
    url = f"{postgres.url('postgres')}{separator}options={quote('-c search_path=elsewhere')}"
    with contextlib.closing(open_connection(url, options="-c jit=off", connect_seconds=3)) as connection:
        assert rows(
            connection, "SELECT current_setting('search_path') AS a, current_setting('jit') AS b"
        ) == [{"a": "elsewhere", "b": "off"}]
