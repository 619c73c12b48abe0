"""Knowledge: what the router can answer with when no model does. It never needs the network.

    async with Knowledge.open(config / "knowledge", database_url=url, data_folder=data) as knowledge:
        found = await knowledge.search("How do I pause a model?")
        found.knows, found.confidence, found.passages, found.says()

It searches the files of config/knowledge, what people added (`router knowledge add`), and tasks that were
solved well before. The last two are in Postgres; each host keeps an index of all three on disk, which a child
process brings up to date. Without a database, or until the host's index is there, the files alone are
searched, in memory.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from router.errors import RouterError
from router.knowledge.files import Refused, Stamp, read_folder, stamp
from router.knowledge.index import ENGINE, FORMAT, Hits, IndexBroken, KnowledgeIndex
from router.knowledge.relevance import confidence
from router.knowledge.storage import IndexFolder

EVERY_SECONDS = 30.0
LONGEST_PASS_SECONDS = 3600.0
LEAVE_SECONDS = 5.0
THREADS = 2
KNOWS_FROM = 0.3  # confidence
SAID_PASSAGES = 3
SAID_SHARE = 0.5  # of the best score
NO_KNOWLEDGE = "No knowledge: nothing that is kept here answers this."

T = TypeVar("T")

log = logging.getLogger("router.knowledge")


@dataclass(frozen=True, slots=True)
class Passage:
    """One entry as it was found. Scores compare within one search only."""

    text: str
    source: str
    score: float


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What was found, best first; `confidence` is how likely the first passage is to the point, 0 to 1."""

    passages: tuple[Passage, ...]
    confidence: float

    @property
    def knows(self) -> bool:
        """Whether this is worth being shown, or given to a model, at all."""
        return bool(self.passages) and self.confidence >= KNOWS_FROM

    def says(self) -> str:
        """The passages as an answer of the last resort, with their sources; or that there is no knowledge."""
        if not self.knows:
            return NO_KNOWLEDGE
        enough = self.passages[0].score * SAID_SHARE
        said = [passage for passage in self.passages[:SAID_PASSAGES] if passage.score >= enough]
        parts = [
            f"[{place}] {passage.text}\n(from {passage.source})" for place, passage in enumerate(said, 1)
        ]
        head = f"No model answered. From what is kept here (to the point with {self.confidence:.0%}):"
        return "\n\n".join([head, *parts])


class Knowledge:
    """Searched by any number of callers of one event loop. Use `Knowledge.open`."""

    def __init__(self, folder: Path, passes: IndexerProcess | None, *, every_seconds: float) -> None:
        self._folder = folder
        self._passes = passes
        self._every_seconds = every_seconds
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="knowledge")
        self._files = KnowledgeIndex()
        self._files_stamp: Stamp | None = None
        self._files_looked_at = -every_seconds
        self._whole: KnowledgeIndex | None = None
        self._trouble = ""

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        folder: Path,
        *,
        database_url: str | None = None,
        data_folder: Path | None = None,
        every_seconds: float = EVERY_SECONDS,
        tasks: bool = True,
        follow: bool = True,
    ) -> AsyncIterator[Knowledge]:
        """Ready once the files of `folder` are read; with a database its entries follow, and stay fresh.

        The index is kept in `data_folder`, which needs no backup. With `tasks` false nothing is learned from
        solved tasks; without `follow` nothing is learned but by `catch_up`. Nothing here raises for want of a
        database, a folder or an index: there is less knowledge then, and the log says why.
        """
        passes = None
        if database_url and data_folder:
            home = IndexFolder(data_folder / "knowledge" / _index_name(database_url, folder, tasks=tasks))
            passes = IndexerProcess(home, folder, database_url, tasks=tasks)
        knowledge = cls(folder, passes, every_seconds=every_seconds)
        following: asyncio.Task[None] | None = None
        try:
            await knowledge._in_thread(knowledge._read_files)
            if passes is not None:
                await knowledge._in_thread(knowledge._reload)
            if passes is not None and follow:
                following = asyncio.create_task(knowledge._follow(passes), name="knowledge: catch up")
            yield knowledge
        finally:
            if following is not None:
                following.cancel()
                with suppress(asyncio.CancelledError):
                    await following
            knowledge._threads.shutdown(wait=False, cancel_futures=True)

    async def catch_up(self) -> None:
        """Learn now what is new in Postgres; IndexBroken says why it could not be done."""
        if self._passes is not None:
            await self._pass(self._passes)

    async def search(self, query: str, limit: int = 5) -> SearchResult:
        """The best passages for `query`, at most `limit`. No query makes it raise."""
        hits = await self._in_thread(self._search, query, limit)
        passages = tuple(Passage(hit.text, hit.source, hit.score) for hit in hits.hits)
        return SearchResult(passages, confidence(hits.evidence) if passages else 0.0)

    @property
    def entries(self) -> int:
        """How many entries are searched now."""
        return len(self._whole or self._files)

    async def _in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def _search(self, query: str, limit: int) -> Hits:
        if self._whole is not None:
            try:
                return self._whole.search(query, limit)
            except IndexBroken as error:
                self._complain(str(error))
                self._whole = None
        if time.monotonic() - self._files_looked_at >= self._every_seconds:
            self._read_files()
        return self._files.search(query, limit)

    def _read_files(self) -> None:
        self._files_looked_at = time.monotonic()
        fresh = stamp(self._folder) if self._folder.is_dir() else ()
        if fresh == self._files_stamp:
            return
        index = KnowledgeIndex()
        with index.writing() as writer:
            for file in read_folder(self._folder):
                if isinstance(file, Refused):
                    log.warning("knowledge: %s It is left out.", file)
                    continue
                for entry in file.entries:
                    writer.add(entry)
            writer.commit()
        self._files, self._files_stamp = index, fresh

    def _reload(self) -> None:
        """See what the last pass on this host, whoever made it, has committed."""
        if self._passes is None or self._passes.home.caught_up_at() is None:
            return
        try:
            if self._whole is None:
                self._whole = self._passes.home.read_index()
            else:
                self._whole.reload()
        except (IndexBroken, OSError) as error:
            self._complain(str(error))
            self._whole = None

    async def _follow(self, passes: IndexerProcess) -> None:
        while True:
            at = await self._in_thread(passes.home.caught_up_at)
            age = self._every_seconds if at is None else time.time() - at
            if not 0 <= age < self._every_seconds:  # else another process of this host did it
                try:
                    await self._pass(passes)
                    self._trouble = ""
                except (RouterError, OSError) as error:
                    self._complain(str(error))
            await self._in_thread(self._reload)
            await asyncio.sleep(self._every_seconds)

    async def _pass(self, passes: IndexerProcess) -> None:
        """One pass; a first one is long, and what it has committed so far is searched meanwhile."""
        working = asyncio.create_task(passes.one(), name="knowledge: one pass")
        try:
            while not working.done():
                await asyncio.wait({working}, timeout=self._every_seconds)
                await self._in_thread(self._reload)
        finally:
            if not working.done():
                working.cancel()
                with suppress(asyncio.CancelledError, RouterError):
                    await working
        working.result()

    def _complain(self, trouble: str) -> None:
        if trouble != self._trouble:
            log.warning("knowledge is not brought up to date: %s", trouble)
        self._trouble = trouble


class IndexerProcess:
    """Has child processes bring the index of this host up to date."""

    def __init__(self, home: IndexFolder, folder: Path, database_url: str, *, tasks: bool) -> None:
        self.home = home
        self._arguments = [str(home.path), str(folder), *(() if tasks else ("--no-tasks",))]
        self._database_url = database_url

    async def one(self) -> None:
        """One pass; the child does not outlive this call. IndexBroken has its last word if it failed."""
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "router.knowledge.indexer", *self._arguments,
            env={**os.environ, "ROUTER_DATABASE_URL": self._database_url},
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            out, err = await asyncio.wait_for(child.communicate(), LONGEST_PASS_SECONDS)
        except asyncio.TimeoutError as error:
            raise IndexBroken(f"a pass took longer than {LONGEST_PASS_SECONDS:g} s") from error
        finally:
            if child.returncode is None:
                await _end(child)
        if child.returncode:
            lines = err.decode("utf-8", "replace").strip().splitlines()
            raise IndexBroken(
                lines[-1] if lines else f"router.knowledge.indexer ended with {child.returncode}"
            )
        caught = json.loads(out)
        if caught["added"] or caught["forgotten"]:
            log.info("knowledge: %(added)d entries added, %(forgotten)d forgotten, %(seconds).1f s", caught)


async def _end(child: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        child.terminate()
    try:
        await asyncio.wait_for(child.wait(), LEAVE_SECONDS)
    except asyncio.TimeoutError:
        with suppress(ProcessLookupError):
            child.kill()
        await child.wait()


def _index_name(database_url: str, folder: Path, *, tasks: bool) -> str:
    """One index a database, folder and engine: another version of any would not understand it."""
    told_apart = json.dumps([database_url, str(folder.resolve()), tasks])
    return f"{hashlib.sha256(told_apart.encode()).hexdigest()[:16]}-{FORMAT}-{ENGINE}"[:100]
