"""Splits URLs of services into their fields. No error text contains a part that may belong to a password."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from urllib.parse import quote, unquote

from router.errors import ConfigError

ENCODE = "Percent-encode special characters of user and password, e.g. @ as %40, / as %2F and % as %25."
_CONTROL = re.compile("[\x00-\x1f\x7f]")
_UNUSABLE = re.compile("[\x00\ud800-\udfff]")  # no service can have them in a name or a password
_BAD_PERCENT = re.compile("%(?![0-9A-Fa-f]{2})")
_END_OF_AUTHORITY = re.compile("[/?#]")
_PARAMETER = re.compile(r"[A-Za-z_][\w.-]{0,40}", re.ASCII)
_HOST = re.compile(r"[^\s/?#@\[\]\\<>\"'`{}|^]+")
_IPV6 = re.compile(r"[0-9A-Fa-f.]{0,45}:[0-9A-Fa-f:.]{0,45}(%[\w.-]{1,99})?", re.ASCII)
SECRET_PARAMETERS = frozenset({"password", "sslpassword", "ssl_password"})
MAX_PORT = 65535
MAX_DIGITS = 8

Host = tuple[str, "int | None"]


@dataclass(frozen=True, slots=True)
class Url:
    """Decoded fields of a URL; `path` starts with a slash or is empty."""

    scheme: str
    hosts: tuple[Host, ...]
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    path: str = ""
    parameters: Mapping[str, str] = field(default_factory=dict, repr=False)


def split_url(text: str, source: str, schemes: Iterable[str]) -> Url:
    """Splits a URL. Raises ConfigError that names `source`, e.g. an environment variable."""
    scheme, separator, rest = text.strip().partition("://")
    scheme = scheme.lower()
    schemes = tuple(schemes)
    if not separator or scheme not in schemes:
        raise ConfigError(f"{source} must begin with {' or '.join(f'{one}://' for one in schemes)}")
    if _CONTROL.search(rest):
        raise ConfigError(f"{source} contains a control character or a line break. {ENCODE}")
    end = _END_OF_AUTHORITY.search(rest)
    authority, tail = (rest, "") if end is None else (rest[: end.start()], rest[end.start() :])
    if _BAD_PERCENT.search(rest):
        raise ConfigError(f"{source} has a % without two hexadecimal digits. {ENCODE}")
    if "@" in tail or "#" in tail:
        raise ConfigError(f"{source} has an @ or # after the host. {ENCODE}")
    path, _, query = tail.partition("?")
    login, has_login, hosts = authority.rpartition("@")
    user, has_password, password = login.partition(":")
    return Url(
        scheme=scheme,
        hosts=tuple(split_host(one, source) for one in hosts.split(",")) if hosts else (),
        user=_decoded(user, source) if has_login and user else None,
        password=_decoded(password, source) if has_password else None,
        path=_decoded(path, source),
        parameters=_parameters(query, source),
    )


def split_host(text: str, source: str) -> Host:
    """Splits `host`, `host:port`, `[IPv6]`, `[IPv6]:port` or a bare IPv6 address."""
    if _IPV6.fullmatch(text) and text.count(":") > 1:
        return text, None
    bracketed, _, rest = text[1:].partition("]") if text.startswith("[") else (None, "", text)
    if bracketed is not None:
        host, colon, port = _decoded(bracketed, source), rest[:1], rest[1:]
        valid = bool(_IPV6.fullmatch(host)) and colon in {"", ":"}
    else:
        host, colon, port = rest.partition(":")
        host = _decoded(host, source)
        valid = host.startswith("/") or not host or bool(_HOST.fullmatch(host))
    if not valid:
        raise ConfigError(f"{source} has an invalid host. {ENCODE} IPv6 addresses need brackets: [::1].")
    return host, valid_port(port, source) if colon and port else None


def valid_port(text: object, source: str) -> int:
    """Returns a port number. Raises ConfigError without quoting the text."""
    written = str(text).strip()
    if not (written.isascii() and written.isdigit() and 0 < int(written[:6]) <= MAX_PORT):
        raise ConfigError(f"{source} has a port that is not a number from 1 to {MAX_PORT}. {ENCODE}")
    return int(written)


def whole_number(value: object, name: str, source: str) -> int:
    """Returns a number that is not negative. Raises ConfigError without quoting the text."""
    written = str(value)
    if not (written.isascii() and written.isdigit() and len(written) <= MAX_DIGITS):
        raise ConfigError(f"{source}: {name} must be a whole number.")
    return int(written)


def _parameters(query: str, source: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        name, separator, value = part.partition("=")
        if not separator:
            raise ConfigError(f"{source} has a parameter without a value. {ENCODE}")
        found[_decoded(name, source)] = _decoded(value, source)
    return found


def _decoded(text: str, source: str) -> str:
    try:
        return usable(unquote(text, errors="strict"), source)
    except UnicodeDecodeError:
        raise ConfigError(f"{source} has percent-encoded bytes that are not UTF-8.") from None


def usable(text: str, source: str) -> str:
    """Returns a text without NUL characters and lone surrogates. Raises ConfigError without quoting it."""
    if _UNUSABLE.search(text):
        raise ConfigError(f"{source} has a NUL character or a byte that is not UTF-8.")
    return text


def check_parameters(names: Iterable[str], known: Iterable[str], source: str, hint: str) -> None:
    """Raises ConfigError for the first name that is not in `known`.

    It is printed unless it follows a password, of which it may be a part.
    """
    known = set(known)
    after_secret = False
    for name in names:
        if name not in known:
            shown = f" {name!r}" if _PARAMETER.fullmatch(name) and not after_secret else ""
            raise ConfigError(f"{source} has a parameter{shown} that is not supported. {hint}")
        after_secret = after_secret or name in SECRET_PARAMETERS


def host_text(host: str, port: int | None = None) -> str:
    """Formats a host for a URL."""
    written = f"[{host}]" if ":" in host else quote(host, safe="")
    return written if port is None else f"{written}:{port}"


def login_text(user: str | None, password: str | None) -> str:
    """Formats a login for a URL, with a trailing `@`; empty without one."""
    if user is None and password is None:
        return ""
    secret = "" if password is None else f":{quote(password, safe='')}"
    return f"{quote(user or '', safe='')}{secret}@"


def query_text(parameters: Mapping[str, str]) -> str:
    """Formats parameters for a URL, with a leading `?`; empty without any."""
    written = "&".join(
        f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in parameters.items()
    )
    return f"?{written}" if written else ""
