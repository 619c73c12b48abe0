"""Who may ask over HTTP: API keys, of which only SHA-256 hashes are kept, in a file of one line a client.

    # name  hash
    alice   sha256:5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8

Keys hold 256 random bits, so that one fast hash is enough: nobody can guess what it is the hash of.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from router.errors import ConfigError, InputError

PREFIX = "sk-router-"
HASH = "sha256:"
SHORTEST_OWN_KEY_CHARACTERS = 20
ENVIRONMENT_CLIENT = "ROUTER_API_KEY"
CLIENT_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}"
_LINE = re.compile(rf"({CLIENT_PATTERN})\s+{HASH}([0-9a-f]{{64}})")


class ApiKeys:
    """The keys in force. `reload` takes up what the file has become, so that keys come and go at once."""

    def __init__(self, file: Path | None, own_key: str | None = None) -> None:
        """ConfigError names the line or the variable that is wrong. No such file holds no keys."""
        self._file = file
        self._own = {ENVIRONMENT_CLIENT: _hash(_checked(own_key))} if own_key else {}
        self._seen: tuple[int, int] | None = None
        self._hashes: dict[str, str] = {}
        self.reload()

    @property
    def count(self) -> int:
        """How many clients have a key."""
        return len(self._hashes) + len(self._own)

    def client(self, key: str) -> str | None:
        """The name of the client whose key this is, or None; takes as long for any key."""
        asked = _hash(key)
        found = None
        for name, kept in (*self._hashes.items(), *self._own.items()):
            if hmac.compare_digest(asked, kept):
                found = name
        return found

    def reload(self) -> None:
        """Read the file if it has changed. ConfigError if that fails: the keys before stay in force."""
        if self._file is None:
            return
        seen = _version(self._file)
        if seen != self._seen:
            self._hashes = read_keys(self._file)
            self._seen = seen


def read_keys(file: Path) -> dict[str, str]:
    """client -> hash; empty if there is no such file. ConfigError names the line that is wrong."""
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
            raise ConfigError(f"{file}:{number}: must read NAME {HASH}HEX. Use `router keys add NAME`.")
        if match[1] in found:
            raise ConfigError(f"{file}:{number}: {match[1]!r} stands twice.")
        found[match[1]] = match[2]
    return found


def add_key(file: Path, client: str) -> str:
    """Give the client a key, and keep its hash. The key is returned and cannot be had again."""
    if re.fullmatch(CLIENT_PATTERN, client) is None:
        raise InputError(f"{client!r} is no client's name: letters, digits, . _ @ - and at most 64 of them.")
    key = PREFIX + secrets.token_urlsafe(32)
    with _locked(file):
        keys = read_keys(file)
        if client in keys:
            raise InputError(f"{client!r} has a key. Take it away first: router keys remove {client}")
        _write(file, {**keys, client: _hash(key)})
    return key


def remove_key(file: Path, client: str) -> None:
    """Take the client's key away. InputError if it has none."""
    with _locked(file):
        keys = read_keys(file)
        if client not in keys:
            raise InputError(f"{client!r} has no key in {file}. See `router keys list`.")
        _write(file, {name: kept for name, kept in keys.items() if name != client})


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Alone with the file: of two who change it at once neither undoes what the other did."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(file.parent, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error}") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _write(file: Path, keys: Mapping[str, str]) -> None:
    # Replaced as a whole: a server that reads it meanwhile finds the old or the new one.
    text = "".join(f"{name} {HASH}{kept}\n" for name, kept in keys.items())
    try:
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
                if file.exists():  # whoever could read it still can: a server under another user's name
                    before = file.stat()
                    os.chown(handle, before.st_uid, before.st_gid)
                    Path(name).chmod(before.st_mode & 0o777)
            Path(name).replace(file)
        finally:
            Path(name).unlink(missing_ok=True)
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
    if len(key) < SHORTEST_OWN_KEY_CHARACTERS or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"{ENVIRONMENT_CLIENT} must have at least {SHORTEST_OWN_KEY_CHARACTERS} characters, such as"
            " a header can carry. Make one: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return key
