"""Addresses: supported forms, parameters that are refused by name, and no password in any message."""

from __future__ import annotations

import re
import string
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from redis.asyncio.connection import parse_url

from router.database import connect
from router.errors import ConfigError, RouterError, redacted
from router.limiter import redis_client
from router.models import AirflowApi, ModelsBackend
from router.settings import Addresses, BackendSettings, HttpAddress, PostgresAddress, RedisAddress
from router.settings import postgres as postgres_settings
from router.settings import redis as redis_settings

ROOT = Path(__file__).parents[3]
SOURCES = {"postgresql": PostgresAddress.parse, "redis": RedisAddress.parse}


def postgres(text: str, **environment: str) -> PostgresAddress:
    return PostgresAddress.parse(text, environment=environment)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("postgresql://u:p@h/d", "postgresql://u:p@h:5432/d"),
        (" postgres://u@h:1/d ", "postgresql://u@h:1/d"),
        ("postgresql+psycopg2://u:a%40b@h/d", "postgresql://u:a%40b@h:5432/d"),
        ("postgresql+asyncpg://u@h/d", "postgresql://u@h:5432/d"),
        ("postgresql://u:a@b:c@h/d", "postgresql://u:a%40b%3Ac@h:5432/d"),  # the last @ ends the login
        ("postgresql://u@h", "postgresql://u@h:5432/u"),
        ("postgresql://u@[::1]:7/d", "postgresql://u@[::1]:7/d"),
        ("postgresql://u@a:1,b/d?target_session_attrs=READ-WRITE", None),
        ("postgresql://u@/d?host=/run/pg&port=7", "postgresql://u@%2Frun%2Fpg:7/d"),
        ("postgresql://u@%2Frun%2Fpg/d", "postgresql://u@%2Frun%2Fpg:5432/d"),
        ("postgresql:///?user=u&host=h&dbname=d&password=p", "postgresql://u:p@h:5432/d"),
        ("host=h user=u dbname=d password='a b\\'c'", "postgresql://u:a%20b%27c@h:5432/d"),
        ("host = h user=u dbname=d sslmode = require", "postgresql://u@h:5432/d?sslmode=require"),
        ("postgresql://u@h/d?ssl=true", "postgresql://u@h:5432/d?sslmode=require"),
        ("postgresql://u@h/d?options=-c%20search_path%3Dx", None),
    ],
)
def test_addresses_of_postgres(text: str, canonical: str | None) -> None:
    found = postgres(text)
    assert canonical in (None, found.url)
    assert postgres(found.url) == found


def test_both_drivers_get_the_same_values() -> None:
    parameters = {
        "connect_timeout": "3", "application_name": "mine", "options": "-c search_path=x", "passfile": "/f",
        "sslmode": "verify-full", "sslrootcert": "/r & s", "target_session_attrs": "read-write",
        "channel_binding": "prefer", "gssencmode": "disable", "keepalives_idle": "30",
    }  # fmt: skip
    found = PostgresAddress.of({"host": "a,b", "port": "1,2", "user": "u", "password": "p@", **parameters})
    libpq, other = found.for_psycopg2(options="-c jit=off"), found.for_asyncpg(jit="off")
    assert (libpq["host"], libpq["port"]) == ("a,b", "1,2")
    assert (other["host"], other["port"]) == (["a", "b"], [1, 2])
    assert (libpq["user"], libpq["password"], libpq["dbname"]) == ("u", "p@", "u")
    assert (other["user"], other["password"], other["database"]) == ("u", "p@", "u")
    assert libpq["options"] == "-c search_path=x -c jit=off"
    assert other["server_settings"] == {
        "application_name": "mine",
        "options": "-c search_path=x",
        "jit": "off",
    }
    assert (libpq["connect_timeout"], other["timeout"]) == (3, 3)
    assert other["dsn"] == "postgresql:///?sslmode=verify-full&sslrootcert=%2Fr%20%26%20s"
    assert {libpq[name] == other[name] for name in ("passfile", "target_session_attrs")} == {True}


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("channel_binding=require", "channel_binding"),
        ("gssencmode=require", "gssencmode"),
        ("sslmode=on", "sslmode"),
        ("connect_timeout=soon", "connect_timeout"),
        ("keepalives_idle=-1", "keepalives_idle"),
        ("hostaddr=1.2.3.4", "hostaddr"),
        ("service=x", "service"),
        ("pgbouncer=true", "pgbouncer"),
        ("search_path=x", "search_path"),
        ("sslrootcert=system", "sslrootcert"),
        ("load_balance_hosts=random", "load_balance_hosts"),
    ],
)
def test_unsupported_parameters_of_postgres_are_named(query: str, named: str) -> None:
    for text in (f"postgresql://u:p@h/d?{query}", f"host=h {query}"):
        with pytest.raises(ConfigError, match=named):
            postgres(text)


def test_environment_variables_of_libpq_complete_the_address() -> None:
    environment = {"PGHOST": "h", "PGPORT": "7", "PGUSER": "u", "PGPASSWORD": "p", "PGSSLMODE": "require"}
    assert postgres("postgresql:///d", **environment).url == "postgresql://u:p@h:7/d?sslmode=require"
    assert postgres("postgresql://v@i:1/d?sslmode=disable", **environment).url == (
        "postgresql://v:p@i:1/d?sslmode=disable"
    )
    for name, value in (("PGSERVICE", "x"), ("PGHOSTADDR", "1.2.3.4"), ("PGCHANNELBINDING", "require")):
        with pytest.raises(ConfigError, match=name):
            postgres("postgresql://u@h/d", **{name: value})


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("redis://h", "redis://h:6379/0"),
        ("redis://:p%40@h:1/2", "redis://:p%40@h:1/2"),
        ("redis://h?db=3", "redis://h:6379/3"),
        ("redis://h/1?db=3", "redis://h:6379/3"),
        ("redis://h?ssl=true", "rediss://h:6379/0"),
        ("redis://h?ssl=False", "redis://h:6379/0"),
        ("valkey://u:p@h", "redis://u:p@h:6379/0"),
        ("valkeys://h/1", "rediss://h:6379/1"),
        ("rediss://h?ssl_cert_reqs=CERT_NONE", "rediss://h:6379/0?ssl_cert_reqs=none"),
        ("redis://[::1]:7", "redis://[::1]:7/0"),
        ("unix:///run/a b.sock?db=1", "unix:///run/a%20b.sock?db=1"),
        ("unix://u:p@/run/r.sock", "unix://u:p@/run/r.sock?db=0"),
        ("redis://h?password=p&username=u", "redis://u:p@h:6379/0"),
    ],
)
async def test_addresses_of_redis(text: str, canonical: str) -> None:
    found = RedisAddress.parse(text)
    assert found.url == canonical
    assert RedisAddress.parse(canonical) == found
    client = redis_client(text)
    passed = client.connection_pool.connection_kwargs
    assert passed.get("password") == found.password
    assert passed.get("db", 0) == found.database
    client.connection_pool.make_connection()  # redis-py accepts all of it
    await client.aclose()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("redis://h/x", "db"),
        ("redis://h?db=-1", "db"),
        ("redis://h?ssl=maybe", "ssl"),
        ("redis://h?decode_responses=true", "decode_responses"),
        ("redis://h?protocol=3", "protocol"),
        ("redis://h?socket_timeout=0", "socket_timeout"),
        ("redis://a,b", "several hosts"),
        ("redis+sentinel://a", "redis://"),
        ("localhost:6379", "redis://"),
    ],
)
def test_unsupported_addresses_of_redis_are_named(text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=f"ROUTER_REDIS_URL.*{named}"):
        RedisAddress.parse(text)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://h", "http://h"),
        ("HTTPS://h:8443/base/", "https://h:8443/base"),
        ("http://[::1]:8100/a/b", "http://[::1]:8100/a/b"),
        ("http://u:p@h/airflow", "http://h/airflow"),
    ],
)
def test_addresses_of_http_services(text: str, url: str) -> None:
    assert HttpAddress.parse(text, "SOURCE").url == url


@pytest.mark.parametrize(
    "text", ["h:8100", "ftp://h", "http://", "http://h?x=1", "http://h:x", "http://h/#a"]
)
def test_invalid_addresses_of_http_services_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="MODELS_BACKEND_URL"):
        ModelsBackend(text, BackendSettings())


def test_a_login_for_the_models_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match="MODELS_BACKEND_URL has a login"):
        ModelsBackend("http://u:p@h", BackendSettings())


def test_a_login_in_airflows_url_is_used_and_never_shown() -> None:
    with AirflowApi("http://bob:Tr0ub4dor@127.0.0.1:1/airflow", "", "") as api:
        assert (api._user, api._password) == ("bob", "Tr0ub4dor")
        with pytest.raises(RouterError, match=r"http://127\.0\.0\.1:1/airflow cannot be reached") as caught:
            api.variables()
    assert "Tr0ub4dor" not in str(caught.value)


def test_all_addresses_are_checked_when_they_are_read() -> None:
    valid = {"database_url": "postgresql://h/d", "redis_url": "redis://h", "backend_url": "http://h"}
    Addresses(**valid)
    for name in valid:
        with pytest.raises(ConfigError):
            Addresses(**{**valid, name: "x://u:Tr0ub4dor@h"})


@pytest.mark.parametrize(
    ("service", "parameters"),
    [
        ("Postgres", {*postgres_settings.FIELDS, *postgres_settings.PARAMETERS}),
        ("Redis", set(redis_settings.PARAMETERS)),
    ],
)
def test_the_manual_lists_the_supported_parameters(service: str, parameters: set[str]) -> None:
    text = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    table = text.split(f"| parameter of {service} | values |")[1].split("\n\n")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert set(re.findall(r"`(\w+)`", " ".join(first_cells))) == parameters


def test_the_manual_lists_the_supported_forms() -> None:
    text = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    for scheme in (*postgres_settings.SCHEMES, *redis_settings.SCHEMES):
        assert f"`{scheme}://" in text


SECRET = st.text(
    st.one_of(st.sampled_from("@/?#:%[]&=+ ,;'\"\\\n"), st.sampled_from(string.ascii_letters + "ä€")),
    min_size=1,
    max_size=12,
)
# Each part of a password is recognizable in a message, whatever characters cut it.
MARK = "Zq7"


@given(SECRET)
@example("a/b")
@example("a?b=c")
@example("?connect_timeout=b&c=")
@example("[")
@example("a@b:c")
@example("%00")
@example("\udcff")
@example("\0")
def test_no_message_contains_a_part_of_a_password(characters: str) -> None:
    password = MARK + MARK.join(characters) + MARK
    texts = {
        "ROUTER_DATABASE_URL": [
            f"postgresql://u:{password}@127.0.0.1:1/d",
            f"postgresql://127.0.0.1:1/d?password={password}&user=u",
            f"host=127.0.0.1 port=1 user=u password={password}",
        ],
        "ROUTER_REDIS_URL": [
            f"redis://:{password}@127.0.0.1:1/0",
            f"redis://127.0.0.1:1?password={password}",
        ],
        "MODELS_BACKEND_URL": [f"http://u:{password}@127.0.0.1:1"],
        "ROUTER_AIRFLOW_URL": [f"http://u:{password}@127.0.0.1:1"],
    }
    for name, written in texts.items():
        for text in written:
            assert MARK not in message_of(name, text), text


def message_of(name: str, text: str) -> str:
    """Returns the message of the error that an address raises, with those of its causes."""
    try:
        if name == "ROUTER_DATABASE_URL":
            with connect(text):
                pass
        elif name == "ROUTER_REDIS_URL":
            redis_client(text)
        elif name == "MODELS_BACKEND_URL":
            ModelsBackend(text, BackendSettings())
        else:
            with AirflowApi(text, "", "") as api:
                return repr(api.url)
    except RouterError as error:
        chain: list[str] = []
        cause: BaseException | None = error
        while cause is not None:
            chain.append(str(cause))
            cause = cause.__cause__ or cause.__context__
        return "\n".join(chain)
    return ""


@given(SECRET, st.sampled_from(["postgresql", "redis"]))
def test_an_encoded_password_arrives_unchanged(password: str, scheme: str) -> None:
    text = f"{scheme}://u:{quote(password, safe='')}@h/0"
    found = SOURCES[scheme](text)
    assert found.password == password
    assert SOURCES[scheme](found.url) == found
    assert password not in found.text or password in "postgresql://u@h:5432/0redis://h:6379/0"
    if scheme == "redis":
        assert parse_url(found.url)["password"] == password
    assert MARK + password + MARK not in redacted(f"cannot open {scheme}://u:{MARK}{quote(password)}{MARK}@h")


def test_redaction_hides_every_login_of_a_text() -> None:
    text = "no route to http://u:a@b:c/d@h/x or redis://:p@r, see https://docs/x@y"
    assert redacted(text) == "no route to http://***@h/x or redis://***@r, see https://docs/x@y"
