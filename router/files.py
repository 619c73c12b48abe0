"""Files: reading JSON Lines, atomic replacement, locks between processes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from router.errors import ConfigError, RouterError

LOCK_POLL_SECONDS = 0.05


def json_lines(
    path: Path, *, error: type[RouterError] = ConfigError, max_bytes: int | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, object) for each line that is not blank; a place reads `FILE, line N`.

    Raises `error` if the file cannot be read, is larger than `max_bytes`, or a line is not a JSON object.
    """
    try:
        if max_bytes is not None and path.stat().st_size > max_bytes:
            raise error(f"{path} is larger than {max_bytes:,} bytes. Split it.")
        with path.open(encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    place = f"{path}, line {number}"
                    yield place, _json_object(line, place, error)
    except FileNotFoundError as missing:
        raise error(f"{path} does not exist.") from missing
    except (OSError, UnicodeDecodeError) as unreadable:
        raise error(f"{path} cannot be read as UTF-8 text: {unreadable}") from unreadable


def _json_object(line: str, place: str, error: type[RouterError]) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as invalid:
        raise error(f"{place}: not valid JSON: {invalid}") from invalid
    if not isinstance(found, dict):
        raise error(f"{place}: must be a JSON object, not {type(found).__name__}")
    return found


@contextlib.contextmanager
def replacing(path: Path, *, mode: int | None = None) -> Iterator[IO[bytes]]:
    """Yields a temporary file that replaces `path` at the end of the block; an error leaves `path` unchanged.

    Readers see the complete old file or the complete new one. Owner and mode of `path` are preserved, unless
    `mode` is given. Raises OSError.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    fresh = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            if path.exists():
                before = path.stat()
                os.fchmod(handle, before.st_mode & 0o777)
                with contextlib.suppress(PermissionError):
                    os.fchown(handle, before.st_uid, before.st_gid)
            if mode is not None:
                os.fchmod(handle, mode)
            yield file
            file.flush()
            os.fsync(handle)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, *, timeout_seconds: float | None = None) -> Iterator[bool]:
    """Locks an existing file or folder for the block; yields False if it was not free within the timeout.

    Without a timeout it waits indefinitely. The lock ends with the process.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        yield _acquired(handle, timeout_seconds)
    finally:
        os.close(handle)


def _acquired(handle: int, timeout_seconds: float | None) -> bool:
    if timeout_seconds is None:
        fcntl.flock(handle, fcntl.LOCK_EX)
        return True
    deadline = time.monotonic() + timeout_seconds
    while not (acquired := _try(handle)) and time.monotonic() < deadline:
        time.sleep(LOCK_POLL_SECONDS)
    return acquired


def _try(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
