"""Added sources: files whose entries are stored in Postgres, from where every host indexes them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from router.database import Connection, rows
from router.knowledge.files import KnowledgeFile

_ADD = "SELECT add_knowledge(%s, %s, %s::text[], %s::text[], %s::text[]) AS change"
_SOURCES = """
SELECT k.source, count(e.place) AS entries, k.changed_at
  FROM knowledge_sources k JOIN knowledge_entries e USING (source)
 GROUP BY k.source, k.changed_at ORDER BY k.source"""
_REMOVE = """
SELECT k.source, remove_knowledge(k.source) AS removed FROM knowledge_sources k
 WHERE k.checksum IS NOT NULL AND (k.source = %s OR starts_with(k.source, %s)) ORDER BY k.source"""

_REMOVE_MISSING = """
SELECT k.source, remove_knowledge(k.source) AS removed FROM knowledge_sources k
 WHERE k.checksum IS NOT NULL AND starts_with(k.source, %s) AND k.source <> ALL (%s) ORDER BY k.source"""


@dataclass(frozen=True, slots=True)
class Source:
    """An added file: its path, its number of entries, and when it last changed."""

    source: str
    entries: int
    changed_at: datetime


def add_file(connection: Connection, path: Path, file: KnowledgeFile) -> str:
    """Stores `file` in place of what `path` contained before; returns added, replaced or unchanged."""
    entries = file.entries
    found = rows(
        connection,
        _ADD,
        (
            source_name(path),
            f"{file.checksum} {entries[0].source}",
            [entry.source for entry in entries],
            [entry.title for entry in entries],
            [entry.text for entry in entries],
        ),
    )
    return str(found[0]["change"])


def remove_path(connection: Connection, path: Path) -> list[str]:
    """Removes the source `path`, or all sources below this folder; returns their names."""
    name = source_name(path)
    return [row["source"] for row in rows(connection, _REMOVE, (name, f"{name.rstrip('/')}/"))]


def remove_missing(connection: Connection, folder: Path, present: Iterable[Path]) -> list[str]:
    """Removes the sources below `folder` that are not among the files `present`; returns their names."""
    arguments = (f"{source_name(folder).rstrip('/')}/", [source_name(path) for path in present])
    return [row["source"] for row in rows(connection, _REMOVE_MISSING, arguments)]


def read_sources(connection: Connection) -> list[Source]:
    """Returns all sources, ordered by path."""
    return [Source(**row) for row in rows(connection, _SOURCES)]


def source_name(path: Path) -> str:
    """Returns the absolute path, whether the file still exists or not."""
    return str(path.expanduser().resolve())
