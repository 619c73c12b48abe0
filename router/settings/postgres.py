"""Address of Postgres, with the same meaning for both drivers (asyncpg and psycopg2)."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
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

SOURCE = "ROUTER_DATABASE_URL"
SCHEMES = ("postgresql", "postgres", "postgresql+psycopg2", "postgresql+psycopg", "postgresql+asyncpg")
PORT = 5432
CONNECT_SECONDS = 10
SOCKET_FOLDERS = ("/run/postgresql", "/var/run/postgresql", "/tmp")  # noqa: S108 - libpq's default

SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
SESSIONS = ("any", "primary", "standby", "read-write", "read-only", "prefer-standby")
FLAGS = ("0", "1")
# Parameter -> its valid values; () for any text, None for a whole number.
TLS_PARAMETERS: dict[str, tuple[str, ...]] = {
    "sslmode": SSL_MODES,
    "sslrootcert": (),
    "sslcert": (),
    "sslkey": (),
    "sslpassword": (),
    "sslcrl": (),
    "sslnegotiation": ("postgres", "direct"),
    "ssl_min_protocol_version": ("TLSv1.2", "TLSv1.3"),
    "ssl_max_protocol_version": ("TLSv1.2", "TLSv1.3"),
}
PARAMETERS: dict[str, tuple[str, ...] | None] = {
    **TLS_PARAMETERS,
    "application_name": (),
    "options": (),
    "passfile": (),
    "target_session_attrs": SESSIONS,
    "connect_timeout": None,
    "keepalives": FLAGS,
    "keepalives_idle": None,
    "keepalives_interval": None,
    "keepalives_count": None,
    "tcp_user_timeout": None,
    # asyncpg has neither channel binding nor encryption by GSSAPI, nor another encoding.
    "channel_binding": ("disable", "prefer"),
    "gssencmode": ("disable", "prefer"),
    "client_encoding": ("utf8", "utf-8", "unicode", "auto"),
    "load_balance_hosts": ("disable",),
    "sslcompression": ("0",),
    "sslsni": ("1",),
}
IGNORED = (
    "channel_binding",
    "gssencmode",
    "client_encoding",
    "load_balance_hosts",
    "sslcompression",
    "sslsni",
)
SOCKET_OPTIONS = {
    "keepalives_idle": "TCP_KEEPIDLE",
    "keepalives_interval": "TCP_KEEPINTVL",
    "keepalives_count": "TCP_KEEPCNT",
    "tcp_user_timeout": "TCP_USER_TIMEOUT",
}
FIELDS = ("host", "port", "user", "password", "dbname")
ALIASES = {"database": "dbname", "ssl": "sslmode", "fallback_application_name": "application_name"}
ENVIRONMENT = {
    "PGHOST": "host",
    "PGPORT": "port",
    "PGUSER": "user",
    "PGPASSWORD": "password",
    "PGDATABASE": "dbname",
    "PGPASSFILE": "passfile",
    "PGAPPNAME": "application_name",
    "PGOPTIONS": "options",
    "PGCONNECT_TIMEOUT": "connect_timeout",
    "PGTARGETSESSIONATTRS": "target_session_attrs",
    "PGSSLMODE": "sslmode",
    "PGSSLROOTCERT": "sslrootcert",
    "PGSSLCERT": "sslcert",
    "PGSSLKEY": "sslkey",
    "PGSSLCRL": "sslcrl",
    "PGSSLNEGOTIATION": "sslnegotiation",
    "PGSSLMINPROTOCOLVERSION": "ssl_min_protocol_version",
    "PGSSLMAXPROTOCOLVERSION": "ssl_max_protocol_version",
    "PGCHANNELBINDING": "channel_binding",
    "PGGSSENCMODE": "gssencmode",
}
# libpq would apply them and asyncpg would not.
REFUSED_VARIABLES = ("PGSERVICE", "PGHOSTADDR", "PGREQUIREAUTH", "PGREQUIREPEER", "PGLOADBALANCEHOSTS")
HINT = (
    f"Supported: {', '.join((*FIELDS, *PARAMETERS))}. Settings of the server go into options, e.g."
    " options=-c%20search_path%3Dx."
)
_JDBC = {"true": "require", "false": "disable"}


@dataclass(frozen=True, slots=True)
class PostgresAddress:
    """Servers, database and login; `parameters` have the names of libpq."""

    hosts: tuple[str, ...]  # names, IP addresses, or folders of sockets
    ports: tuple[int, ...]
    database: str
    user: str
    password: str | None = field(default=None, repr=False)
    parameters: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def parse(cls, text: str, source: str = SOURCE, environment: Mapping[str, str] | None = None) -> Self:
        """Parses a URL or `host=... dbname=...`. Raises ConfigError that names `source`."""
        if "://" not in text and re.search(r"\w\s*=", text):
            return cls.of(_keywords(text, source), source, environment)
        url = split_url(text, source, SCHEMES)
        ports = [port for _, port in url.hosts]
        fields = {
            "host": ",".join(host for host, _ in url.hosts),
            "port": ",".join(str(port or PORT) for port in ports) if any(ports) else "",
            "user": url.user,
            "password": url.password,
            "dbname": url.path[1:],
        }
        given = {name: value for name, value in fields.items() if value}
        return cls.of({**url.parameters, **given}, source, environment)

    @classmethod
    def of(
        cls, given: Mapping[str, Any], source: str = SOURCE, environment: Mapping[str, str] | None = None
    ) -> Self:
        """Checks libpq's parameters, completed by the environment variables of libpq.

        Raises ConfigError with the name of a parameter that the drivers would not understand alike.
        """
        environment = os.environ if environment is None else environment
        values = _checked(given, source)
        for name in REFUSED_VARIABLES:
            if environment.get(name):
                raise ConfigError(f"The environment variable {name} is not supported. Unset it.")
        for variable, name in ENVIRONMENT.items():
            if environment.get(variable) and name not in values:
                values |= _checked({name: environment[variable]}, variable)
        hosts = [split_host(host, source) for host in values.pop("host", "").split(",") if host]
        written = values.pop("port", "") or ",".join(str(port or PORT) for _, port in hosts) or str(PORT)
        ports = [valid_port(port, source) for port in written.split(",")]
        hosts = hosts or [(_default_host(ports[0]), None)]
        if len(ports) not in {1, len(hosts)}:
            raise ConfigError(
                f"{source} has {len(hosts)} hosts and {len(ports)} ports. Give one for each host."
            )
        user = values.pop("user", "") or _current_user()
        return cls(
            hosts=tuple(host for host, _ in hosts),
            ports=tuple(ports * len(hosts) if len(ports) == 1 else ports),
            database=values.pop("dbname", "") or user,
            user=user,
            password=values.pop("password", None),
            parameters=values,
        )

    @property
    def url(self) -> str:
        """URL with the password; parses to the same value."""
        return self._url(self.password)

    @property
    def text(self) -> str:
        """URL for messages: without password and parameters."""
        return self._url(None).partition("?")[0]

    def _url(self, password: str | None) -> str:
        hosts = ",".join(map(host_text, self.hosts, self.ports))
        path, query = quote(self.database, safe=""), query_text(self.parameters)
        return f"postgresql://{login_text(self.user, password)}{hosts}/{path}{query}"

    @property
    def connect_seconds(self) -> int:
        """Time for one attempt to connect to one host."""
        return int(self.parameters.get("connect_timeout", "0")) or CONNECT_SECONDS

    def for_psycopg2(self, *, options: str = "", application_name: str = "router") -> dict[str, Any]:
        """Returns arguments of `psycopg2.connect`; `options` are added to those of the address."""
        passed = {name: value for name, value in self.parameters.items() if name not in IGNORED}
        return {
            "application_name": application_name,
            **passed,
            "gssencmode": "disable",
            "options": f"{passed.get('options', '')} {options}".strip(),
            "connect_timeout": self.connect_seconds,
            "host": ",".join(self.hosts),
            "port": ",".join(map(str, self.ports)),
            "user": self.user,
            "dbname": self.database,
            **({} if self.password is None else {"password": self.password}),
        }

    def for_asyncpg(self, *, application_name: str = "router", **settings: str) -> dict[str, Any]:
        """Returns arguments of `asyncpg.connect`; `settings` are set on the server."""
        given = self.parameters
        tls = {name: given[name] for name in TLS_PARAMETERS if name in given}
        server = {"application_name": given.get("application_name", application_name), **settings}
        if given.get("options"):
            server["options"] = given["options"]
        return {
            "dsn": f"postgresql:///{query_text(tls)}",  # asyncpg accepts these in a URL only
            "host": list(self.hosts),
            "port": list(self.ports),
            "user": self.user,
            "password": self.password,
            "database": self.database,
            "timeout": self.connect_seconds,
            "server_settings": server,
            **{name: given[name] for name in ("passfile", "target_session_attrs") if name in given},
        }

    def socket_options(self, family: int) -> list[tuple[int, int, int]]:
        """Returns level, option and value of the keep-alives that libpq sets on its socket."""
        if family not in {socket.AF_INET, socket.AF_INET6} or self.parameters.get("keepalives") == "0":
            return []
        found = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
        for parameter, option in SOCKET_OPTIONS.items():
            value = int(self.parameters.get(parameter, "0"))
            if value and hasattr(socket, option):
                found.append((socket.IPPROTO_TCP, getattr(socket, option), value))
        return found


def _keywords(text: str, source: str) -> dict[str, str]:
    """Parses `host=... dbname=...`."""
    found: dict[str, str] = {}
    rest = text.strip()
    pattern = re.compile(r"(\w+)\s*=\s*(?:'((?:[^'\\]|\\.)*)'|((?:[^\s'\\]|\\.)*))(?:\s+|$)", re.DOTALL)
    while rest:
        match = pattern.match(rest)
        if match is None:
            raise ConfigError(
                f"{source} is neither a URL nor a list of name=value. Write values with blanks as 'value',"
                r" and ' and \ within them as \' and \\."
            )
        quoted, plain = match.group(2), match.group(3)
        found[match.group(1)] = re.sub(r"\\(.)", r"\1", plain if quoted is None else quoted, flags=re.DOTALL)
        rest = rest[match.end() :]
    return found


def _checked(given: Mapping[str, Any], source: str) -> dict[str, str]:
    names = {name: ALIASES.get(name, name) for name in given}
    check_parameters(names.values(), (*FIELDS, *PARAMETERS), source, HINT)
    values: dict[str, str] = {}
    for name, value in given.items():
        if value is None or value == "":
            continue
        written = str(int(value)) if isinstance(value, bool) and name != "ssl" else str(value)
        written = _JDBC.get(written.lower(), written) if name == "ssl" else written
        if name == names[name] or names[name] not in values:
            values[names[name]] = usable(_valid(names[name], written, source), source)
    if values.get("sslrootcert") == "system":
        raise ConfigError(
            f"{source}: sslrootcert=system is not supported. Name a file, e.g."
            " /etc/ssl/certs/ca-certificates.crt"
        )
    return values


def _valid(name: str, value: str, source: str) -> str:
    valid = PARAMETERS.get(name, ())
    if valid is None:
        return str(whole_number(value, name, source))
    canonical = {one.lower(): one for one in valid}
    if valid and value.lower() not in canonical:
        reason = " The driver of workers and requests supports nothing else." if name in IGNORED else ""
        raise ConfigError(f"{source}: {name} must be {' or '.join(valid)}.{reason}")
    return canonical.get(value.lower(), value)


def _default_host(port: int) -> str:
    found = (folder for folder in SOCKET_FOLDERS if Path(folder, f".s.PGSQL.{port}").exists())
    return next(found, "localhost")


def _current_user() -> str:
    with contextlib.suppress(KeyError, OSError):  # in a container the user may have no name
        return getpass.getuser()
    return "postgres"
