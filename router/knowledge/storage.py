"""Where a host keeps its index of knowledge: the index, what it holds already, and who may write it.

FOLDER/index/       tantivy's files
FOLDER/state.json   what they hold already; written last, so that its time is when the host caught up
FOLDER/lock         held by the one process that writes
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from router.knowledge.index import IndexBroken, KnowledgeIndex

LARGEST = 2**62
UNUSED_DAYS = 14


@dataclass
class State:
    """What the index holds already; kept beside it."""

    identity: str = ""
    version: int = 0  # of sources
    solved_until: float = 0.0  # seconds of the database's clock
    walk_from: int = LARGEST  # the circle goes on with this task, downwards
    circles: int = 0
    floor: int = -LARGEST  # tasks below are too many
    files: dict[str, str] = field(default_factory=dict)  # key -> checksum


class IndexFolder:
    """One host's index of one database, in `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._index = path / "index"
        self._state = path / "state.json"

    def open_index(self) -> KnowledgeIndex:
        """The index; an empty one, to be filled anew, where it is broken."""
        try:
            return self.read_index()
        except IndexBroken:
            self._state.unlink(missing_ok=True)  # first: a state without its index would seem to be all there
            shutil.rmtree(self._index)
            return self.read_index()

    def read_index(self) -> KnowledgeIndex:
        return KnowledgeIndex(self._index)

    def state(self) -> State:
        """What was kept last; an empty one, for which everything is new, where there is none."""
        try:
            return State(**json.loads(self._state.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return State()

    def keep(self, state: State) -> None:
        fresh = self._state.with_suffix(".new")
        fresh.write_text(json.dumps(dataclasses.asdict(state)), encoding="utf-8")
        fresh.replace(self._state)

    def caught_up_at(self) -> float | None:
        """When a pass of this host last kept what it did, in Unix time; None if there was none."""
        try:
            return self._state.stat().st_mtime
        except OSError:
            return None

    def drop_unused(self) -> None:
        """Delete the indexes beside this one that no pass has kept for UNUSED_DAYS.

        They were of another engine, address or config folder; one that is in use is kept at each pass.
        """
        for state in self.path.parent.glob(f"*/{self._state.name}"):
            unused = time.time() - state.stat().st_mtime > UNUSED_DAYS * 86_400
            is_index = (state.parent / self._index.name / "meta.json").exists()
            if unused and is_index and state.parent != self.path:
                shutil.rmtree(state.parent, ignore_errors=True)

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Whether this is the only writer of the host; the lock goes with the process."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
