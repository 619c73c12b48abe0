"""Knowledge that people add, in Postgres: files in, files out. Every host's index follows from there."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from router.database import Connection, rows
from router.knowledge.files import KnowledgeFile

_ADD = "SELECT add_knowledge(%s, %s, %s::text[], %s::text[], %s::text[]) AS became"
_SOURCES = """
SELECT k.source, count(e.place) AS entries, k.changed_at
  FROM knowledge_sources k JOIN knowledge_entries e USING (source)
 GROUP BY k.source, k.changed_at ORDER BY k.source"""
_REMOVE = """
SELECT k.source, remove_knowledge(k.source) AS removed FROM knowledge_sources k
 WHERE k.checksum IS NOT NULL AND (k.source = %s OR starts_with(k.source, %s)) ORDER BY k.source"""


@dataclass(frozen=True, slots=True)
class Source:
    """A file that was added: its path, how many entries it gave, and when."""

    source: str
    entries: int
    changed_at: datetime


def add_file(connection: Connection, path: Path, file: KnowledgeFile) -> str:
    """Let the entries of `file` be what is known from `path`; returns added, replaced or unchanged."""
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
    return str(found[0]["became"])


def remove_path(connection: Connection, path: Path) -> list[str]:
    """Forget what was added from this file, or from all files beneath this folder; returns their paths."""
    name = source_name(path)
    return [row["source"] for row in rows(connection, _REMOVE, (name, f"{name.rstrip('/')}/"))]


def read_sources(connection: Connection) -> list[Source]:
    """All files that were added, by path."""
    return [Source(**row) for row in rows(connection, _SOURCES)]


def source_name(path: Path) -> str:
    """The same for every way of writing one path, whether it still exists or not."""
    return str(path.expanduser().resolve())
