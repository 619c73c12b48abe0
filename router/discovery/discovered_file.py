"""`config/discovered.yaml`: the models that the search found, written by it alone, whole and at once.

The file follows from the roster in Postgres, so that writing it again is always right: what a death left
unwritten is written by whoever comes next. Without such models there is no file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from router.errors import ConfigError
from router.settings import DISCOVERED, load_config

HEADER = """\
# The models that the search found, with when, by whom and why each was taken on, promoted or retired. Only
# the search writes this file, anew each time, from the roster. To change a model use `router models promote`,
# `retire` or `undo`. To make one yours, copy its entry to models.yaml without its history, with the state
# active: where both files name a model, that one wins.
"""
LINE_WIDTH = 110
LOCK_SECONDS = 10.0
LOOK_SECONDS = 0.05


def require_writable(folder: Path) -> None:
    """ConfigError if the search could not write `discovered.yaml`, or could not read what is beside it."""
    problem = load_config(folder).discovered_problem
    if problem is not None:
        raise ConfigError(problem)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{DISCOVERED}."):
            pass
    except OSError as error:
        raise ConfigError(
            f"{folder / DISCOVERED} cannot be written: {error.strerror}. Nothing was changed. Let the search"
            " write into that folder, or set ROUTER_CONFIG to one that it can write into."
        ) from error


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Nobody else writes the file meanwhile. ConfigError if somebody else is at it for LOCK_SECONDS."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(handle, folder)
        yield
    finally:
        os.close(handle)  # which ends the lock, too


def _lock(handle: int, folder: Path) -> None:
    until = time.monotonic() + LOCK_SECONDS
    while not _locked(handle):
        if time.monotonic() > until:
            raise ConfigError(f"Somebody else is writing {folder / DISCOVERED}. Try again.")
        time.sleep(LOOK_SECONDS)


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_discovered(folder: Path, models: list[dict[str, Any]]) -> bool:
    """Write rows of the view `discovered_models` as the file; without any there is none. Tells if it changed.

    Whoever reads it meanwhile reads the whole old file or the whole new one. Call it within `writing`.
    """
    path = folder / DISCOVERED
    before = path.read_bytes() if path.exists() else None
    if not models:
        path.unlink(missing_ok=True)
        return before is not None
    content = rendered(models).encode()
    if content == before:
        return False
    handle, name = tempfile.mkstemp(dir=folder, prefix=f".{DISCOVERED}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), 0o644)  # others who start the router read it, too
            os.fsync(file.fileno())
        os.replace(name, path)  # noqa: PTH105 - says that it replaces
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)  # noqa: PTH108 - a name, not a path
        raise
    return True


def rendered(models: list[dict[str, Any]]) -> str:
    """The file's text: the same for the same rows, whatever their order."""
    entries = {row["model"]: _entry(row) for row in sorted(models, key=_taken_at)}
    body = yaml.safe_dump({"models": entries}, sort_keys=False, allow_unicode=True, width=LINE_WIDTH)
    return HEADER + body


def _taken_at(row: Mapping[str, Any]) -> tuple[str, str]:
    return min((change["at"] for change in row["history"]), default=""), row["model"]


def _entry(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "endpoint": row["endpoint"],
        "state": row["state"],
        "target": row["default_target"],
        "ranks": dict(sorted((row["ranks"] or {}).items())),
        "context_tokens": row["context_tokens"],
        "max_tokens": row["max_tokens"],
        "timeout_seconds": row["timeout_seconds"],
        "input_price": row["input_price"],
        "output_price": row["output_price"],
        "history": [{key: change[key] for key in ("what", "at", "by", "why")} for change in row["history"]],
    }
