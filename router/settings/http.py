"""Addresses of HTTP services: the Models Backend, and Airflow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from typing_extensions import Self

from router.errors import ConfigError
from router.settings.url import check_parameters, host_text, split_host, split_url, valid_port

BACKEND_SOURCE = "MODELS_BACKEND_URL"
AIRFLOW_SOURCE = "ROUTER_AIRFLOW_URL"
SCHEMES = ("http", "https")


@dataclass(frozen=True, slots=True)
class HttpAddress:
    """Scheme, host, port and base path of a service."""

    scheme: str
    host: str
    port: int | None = None
    path: str = ""  # begins with a slash and does not end with one
    user: str | None = None
    password: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, text: str, source: str) -> Self:
        """Parses a URL. Raises ConfigError that names `source`."""
        url = split_url(text, source, SCHEMES)
        check_parameters(url.parameters, (), source, "Remove the part after the question mark.")
        if len(url.hosts) != 1 or not url.hosts[0][0]:
            raise ConfigError(f"{source} must have one host, e.g. http://host:8100")
        host, port = url.hosts[0]
        path = url.path.rstrip("/")
        return cls(url.scheme, host, port, path, url.user, url.password)

    @classmethod
    def of(cls, given: Mapping[str, Any], source: str) -> Self:
        """Checks `scheme`, `host`, `port` and `path`; the host may be a URL."""
        scheme, host, port, path = (given.get(name) or "" for name in ("scheme", "host", "port", "path"))
        written = str(host).strip()
        if "://" in written:
            found = cls.parse(written, source)
        else:
            name, slash, base = written.partition("/")
            name, own_port = split_host(name, source)
            if not name:
                raise ConfigError(f"{source} must have a host.")
            found = cls(scheme or "http", name, own_port, f"{slash}{base}".rstrip("/"))
        base = f"{found.path}/{str(path).strip('/')}".rstrip("/")
        return cls(
            found.scheme, found.host, valid_port(port, source) if port else found.port, base,
            found.user, found.password,
        )  # fmt: skip

    @property
    def url(self) -> str:
        """URL without login and without a trailing slash."""
        return f"{self.scheme}://{host_text(self.host, self.port)}{quote(self.path, safe='/:@!$&()*+,;=~')}"


def backend_address(text: str, source: str = BACKEND_SOURCE) -> HttpAddress:
    """Parses the address of the Models Backend. It has no login: a token is passed on its own."""
    found = HttpAddress.parse(text, source)
    if found.user is not None or found.password is not None:
        raise ConfigError(
            f"{source} has a login, which is not sent to the Models Backend. Remove it; a token belongs into"
            " MODELS_BACKEND_TOKEN."
        )
    return found
