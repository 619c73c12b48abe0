"""Brings a host's index of knowledge up to what config/knowledge and Postgres hold; a program of its own.

    ROUTER_DATABASE_URL=... python -m router.knowledge.indexer INDEX_FOLDER KNOWLEDGE_FOLDER

Making entries keeps an interpreter busy, so it is never done in one that serves. One pass: files that
changed, sources that were added or removed, tasks that were solved since, and a slice of all tasks, newest
first, in a circle: the first round fills the index, later ones find what was missed and what people deleted.
Of several passes on one host one works, and the others leave. Prints what it did as one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from router.database import Connection, connect, rows
from router.errors import RouterError
from router.knowledge.chunking import Entry, task_entry, task_key
from router.knowledge.files import Refused, read_folder
from router.knowledge.index import Writer
from router.knowledge.storage import LARGEST, IndexFolder, State

MOST_ENTRIES = 1_000_000
SLICE = 5000
COMMIT_EVERY = 50_000
OVERLAP_SECONDS = 15.0  # a task is solved a moment before others can see it
NICENESS = 10

_TEXTS = (
    "SELECT id, left(prompt, 4000) AS prompt, left(answer, 8000) AS answer FROM tasks WHERE id = ANY (%s)"
)
_SOURCES = (
    "SELECT source, version, checksum IS NULL AS removed FROM knowledge_sources"
    " WHERE version > %s ORDER BY version LIMIT 1"
)
_ENTRIES = (
    "SELECT place, shown_source, title, body FROM knowledge_entries"
    " WHERE source = %s AND place > %s ORDER BY place LIMIT %s"
)


@dataclass
class IndexReport:
    """What one pass did."""

    entries: int = 0
    added: int = 0
    forgotten: int = 0
    refused: list[str] = field(default_factory=list)
    busy: bool = False  # another pass of this host is at it
    seconds: float = 0.0


class Indexer:
    """One pass over everything."""

    def __init__(
        self,
        folder: IndexFolder,
        connection: Connection,
        *,
        tasks: bool = True,
        most: int = MOST_ENTRIES,
        each: int = SLICE,
    ) -> None:
        self._folder = folder
        self._connection = connection
        self._tasks = tasks
        self._most = most
        self._each = each
        self._index = folder.open_index()
        # Where there was no index an empty one was made, whatever the state says that it holds.
        self._state = folder.state() if len(self._index) else State()
        self._caught = IndexReport()
        self._unsaved = 0

    def run(self, knowledge_folder: Path) -> IndexReport:
        began = time.monotonic()
        now = rows(self._connection, "SELECT * FROM knowledge_state()")[0]
        with self._index.writing() as writer:
            self._writer: Writer = writer
            if self._state.identity != now["identity"]:
                writer.forget_all()
                self._state = State(identity=now["identity"])
                self._unsaved += 1
                self._save()  # what is looked up below must not be there any more
            self._files(knowledge_folder)
            self._sources()
            if self._tasks:
                self._solved_since(now["now"])
                self._walk()
                self._save()
                self._trim()
            self._save()
        self._caught.entries = len(self._index)
        self._caught.seconds = round(time.monotonic() - began, 3)
        return self._caught

    def _files(self, folder: Path) -> None:
        found: dict[str, str] = {}
        for file in read_folder(folder):
            if isinstance(file, Refused):
                self._caught.refused.append(str(file))
                continue
            found[file.key] = file.checksum
            if self._state.files.get(file.key) != file.checksum:
                self._replace(file.key, file.entries)
        for key in self._state.files.keys() - found.keys():
            self._replace(key, ())
        self._state.files = found

    def _sources(self) -> None:
        while found := rows(self._connection, _SOURCES, (self._state.version,)):
            self._replace(f"added:{found[0]['source']}", self._entries_of(found[0]["source"]))
            self._state.version = found[0]["version"]

    def _entries_of(self, source: str) -> Iterator[Entry]:
        place = 0
        while found := rows(self._connection, _ENTRIES, (source, place, self._each)):
            for row in found:
                yield Entry(f"added:{source}", row["shown_source"], row["title"], row["body"])
            place = found[-1]["place"]

    def _solved_since(self, now: float) -> None:
        """Tasks solved since the last pass; before the first circle there is nothing to go on from."""
        since, after = self._state.solved_until, -LARGEST
        while since:
            found = self._ids("SELECT id FROM knowledge_since(%s, %s, %s)", since, after, self._each)
            if not found:
                break
            self._take(found)
            after = found[-1]
        self._state.solved_until = now - OVERLAP_SECONDS

    def _walk(self) -> None:
        """The next slice of the circle; all of it, down to what the index has room for, the first time."""
        while True:
            last_of_circle = self._walk_slice()
            self._state.circles += last_of_circle
            if len(self._index) + self._unsaved >= self._most and not self._state.circles:
                self._state.floor, self._state.walk_from = self._state.walk_from + 1, LARGEST
                self._state.circles = 1
            if self._state.circles:
                return

    def _walk_slice(self) -> bool:
        state = self._state
        found = rows(
            self._connection,
            "SELECT * FROM knowledge_slice(%s, %s, %s)",
            (state.walk_from, state.floor, self._each),
        )
        lowest = found[-1]["id"] if len(found) == self._each else state.floor
        known = {row["id"] for row in found if row["known"]}
        there = self._index.task_ids(lowest, state.walk_from)
        for task_id in there - known:
            self._replace(task_key(task_id), ())
        self._take(sorted(known - there))
        at_the_end = lowest == state.floor
        state.walk_from = LARGEST if at_the_end else lowest - 1
        return at_the_end

    def _take(self, task_ids: Sequence[int]) -> None:
        for start in range(0, len(task_ids), self._each):
            some = list(task_ids[start : start + self._each])
            for row in rows(self._connection, _TEXTS, (some,)):
                self._replace(
                    task_key(row["id"]), (task_entry(row["id"], row["prompt"], row["answer"] or ""),)
                )
            if self._unsaved >= COMMIT_EVERY:
                self._save()

    def _trim(self) -> None:
        """Make room by forgetting the tasks with the lowest numbers; they are not looked at again."""
        excess = len(self._index) - self._most
        if excess <= 0:
            return
        oldest = self._index.oldest_tasks(excess)
        for task_id in oldest:
            self._replace(task_key(task_id), ())
        if oldest:
            self._state.floor = oldest[-1] + 1

    def _ids(self, statement: str, *arguments: object) -> list[int]:
        return [int(row["id"]) for row in rows(self._connection, statement, arguments)]

    def _replace(self, key: str, entries: Iterator[Entry] | Sequence[Entry]) -> None:
        """Let exactly these be the key's entries. Doing it twice is the same as once."""
        self._writer.forget(key)
        self._unsaved += 1
        added = 0
        for entry in entries:
            self._writer.add(entry)
            added += 1
        self._unsaved += added
        self._caught.added += added
        self._caught.forgotten += added == 0

    def _save(self) -> None:
        """Commit, and only then note it: after a crash what is done twice does no harm."""
        if self._unsaved:
            self._writer.commit()
            self._index.reload()
            self._unsaved = 0
        self._folder.keep(self._state)


def catch_up(
    folder: Path, knowledge_folder: Path, database_url: str, *, tasks: bool = True, most: int = MOST_ENTRIES
) -> IndexReport:
    """One pass; `busy` if another one of this host is at it. Raises RouterError."""
    home = IndexFolder(folder)
    with home.alone() as alone:
        if not alone:
            return IndexReport(busy=True)
        home.drop_unused()
        with connect(database_url, autocommit=True) as connection:
            return Indexer(home, connection, tasks=tasks, most=most).run(knowledge_folder)


def main() -> None:
    """Entry point of the child process; exit code 1, with one line on standard error, on failure."""
    parser = argparse.ArgumentParser(
        prog="router.knowledge.indexer", description="Bring the index of knowledge up to date."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("knowledge", type=Path)
    parser.add_argument("--no-tasks", action="store_true")
    parser.add_argument("--most", type=int, default=MOST_ENTRIES)
    chosen = parser.parse_args()
    os.nice(NICENESS)
    try:
        caught = catch_up(
            chosen.folder, chosen.knowledge, os.environ["ROUTER_DATABASE_URL"],
            tasks=not chosen.no_tasks, most=chosen.most,
        )  # fmt: skip
    except (RouterError, OSError) as error:
        sys.exit(f"router.knowledge.indexer: {error}")
    sys.stdout.write(json.dumps(dataclasses.asdict(caught)) + "\n")


if __name__ == "__main__":
    main()
