"""Files of knowledge: which there are in a folder, and what they hold."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from router.errors import InputError
from router.knowledge.chunking import TEXT_SUFFIXES, Entry, file_entries, text_of

MOST_BYTES = 128 * 1024 * 1024

Stamp = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, slots=True)
class KnowledgeFile:
    """A file's entries, and the checksum of what it holds."""

    key: str
    checksum: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """A file that holds nothing that could be found, and why."""

    path: Path
    why: str

    def __str__(self) -> str:
        return f"{self.path} {self.why}."


def files_in(folder: Path) -> list[Path]:
    """The files beneath `folder` in order, hidden ones and those in hidden folders left out."""
    found = (path for path in folder.rglob("*") if _is_file(path))
    return sorted(
        path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # in a folder that may be listed, and not entered
        return False


def stamp(folder: Path) -> Stamp:
    """Differs once a file in `folder` was added, changed or removed."""
    stamps = []
    for path in files_in(folder):
        try:
            status = path.stat()
        except OSError:
            continue  # removed since it was listed
        stamps.append((str(path), status.st_size, status.st_mtime_ns))
    return tuple(stamps)


def read_file(path: Path, *, key: str, name: str) -> KnowledgeFile:
    """What the file holds, shown to people under `name`. InputError names the file and what is wrong."""
    try:
        content = _content(path)
        entries = tuple(file_entries(key, name, text_of(content)))
    except InputError as error:
        raise InputError(f"{path} {error}.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    if not entries:
        raise InputError(f"{path} holds headings only.")
    return KnowledgeFile(key, hashlib.sha256(content).hexdigest(), entries)


def _content(path: Path) -> bytes:
    if path.suffix.lower() not in TEXT_SUFFIXES:
        raise InputError(f"is none of {', '.join(TEXT_SUFFIXES)}")
    if path.stat().st_size > MOST_BYTES:
        raise InputError(f"is larger than {MOST_BYTES // 2**20} MB; split it")
    return path.read_bytes()


def read_folder(folder: Path) -> Iterator[KnowledgeFile | Refused]:
    """Every file of `folder`, read or refused; nothing if there is no such folder."""
    for path in files_in(folder) if folder.is_dir() else ():
        name = path.relative_to(folder).as_posix()
        try:
            yield read_file(path, key=f"file:{name}", name=name)
        except InputError as error:
            yield Refused(path, str(error).removeprefix(f"{path} ").removesuffix("."))
