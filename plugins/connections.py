"""Addresses of Postgres, Redis and the Models Backend, from Airflow's Connections."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from router.errors import ConfigError
from router.settings import Addresses, HttpAddress, PostgresAddress, RedisAddress, unknown_variables

log = logging.getLogger("router.settings")

NAMES = ("router_db", "router_redis", "models_backend")
# Extras that concern Airflow's hooks, not the connection.
POSTGRES_HOOK = frozenset({"cursor", "sqlalchemy_scheme", "sqlalchemy_query", "enable_log_db_messages"})


def read_addresses(get_connection: Callable[[str], Any]) -> Addresses:
    """Returns the addresses; `get_connection` returns Airflow's Connection with a name."""
    return addresses_of(*map(get_connection, NAMES))


def addresses_of(database: Any, redis: Any, backend: Any) -> Addresses:
    """Returns the addresses in three Connections, of Airflow's SDK or of its metadata database.

    Raises ConfigError that names the Connection and the field or extra that is not supported.
    """
    _warn_once()
    return Addresses(
        database_url=_postgres(database, f"Connection {NAMES[0]}").url,
        redis_url=_redis(redis, f"Connection {NAMES[1]}").url,
        backend_url=_backend(backend, f"Connection {NAMES[2]}").url,
        backend_token=backend.password or None,
    )


@functools.cache
def _warn_once() -> None:
    for warning in unknown_variables():
        log.warning("%s", warning)


def _postgres(found: Any, source: str) -> PostgresAddress:
    extras = {name: value for name, value in _extras(found, source).items() if name not in POSTGRES_HOOK}
    fields = {
        "host": found.host,
        "port": found.port,
        "user": found.login,
        "password": found.password,
        "dbname": found.schema,
    }
    return PostgresAddress.of({**extras, **_given(fields)}, source)


def _redis(found: Any, source: str) -> RedisAddress:
    kind, host, schema = found.conn_type or "", found.host or "", found.schema or ""
    fields: dict[str, Any] = {"username": found.login, "password": found.password}
    if kind == "unix" or host.startswith("/"):
        fields["socket"] = f"{host}/{schema}" if kind == "unix" else host
    else:
        fields |= {"host": host, "port": found.port, "db": schema}
    if kind in {"rediss", "valkeys"}:
        fields["ssl"] = True
    extras = _extras(found, source)
    return RedisAddress.of({**extras, **_given(fields), **extras}, source)


def _backend(found: Any, source: str) -> HttpAddress:
    refused = [*_given({"login": found.login}), *_extras(found, source)]
    if refused:
        raise ConfigError(
            f"{source} has {', '.join(refused)}. The router sends the password as a bearer token to the"
            " Models Backend, and nothing else. Remove them."
        )
    # The form's schema field selects https, and so does a Connection given as a URL: that sets its type. The
    # path of such a URL is in the schema.
    schema, kind = found.schema or "", found.conn_type or ""
    is_scheme = schema in {"http", "https"}
    scheme = schema if is_scheme else kind if kind in {"http", "https"} else "http"
    return HttpAddress.of(
        {
            "scheme": "https" if "https" in {scheme, kind} else scheme,
            "host": found.host,
            "port": found.port,
            "path": "" if is_scheme else schema,
        },
        source,
    )


def _extras(found: Any, source: str) -> dict[str, Any]:
    # `extra_dejson` would ask Airflow's supervisor to mask the values, which a trigger cannot wait for.
    try:
        extras = json.loads(found.extra or "{}")
    except ValueError:
        extras = None
    if not isinstance(extras, dict):
        raise ConfigError(f"{source}: Extra must be a JSON object.")
    nested = [name for name, value in extras.items() if isinstance(value, (dict, list)) and value]
    if nested:
        raise ConfigError(f"{source}: the extra {nested[0]!r} must be a text, a number, true or false.")
    return {name: value for name, value in extras.items() if value not in (None, "", [], {})}


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value not in (None, "")}
