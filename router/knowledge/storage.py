"""Index folder of a host: the index, the indexer's progress, and the lock of the one process that writes.

FOLDER/index/       files of tantivy
FOLDER/state.json   progress; written last, so its modification time is that of the last update
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from router.files import locked, replacing
from router.knowledge.index import KnowledgeIndex, KnowledgeIndexError

MAX_TASK_ID = 2**62
UNUSED_DAYS = 14


class State(BaseModel):
    """Progress of the indexer: what the index contains. Aliases are the keys of state.json."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    identity: str = ""  # of the database
    sources_version: int = Field(default=0, alias="version")
    solved_until: float = 0.0  # seconds of the database's clock
    scan_from: int = Field(default=MAX_TASK_ID, alias="walk_from")  # the full scan descends from this task id
    full_scans: int = Field(default=0, alias="circles")  # completed
    lowest_task: int = Field(default=-MAX_TASK_ID, alias="floor")  # older tasks exceed the index's size
    files: dict[str, str] = {}  # key -> checksum


class IndexFolder:
    """Index of one database on this host, in the folder `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._index = path / "index"
        self._state = path / "state.json"

    def open_index(self) -> KnowledgeIndex:
        """Opens the index; replaces a broken one by an empty one."""
        try:
            return self.read_index()
        except KnowledgeIndexError:
            self._state.unlink(missing_ok=True)  # first: state without its index would claim to be complete
            shutil.rmtree(self._index)
            return self.read_index()

    def read_index(self) -> KnowledgeIndex:
        """Opens the index. Raises KnowledgeIndexError if it is broken."""
        return KnowledgeIndex(self._index)

    def read_state(self) -> State:
        """Reads the stored progress; an empty state, which indexes everything, if there is none."""
        try:
            return State.model_validate_json(self._state.read_bytes())
        except (OSError, ValueError):
            return State()

    def write_state(self, state: State) -> None:
        """Replaces the stored progress. Raises OSError."""
        with replacing(self._state) as file:
            file.write(state.model_dump_json(by_alias=True).encode())

    def updated_at(self) -> float | None:
        """Unix time of this host's last update; None if there was none."""
        try:
            return self._state.stat().st_mtime
        except OSError:
            return None

    def delete_unused(self) -> None:
        """Deletes neighboring indexes that were not updated for UNUSED_DAYS.

        They belong to another engine version, database address or config folder.
        """
        for state in self.path.parent.glob(f"*/{self._state.name}"):
            unused = time.time() - state.stat().st_mtime > UNUSED_DAYS * 86_400
            is_index = (state.parent / self._index.name / "meta.json").exists()
            if unused and is_index and state.parent != self.path:
                shutil.rmtree(state.parent, ignore_errors=True)

    @contextmanager
    def exclusive(self) -> Iterator[bool]:
        """Locks the folder; False if another process has locked it. The lock ends with the process."""
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path, timeout_seconds=0) as acquired:
            yield acquired
