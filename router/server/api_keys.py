"""Authenticates the HTTP clients by their API keys: those of a file, and one from the environment."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

from router.errors import ConfigError
from router.server.key_file import StoredKey, hash_of, key_limits, read_keys, write_last_used
from router.traffic import TrafficTarget

MIN_KEY_CHARACTERS = 20
ENVIRONMENT_CLIENT = "ROUTER_API_KEY"


class ApiKeys:
    """Keys of a file, and one from the environment. `reload` applies changes of the file."""

    def __init__(self, file: Path | None, environment_key: str | None = None) -> None:
        """A missing file has no keys. Raises ConfigError for an invalid line or variable."""
        self._file = file
        self._from_environment = (
            (StoredKey(ENVIRONMENT_CLIENT, hash_of(_checked(environment_key))),) if environment_key else ()
        )
        self._version: tuple[int, int] | None = None
        self._keys: tuple[StoredKey, ...] = ()
        self._used: dict[str, datetime] = {}
        self.reload()

    @property
    def count(self) -> int:
        """Number of clients that have a key."""
        return len({key.client for key in (*self._keys, *self._from_environment)})

    def find(self, key: str) -> StoredKey | None:
        """Returns the stored key, even if it has expired, or None. Takes the same time for any key."""
        hashed = hash_of(key)
        found = None
        for stored in (*self._keys, *self._from_environment):
            if hmac.compare_digest(hashed, stored.hash):
                found = stored
        if found is not None and not found.is_expired():
            self._used[found.id] = datetime.now(timezone.utc)
        return found

    def reload(self) -> None:
        """Reads the file if it has changed. Raises ConfigError if it is invalid; the keys stay unchanged."""
        if self._file is None:
            return
        version = _version(self._file)
        if version != self._version:
            self._keys = tuple(read_keys(self._file))
            self._version = version

    def limits(self) -> Mapping[str, TrafficTarget]:
        """Returns client -> limit of its newest valid key that has one."""
        return key_limits(self._keys)

    def store_last_used(self) -> None:
        """Writes when each key was last used since the last call. Raises ConfigError if that fails."""
        used, self._used = self._used, {}
        if self._file is None or not used:
            return
        try:
            write_last_used(self._file, used)
        except OSError as error:
            text = f"When keys were last used cannot be stored next to {self._file}: {error}"
            raise ConfigError(text) from error


def _version(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def _checked(key: str) -> str:
    if len(key) < MIN_KEY_CHARACTERS or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"{ENVIRONMENT_CLIENT} must have at least {MIN_KEY_CHARACTERS} characters: printable ASCII,"
            " no spaces. Create one: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return key
