"""Addresses of Postgres, Redis and the Models Backend, from Airflow's Connections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from router.settings import Addresses

NAMES = ("router_db", "router_redis", "models_backend")


def read_addresses(get_connection: Callable[[str], Any]) -> Addresses:
    """Returns the addresses; `get_connection` returns Airflow's Connection with a name."""
    return addresses_of(*map(get_connection, NAMES))


def addresses_of(database: Any, redis: Any, backend: Any) -> Addresses:
    """Returns the addresses in three Connections, of Airflow's SDK or of its metadata database."""
    # The form's schema field selects https, and so does a Connection given as a URL: that sets its type.
    scheme = "https" if "https" in {backend.schema, backend.conn_type} else "http"
    return Addresses(
        database_url=database.get_uri().replace("postgres://", "postgresql://", 1),
        redis_url=redis.get_uri(),
        backend_url=f"{scheme}://{backend.host}" + (f":{backend.port}" if backend.port else ""),
    )
