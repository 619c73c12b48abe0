"""Address of Redis or Valkey."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from typing_extensions import Self

from router.errors import ConfigError
from router.settings.url import (
    check_parameters,
    host_text,
    login_text,
    query_text,
    split_host,
    split_url,
    usable,
    valid_port,
    whole_number,
)

SOURCE = "ROUTER_REDIS_URL"
PORT = 6379
TLS_SCHEMES = ("rediss", "valkeys")
SCHEMES = ("redis", "valkey", *TLS_SCHEMES, "unix")
FLAGS = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("0", "false", "no", "off"), False),
}
MAX_SECONDS = 60.0
TLS_PARAMETERS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname")
CERT_REQS = ("required", "optional", "none")
PARAMETERS = (
    *("db", "ssl", *TLS_PARAMETERS, "username", "password", "client_name"),
    *("socket_timeout", "socket_connect_timeout", "socket_keepalive", "health_check_interval", "protocol"),
)
HINT = f"Supported: {', '.join(PARAMETERS)}."


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """One server, by host and port or by the path of a socket; `parameters` have the names of redis-py."""

    host: str
    port: int
    socket: str | None = None
    database: int = 0
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: bool = False
    parameters: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def parse(cls, text: str, source: str = SOURCE) -> Self:
        """Parses a URL. Raises ConfigError that names `source`."""
        url = split_url(text, source, SCHEMES)
        if len(url.hosts) > 1:
            raise ConfigError(f"{source} has several hosts. The rate limiter needs one server or one proxy.")
        host, port = url.hosts[0] if url.hosts else ("", None)
        given: dict[str, Any] = dict(url.parameters)
        if url.scheme == "unix":
            given["socket"] = f"{host}{url.path}" or None
            host = ""
        elif url.path.strip("/"):
            given.setdefault("db", url.path.strip("/"))
        if url.scheme in TLS_SCHEMES:
            given["ssl"] = True
        login = {"username": url.user or None, "password": url.password or None}
        return cls.of(
            {**given, "host": host, "port": port, **{n: v for n, v in login.items() if v is not None}}, source
        )

    @classmethod
    def of(cls, given: Mapping[str, Any], source: str = SOURCE) -> Self:
        """Checks fields by their names. Raises ConfigError with the name of one that is not supported."""
        values = {name: value for name, value in given.items() if value is not None and value != ""}
        check_parameters(values, ("host", "port", "socket", *PARAMETERS), source, HINT)
        for value in values.values():
            usable(str(value), source)
        host, port = split_host(str(values.pop("host", "")), source)
        port = valid_port(values.pop("port", None) or port or PORT, source)
        socket = values.pop("socket", None)
        database = whole_number(values.pop("db", 0), "db", source)
        tls = _flag(values.pop("ssl", False), "ssl", source)
        user, password = values.pop("username", None), values.pop("password", None)
        parameters = {name: _valid(name, value, source) for name, value in values.items()}
        if not tls and any(name in TLS_PARAMETERS for name in parameters):
            parameters = {name: value for name, value in parameters.items() if name not in TLS_PARAMETERS}
        if socket is not None and tls:
            raise ConfigError(f"{source}: ssl is not supported on a unix socket.")
        return cls(
            host=host or "localhost", port=port, socket=None if socket is None else str(socket),
            database=database, user=None if user is None else str(user),
            password=None if password is None else str(password), tls=tls, parameters=parameters,
        )  # fmt: skip

    @property
    def url(self) -> str:
        """URL for redis-py, with the password; parses to the same value."""
        login = login_text(self.user, self.password)
        if self.socket is not None:
            query = query_text({"db": str(self.database), **self.parameters})
            return f"unix://{login}{quote(self.socket)}{query}"
        scheme = "rediss" if self.tls else "redis"
        place = f"{host_text(self.host, self.port)}/{self.database}"
        return f"{scheme}://{login}{place}{query_text(self.parameters)}"

    @property
    def text(self) -> str:
        """URL for messages: without login and parameters."""
        if self.socket is not None:
            return f"unix://{self.socket}"
        return f"{'rediss' if self.tls else 'redis'}://{host_text(self.host, self.port)}/{self.database}"


def _valid(name: str, value: Any, source: str) -> str:
    if name in {"socket_keepalive", "ssl_check_hostname"}:
        return str(_flag(value, name, source)).lower()
    if name == "health_check_interval":
        return str(whole_number(value, name, source))
    if name in {"socket_timeout", "socket_connect_timeout"}:
        return str(_seconds(value, name, source))
    written = str(value)
    if name == "ssl_cert_reqs" and written.lower().removeprefix("cert_") not in CERT_REQS:
        raise ConfigError(f"{source}: ssl_cert_reqs must be {' or '.join(CERT_REQS)}.")
    if name == "protocol" and written != "2":
        raise ConfigError(f"{source}: protocol must be 2.")
    return written.lower().removeprefix("cert_") if name == "ssl_cert_reqs" else written


def _flag(value: Any, name: str, source: str) -> bool:
    found = FLAGS.get(str(value).lower())
    if found is None:
        raise ConfigError(f"{source}: {name} must be true or false.")
    return found


def _seconds(value: Any, name: str, source: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MAX_SECONDS:
        raise ConfigError(f"{source}: {name} must be a number of seconds up to {MAX_SECONDS:g}.")
    return seconds
