"""Indexer: updates a host's knowledge index from config/knowledge and Postgres, as a program of its own.

    ROUTER_DATABASE_URL=... python -m router.knowledge.indexer INDEX_FOLDER KNOWLEDGE_FOLDER

Splitting and indexing hold the GIL, so they never run in a process that serves. One run indexes changed
files, added and removed sources, tasks solved since the last run, and one slice of the full scan. The full
scan goes through all tasks, newest first, over and over: the first scan fills the index in one run, later
ones find tasks that were missed or deleted. One process per host works; others exit at once. Prints an
IndexReport as a JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from router.database import Connection, connect, rows
from router.errors import RouterError
from router.knowledge.chunking import Entry, task_entry, task_key
from router.knowledge.files import RejectedFile, read_folder
from router.knowledge.index import Writer, owner_of
from router.knowledge.storage import MAX_TASK_ID, IndexFolder, State

MAX_ENTRIES = 1_000_000
SLICE_TASKS = 5000
COMMIT_EVERY = 50_000  # entries
OVERLAP_SECONDS = 15.0  # a transaction that solves a task commits some time after `solved_at`
NICENESS = 10

_TASKS = (
    "SELECT id, left(prompt, 4000) AS prompt, left(answer, 8000) AS answer, client"
    " FROM tasks WHERE id = ANY (%s)"
)
_SLICE = (
    "SELECT s.id, s.known, t.client FROM knowledge_slice(%s, %s, %s) s JOIN tasks t USING (id)"
    " ORDER BY s.id DESC"
)
_NEXT_SOURCE = (
    "SELECT source, version, checksum IS NULL AS removed FROM knowledge_sources"
    " WHERE version > %s ORDER BY version LIMIT 1"
)
_SOURCE_ENTRIES = (
    "SELECT place, shown_source, title, body FROM knowledge_entries"
    " WHERE source = %s AND place > %s ORDER BY place LIMIT %s"
)


@dataclass
class IndexReport:
    """Result of one run. `busy`: another process is updating this index, and nothing was done."""

    entries: int = 0
    added: int = 0
    deleted: int = 0
    rejected: list[str] = field(default_factory=list)
    busy: bool = False
    seconds: float = 0.0


class Indexer:
    """One run over files, sources and tasks. The caller holds the folder's lock."""

    def __init__(
        self,
        folder: IndexFolder,
        connection: Connection,
        *,
        tasks: bool = True,
        max_entries: int = MAX_ENTRIES,
        slice_tasks: int = SLICE_TASKS,
    ) -> None:
        self._folder = folder
        self._connection = connection
        self._with_tasks = tasks
        self._max_entries = max_entries
        self._slice_tasks = slice_tasks
        self._index = folder.open_index()
        # A missing index was just created empty, whatever the state claims.
        self._state = folder.read_state() if len(self._index) else State()
        self._report = IndexReport()
        self._uncommitted = 0

    def run(self, knowledge_folder: Path) -> IndexReport:
        """Updates the index once. Raises RouterError or OSError; what was committed so far stays."""
        began = time.monotonic()
        database = rows(self._connection, "SELECT * FROM knowledge_state()")[0]
        with self._index.writing() as writer:
            self._writer: Writer = writer
            if self._state.identity != database["identity"]:
                writer.delete_all()
                self._state = State(identity=database["identity"])
                self._uncommitted += 1
                self._commit()  # the scan below must not find entries of another database
            self._update_files(knowledge_folder)
            self._update_sources()
            if self._with_tasks:
                self._add_solved_tasks(database["now"])
                self._continue_full_scan()
                self._commit()
                self._delete_excess()
            self._commit()
        self._report.entries = len(self._index)
        self._report.seconds = round(time.monotonic() - began, 3)
        return self._report

    def _update_files(self, folder: Path) -> None:
        found: dict[str, str] = {}
        for file in read_folder(folder):
            if isinstance(file, RejectedFile):
                self._report.rejected.append(str(file))
                continue
            found[file.key] = file.checksum
            if self._state.files.get(file.key) != file.checksum:
                self._replace(file.key, file.entries)
        for key in self._state.files.keys() - found.keys():
            self._replace(key, ())
        self._state.files = found

    def _update_sources(self) -> None:
        while found := rows(self._connection, _NEXT_SOURCE, (self._state.sources_version,)):
            self._replace(f"added:{found[0]['source']}", self._source_entries(found[0]["source"]))
            self._state.sources_version = found[0]["version"]

    def _source_entries(self, source: str) -> Iterator[Entry]:
        last = 0
        while found := rows(self._connection, _SOURCE_ENTRIES, (source, last, self._slice_tasks)):
            for row in found:
                yield Entry(f"added:{source}", row["shown_source"], row["title"], row["body"])
            last = found[-1]["place"]

    def _add_solved_tasks(self, now: float) -> None:
        """Adds tasks solved since the last run; the first run leaves all of them to the full scan."""
        since, last_id = self._state.solved_until, -MAX_TASK_ID
        statement = "SELECT id FROM knowledge_since(%s, %s, %s)"
        while since:
            found = rows(self._connection, statement, (since, last_id, self._slice_tasks))
            if not found:
                break
            self._add_tasks([row["id"] for row in found])
            last_id = found[-1]["id"]
        self._state.solved_until = now - OVERLAP_SECONDS

    def _continue_full_scan(self) -> None:
        """Scans the next slice; the first scan runs to its end, or until the index is full."""
        while True:
            self._state.full_scans += self._scan_slice()
            if len(self._index) + self._uncommitted >= self._max_entries and not self._state.full_scans:
                self._state.lowest_task, self._state.scan_from = self._state.scan_from + 1, MAX_TASK_ID
                self._state.full_scans = 1
            if self._state.full_scans:
                return

    def _scan_slice(self) -> bool:
        """Makes the index agree with the next slice of tasks; True if the scan has reached its end."""
        state = self._state
        found = rows(self._connection, _SLICE, (state.scan_from, state.lowest_task, self._slice_tasks))
        lowest = found[-1]["id"] if len(found) == self._slice_tasks else state.lowest_task
        wanted = {row["id"]: owner_of(row["client"]) for row in found if row["known"]}
        indexed = self._index.task_owners(lowest, state.scan_from)
        for task_id in indexed.keys() - wanted.keys():
            self._replace(task_key(task_id), ())
        self._add_tasks(sorted(dict(wanted.items() - indexed.items())))
        at_end = lowest == state.lowest_task
        state.scan_from = MAX_TASK_ID if at_end else lowest - 1
        return at_end

    def _add_tasks(self, task_ids: Sequence[int]) -> None:
        for start in range(0, len(task_ids), self._slice_tasks):
            batch = list(task_ids[start : start + self._slice_tasks])
            for row in rows(self._connection, _TASKS, (batch,)):
                entry = task_entry(row["id"], row["prompt"], row["answer"] or "", row["client"])
                self._replace(entry.key, (entry,))
            if self._uncommitted >= COMMIT_EVERY:
                self._commit()

    def _delete_excess(self) -> None:
        """Deletes the tasks with the lowest ids above MAX_ENTRIES, and excludes them from later scans."""
        excess = len(self._index) - self._max_entries
        if excess <= 0:
            return
        oldest = self._index.oldest_tasks(excess)
        for task_id in oldest:
            self._replace(task_key(task_id), ())
        if oldest:
            self._state.lowest_task = oldest[-1] + 1

    def _replace(self, key: str, entries: Iterable[Entry]) -> None:
        """Makes `entries` the only ones of the key. Idempotent."""
        self._writer.delete(key)
        self._uncommitted += 1
        added = 0
        for entry in entries:
            self._writer.add(entry)
            added += 1
        self._uncommitted += added
        self._report.added += added
        self._report.deleted += added == 0

    def _commit(self) -> None:
        """Commits, then stores the progress: work that a crash repeats is idempotent."""
        if self._uncommitted:
            self._writer.commit()
            self._index.reload()
            self._uncommitted = 0
        self._folder.write_state(self._state)


def update_index(
    folder: Path,
    knowledge_folder: Path,
    database_url: str,
    *,
    tasks: bool = True,
    max_entries: int = MAX_ENTRIES,
) -> IndexReport:
    """Runs the indexer once on the index in `folder`. Raises RouterError or OSError."""
    home = IndexFolder(folder)
    with home.exclusive() as acquired:
        if not acquired:
            return IndexReport(busy=True)
        home.delete_unused()
        with connect(database_url, autocommit=True) as connection:
            indexer = Indexer(home, connection, tasks=tasks, max_entries=max_entries)
            return indexer.run(knowledge_folder)


def main() -> None:
    """Entry point of the child process; on failure exits with 1 and one line on standard error."""
    parser = argparse.ArgumentParser(
        prog="router.knowledge.indexer", description="Update the knowledge index of this host."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("knowledge", type=Path)
    parser.add_argument("--no-tasks", action="store_true")
    chosen = parser.parse_args()
    os.nice(NICENESS)
    database_url = os.environ["ROUTER_DATABASE_URL"]
    try:
        report = update_index(chosen.folder, chosen.knowledge, database_url, tasks=not chosen.no_tasks)
    except (RouterError, OSError) as error:
        sys.exit(f"router.knowledge.indexer: {error}")
    sys.stdout.write(json.dumps(dataclasses.asdict(report)) + "\n")


if __name__ == "__main__":
    main()
