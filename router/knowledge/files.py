"""Reads knowledge files: lists a folder, and splits each file into entries."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from router.errors import InputError
from router.knowledge.chunking import TEXT_SUFFIXES, Entry, decode_text, file_entries

MAX_BYTES = 128 * 1024 * 1024

Stamp = tuple[tuple[str, int, int], ...]  # path, size and modification time of each file


@dataclass(frozen=True, slots=True)
class KnowledgeFile:
    """Entries of one file, and the SHA-256 of its content."""

    key: str
    checksum: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class RejectedFile:
    """A file without usable text, and the reason."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path} {self.reason}."


def files_in(folder: Path) -> list[Path]:
    """Lists the files below `folder`, sorted; skips hidden files and hidden folders."""
    found = (path for path in folder.rglob("*") if _is_file(path))
    return sorted(
        path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # inside a folder that may be listed but not entered
        return False


def stamp(folder: Path) -> Stamp:
    """Returns a value that differs once a file in `folder` was added, changed or removed."""
    stamps = []
    for path in files_in(folder):
        try:
            status = path.stat()
        except OSError:
            continue  # removed since it was listed
        stamps.append((str(path), status.st_size, status.st_mtime_ns))
    return tuple(stamps)


def read_file(path: Path, *, key: str, name: str, within: Path | None = None) -> KnowledgeFile | RejectedFile:
    """Reads and splits one file; its passages are displayed under `name`.

    With `within`, a symbolic link that leads out of this folder is rejected.
    """
    try:
        if within is not None and not path.resolve().is_relative_to(within.resolve()):
            return RejectedFile(path, f"is a symbolic link out of the folder, to {path.resolve()}")
        content = _content(path)
        entries = tuple(file_entries(key, name, decode_text(content)))
    except InputError as error:
        return RejectedFile(path, str(error))
    except OSError as error:
        return RejectedFile(path, f"cannot be read: {error.strerror}")
    if not entries:
        return RejectedFile(path, "contains only headings")
    return KnowledgeFile(key, hashlib.sha256(content).hexdigest(), entries)


def _content(path: Path) -> bytes:
    if path.suffix.lower() not in TEXT_SUFFIXES:
        raise InputError(f"has none of the suffixes {', '.join(TEXT_SUFFIXES)}")
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"is larger than {MAX_BYTES // 2**20} MB; split it")
    return path.read_bytes()


def read_folder(folder: Path) -> Iterator[KnowledgeFile | RejectedFile]:
    """Reads every file of `folder`; yields nothing if the folder does not exist."""
    for path in files_in(folder) if folder.is_dir() else ():
        name = path.relative_to(folder).as_posix()
        yield read_file(path, key=f"file:{name}", name=name, within=folder)
