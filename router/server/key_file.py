"""File of API keys: one key per line, with the SHA-256 hash of the key and what it allows.

    # client  hash  options
    alice  sha256:5e884898da28...  {"created": "2026-01-31T12:00:00Z", "expires": "2026-05-01T12:00:00Z"}

Options are `created`, `expires`, `models` and `limit` (a traffic target); a line without them, as older
versions wrote it, is a key that is not restricted. A key's id is the beginning of its hash. Keys hold 256
random bits, so a fast hash is enough: they cannot be guessed.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from router.errors import ConfigError, InputError, echoed
from router.files import locked, replacing
from router.settings import MODEL_NAME_PATTERN
from router.task import CLIENT_PATTERN
from router.traffic import TrafficTarget

PREFIX = "sk-router-"
HASH = "sha256:"
ID_CHARACTERS = 8
MAX_VALID_KEYS = 2  # of one client: the one in use and its successor
USED_SUFFIX = ".used"  # the times of last use are in a file of their own, which the server writes
_LINE = re.compile(rf"({CLIENT_PATTERN})\s+{HASH}([0-9a-f]{{64}})(?:\s+(\{{.*\}}))?\s*(?:#.*)?")


def _target(line: Any) -> Any:
    return TrafficTarget.parse(line) if isinstance(line, str) else line


class _Options(BaseModel):
    """What a line says besides client and hash."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    created: AwareDatetime | None = None
    expires: AwareDatetime | None = None
    models: tuple[Annotated[str, Field(pattern=MODEL_NAME_PATTERN)], ...] | None = None
    limit: Annotated[TrafficTarget | None, BeforeValidator(_target)] = None


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key without its secret. With `models` None it may use every model."""

    client: str
    hash: str
    created: datetime | None = None
    expires: datetime | None = None
    models: tuple[str, ...] | None = None
    limit: TrafficTarget | None = None

    @property
    def id(self) -> str:
        return self.hash[:ID_CHARACTERS]

    def is_expired(self, now: datetime | None = None) -> bool:
        """Returns whether the key has expired."""
        return self.expires is not None and self.expires <= (now or _now())

    def line(self) -> str:
        """Formats the key as a line of the file."""
        options = {
            "created": _time_text(self.created),
            "expires": _time_text(self.expires),
            "models": self.models,
            "limit": None if self.limit is None else str(self.limit),
        }
        given = {name: value for name, value in options.items() if value is not None}
        return f"{self.client} {HASH}{self.hash}{f' {json.dumps(given)}' if given else ''}\n"


def read_keys(file: Path) -> list[StoredKey]:
    """Returns the keys, oldest first; none without a file. Raises ConfigError for an invalid line."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    found: dict[str, StoredKey] = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        key = _read_line(text, f"{file}:{number}")
        if key.hash in found:
            raise ConfigError(f"{file}:{number}: duplicate key of {found[key.hash].client!r}.")
        found[key.hash] = key
    return list(found.values())


def _read_line(text: str, place: str) -> StoredKey:
    match = _LINE.fullmatch(text)
    if match is None:
        raise ConfigError(f"{place}: must be NAME {HASH}HEX [OPTIONS]. Use `router keys add NAME`.")
    try:
        options = _Options.model_validate_json(match[3] or "{}")
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{place}: {where}: {first['msg'].splitlines()[0]}") from error
    return StoredKey(match[1], match[2], **dict(options))


def add_key(
    file: Path, client: str, *, rotate: bool = False, expires: datetime | None = None,
    models: Sequence[str] | None = None, limit: TrafficTarget | None = None,
) -> str:  # fmt: skip
    """Creates a key for the client and stores its hash. The returned key cannot be shown again.

    With `rotate` the client may have a key already: both are valid until the old one is removed or expires,
    and the new one takes over its models and limit unless others are given. Raises InputError.
    """
    if re.fullmatch(CLIENT_PATTERN, client) is None:
        raise InputError(
            f"{echoed(client)} is not a valid client name. Use letters, digits and . _ @ -, at most 64"
            " characters."
        )
    secret = PREFIX + secrets.token_urlsafe(32)
    with _editing(file) as keys:
        now = _now().replace(microsecond=0)
        keys[:] = [key for key in keys if key.client != client or not key.is_expired(now)]
        own = [key for key in keys if key.client == client]
        _check_room(client, own, rotate=rotate)
        old = own[-1] if own else None
        chosen = None if models is None else tuple(models)
        new = StoredKey(client, hash_of(secret), now, expires, chosen, limit)
        if old is not None:
            new = replace(new, models=new.models or old.models, limit=new.limit or old.limit)
        keys.append(new)
    return secret


def _check_room(client: str, own: Sequence[StoredKey], *, rotate: bool) -> None:
    if own and not rotate:
        raise InputError(
            f"{client!r} already has a key. Add a second one: router keys add {client} --rotate. Or remove it"
            f" first: router keys remove {client}"
        )
    if len(own) >= MAX_VALID_KEYS:
        raise InputError(
            f"{client!r} has {len(own)} valid keys, the maximum. Remove the old one first:"
            f" router keys remove {client} --id {own[0].id}"
        )


def remove_keys(file: Path, client: str, key_id: str | None = None) -> int:
    """Removes the client's keys, or the one with this id. Raises InputError if there is none."""
    with _editing(file) as keys:
        gone = [key for key in keys if key.client == client and key_id in {None, key.id}]
        if not gone:
            which = f"no key {echoed(key_id)}" if key_id else "no key"
            raise InputError(f"{echoed(client)} has {which} in {file}. See `router keys list`.")
        keys[:] = [key for key in keys if key not in gone]
    return len(gone)


def key_limits(keys: Iterable[StoredKey]) -> Mapping[str, TrafficTarget]:
    """Returns client -> limit of its newest key that has one and is valid."""
    now = _now()
    return {key.client: key.limit for key in keys if key.limit and not key.is_expired(now)}


def read_last_used(file: Path) -> dict[str, datetime]:
    """Returns key id -> time of last use, by the minute; empty if the server has written none."""
    try:
        found = json.loads(_used_file(file).read_text(encoding="utf-8"))
        return {str(key_id): datetime.fromisoformat(at) for key_id, at in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def write_last_used(file: Path, used: Mapping[str, datetime]) -> None:
    """Adds times of last use to those of other servers; drops those of removed keys. Raises OSError."""
    with locked(file.parent):
        known = {key.id for key in read_keys(file)}
        stored = read_last_used(file)
        newest = {key_id: max(at, stored.get(key_id, at)) for key_id, at in used.items()}
        with replacing(_used_file(file)) as stream:
            kept = {key_id: at for key_id, at in {**stored, **newest}.items() if key_id in known}
            stream.write(json.dumps({key_id: at.isoformat() for key_id, at in kept.items()}).encode())


def hash_of(secret: str) -> str:
    """Returns the hash that is stored for a key."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def expiry(seconds: float) -> datetime:
    """Returns the time that is so far ahead, to the second. Raises InputError if it is out of range."""
    try:
        return (_now() + timedelta(seconds=seconds)).replace(microsecond=0)
    except OverflowError as error:
        raise InputError("--expires is too far ahead. Give e.g. 90d.") from error


def _used_file(file: Path) -> Path:
    return file.with_name(file.name + USED_SUFFIX)


@contextmanager
def _editing(file: Path) -> Iterator[list[StoredKey]]:
    """Yields the keys of the file under a lock, and writes them back unless the block fails."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.parent):
            keys = read_keys(file)
            yield keys
            with replacing(file) as stream:
                stream.writelines(key.line().encode() for key in keys)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error}") from error


def _time_text(at: datetime | None) -> str | None:
    return None if at is None else at.astimezone(timezone.utc).isoformat().replace("+00:00", "Z")


def _now() -> datetime:
    return datetime.now(timezone.utc)
