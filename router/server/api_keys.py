"""API keys of the HTTP clients. A file stores one client per line, with the SHA-256 hash of its key:

    # name  hash
    alice   sha256:5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8

Keys hold 256 random bits, so a fast hash is enough: they cannot be guessed.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from router.errors import ConfigError, InputError, echoed
from router.files import locked, replacing
from router.task import CLIENT_PATTERN

PREFIX = "sk-router-"
HASH = "sha256:"
MIN_KEY_CHARACTERS = 20
ENVIRONMENT_CLIENT = "ROUTER_API_KEY"
_LINE = re.compile(rf"({CLIENT_PATTERN})\s+{HASH}([0-9a-f]{{64}})")


class ApiKeys:
    """Keys of a file, and one from the environment. `reload` applies changes of the file."""

    def __init__(self, file: Path | None, environment_key: str | None = None) -> None:
        """A missing file has no keys. Raises ConfigError for an invalid line or variable."""
        self._file = file
        self._from_environment = (
            {ENVIRONMENT_CLIENT: _hash(_checked(environment_key))} if environment_key else {}
        )
        self._version: tuple[int, int] | None = None
        self._hashes: dict[str, str] = {}
        self.reload()

    @property
    def count(self) -> int:
        """Number of clients that have a key."""
        return len(self._hashes) + len(self._from_environment)

    def client(self, key: str) -> str | None:
        """Returns the client that owns the key, or None. Takes the same time for any key."""
        hashed = _hash(key)
        found = None
        for name, stored in (*self._hashes.items(), *self._from_environment.items()):
            if hmac.compare_digest(hashed, stored):
                found = name
        return found

    def reload(self) -> None:
        """Reads the file if it has changed. Raises ConfigError if it is invalid; the keys stay unchanged."""
        if self._file is None:
            return
        version = _version(self._file)
        if version != self._version:
            self._hashes = read_keys(self._file)
            self._version = version


def read_keys(file: Path) -> dict[str, str]:
    """Returns client -> hash; empty if the file does not exist. Raises ConfigError for an invalid line."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    found: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise ConfigError(f"{file}:{number}: must be NAME {HASH}HEX. Use `router keys add NAME`.")
        if match[1] in found:
            raise ConfigError(f"{file}:{number}: duplicate client {match[1]!r}.")
        found[match[1]] = match[2]
    return found


def add_key(file: Path, client: str) -> str:
    """Creates a key for the client and stores its hash. The returned key cannot be shown again."""
    if re.fullmatch(CLIENT_PATTERN, client) is None:
        raise InputError(
            f"{echoed(client)} is not a valid client name. Use letters, digits and . _ @ -, at most 64"
            " characters."
        )
    key = PREFIX + secrets.token_urlsafe(32)
    with _editing(file) as keys:
        if client in keys:
            raise InputError(
                f"{echoed(client)} already has a key. Remove it first: router keys remove {client}"
            )
        keys[client] = _hash(key)
    return key


def remove_key(file: Path, client: str) -> None:
    """Removes the client's key. Raises InputError if there is none."""
    with _editing(file) as keys:
        if client not in keys:
            raise InputError(f"{echoed(client)} has no key in {file}. See `router keys list`.")
        del keys[client]


@contextmanager
def _editing(file: Path) -> Iterator[dict[str, str]]:
    """Yields the keys of the file under a lock, and writes them back unless the block fails."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.parent):
            keys = read_keys(file)
            yield keys
            with replacing(file) as stream:
                stream.writelines(f"{name} {HASH}{stored}\n".encode() for name, stored in keys.items())
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error}") from error


def _version(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _checked(key: str) -> str:
    if len(key) < MIN_KEY_CHARACTERS or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"{ENVIRONMENT_CLIENT} must have at least {MIN_KEY_CHARACTERS} characters: printable ASCII,"
            " no spaces. Create one: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return key
