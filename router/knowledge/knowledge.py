"""Retrieval: searches an index of text passages, the last resort of an answer. Searches use no network.

    async with Knowledge.open(config / "knowledge", database_url=url, data_folder=data) as knowledge:
        found = await knowledge.search("How do I pause a model?")
        found.passages, found.confidence, found.is_relevant, found.as_answer()

Sources are the files of config/knowledge, files that people added (`router knowledge add`), and solved tasks.
The last two are in Postgres; each host keeps an index of all three on disk, which a child process updates.
Without a database, or until that index exists, only the files are searched, in memory.
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
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from router.background import cancel_and_wait, child_process, run_to_end
from router.errors import RouterError
from router.knowledge.files import RejectedFile, Stamp, read_folder, stamp
from router.knowledge.index import ENGINE, FORMAT, KnowledgeIndex, KnowledgeIndexError
from router.knowledge.results import SearchResult
from router.knowledge.storage import IndexFolder
from router.settings import TaskKnowledge

UPDATE_SECONDS = 30.0
MAX_RUN_SECONDS = 3600.0
TERMINATE_SECONDS = 5.0
THREADS = 2

T = TypeVar("T")

log = logging.getLogger("router.knowledge")


class Knowledge:
    """Searches knowledge for any number of concurrent callers of one event loop. Use `Knowledge.open`."""

    def __init__(
        self, folder: Path, indexer: IndexerProcess | None, *, update_seconds: float, of_all: bool = False
    ) -> None:
        self._folder = folder
        self._of_all = of_all
        self._indexer = indexer
        self._update_seconds = update_seconds
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="knowledge")
        self._file_index = KnowledgeIndex()
        self._file_stamp: Stamp | None = None
        self._files_checked_at = -update_seconds
        self._full_index: KnowledgeIndex | None = None
        self._last_error = ""

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        folder: Path,
        *,
        database_url: str | None = None,
        data_folder: Path | None = None,
        update_seconds: float = UPDATE_SECONDS,
        tasks: TaskKnowledge = "own_client",
        keep_updated: bool = True,
    ) -> AsyncIterator[Knowledge]:
        """Opens knowledge once the files of `folder` are indexed; entries of the database follow.

        The index is stored in `data_folder`, which needs no backup. `tasks` tells whose solved tasks a search
        sees. With `keep_updated=False` the index changes only by `update`; otherwise it is updated every
        `update_seconds`. A missing database, folder or index raises no error: fewer entries are searched, and
        the log states the reason.
        """
        indexer = None
        if database_url and data_folder:
            with_tasks = tasks != "off"
            name = _index_name(database_url, folder, tasks=with_tasks)
            home = IndexFolder(data_folder / "knowledge" / name)
            indexer = IndexerProcess(home, folder, database_url, tasks=with_tasks)
        knowledge = cls(folder, indexer, update_seconds=update_seconds, of_all=tasks == "all")
        updating: asyncio.Task[None] | None = None
        try:
            await knowledge._in_thread(knowledge._read_files)
            if indexer is not None:
                await knowledge._in_thread(knowledge._reload, indexer.home)
                if keep_updated:
                    work = knowledge._keep_updated(indexer)
                    updating = asyncio.create_task(work, name="knowledge: updates")
            yield knowledge
        finally:
            if updating is not None:
                await cancel_and_wait(updating)
            knowledge._threads.shutdown(wait=False, cancel_futures=True)

    async def update(self) -> bool:
        """Adds the changes in Postgres to the index now. Raises RouterError if that fails.

        Returns False if another process of this host is doing so: then its commits so far are searched.
        """
        return self._indexer is None or await self._run(self._indexer)

    async def search(self, query: str, limit: int = 5, client: str = "") -> SearchResult:
        """Returns the best passages for `query` that `client` may see, at most `limit`.

        Any text is a valid query.
        """
        return await self._in_thread(self._search, query, limit, client)

    @property
    def entries(self) -> int:
        """Number of entries that a search covers now."""
        return len(self._full_index or self._file_index)

    async def _in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def _search(self, query: str, limit: int, client: str) -> SearchResult:
        if self._full_index is not None:
            try:
                return self._full_index.search(query, limit, client, of_all=self._of_all)
            except KnowledgeIndexError as error:
                self._log_once(error)
                self._full_index = None
        if time.monotonic() - self._files_checked_at >= self._update_seconds:
            self._read_files()
        return self._file_index.search(query, limit)

    def _read_files(self) -> None:
        self._files_checked_at = time.monotonic()
        current = stamp(self._folder) if self._folder.is_dir() else ()
        if current == self._file_stamp:
            return
        index = KnowledgeIndex()
        with index.writing() as writer:
            for file in read_folder(self._folder):
                if isinstance(file, RejectedFile):
                    log.warning("knowledge file skipped: %s", file)
                    continue
                for entry in file.entries:
                    writer.add(entry)
            writer.commit()
        self._file_index, self._file_stamp = index, current

    def _reload(self, home: IndexFolder) -> None:
        """Makes searches see the latest commit to this host's index, by whichever process."""
        if home.updated_at() is None:
            return
        try:
            if self._full_index is None:
                self._full_index = home.read_index()
            else:
                self._full_index.reload()
        except (KnowledgeIndexError, OSError) as error:
            self._log_once(error)
            self._full_index = None

    async def _keep_updated(self, indexer: IndexerProcess) -> None:
        while True:
            updated_at = await self._in_thread(indexer.home.updated_at)
            age = self._update_seconds if updated_at is None else time.time() - updated_at
            if not 0 <= age < self._update_seconds:  # otherwise another process of this host has just updated
                try:
                    await self._run(indexer)
                    self._last_error = ""
                except (RouterError, OSError) as error:
                    self._log_once(error)
            await self._in_thread(self._reload, indexer.home)
            await asyncio.sleep(self._update_seconds)

    async def _run(self, indexer: IndexerProcess) -> bool:
        """Runs the indexer once; what a long first run has committed so far is searched meanwhile.

        Returns False if another process is running it.
        """
        running = asyncio.create_task(indexer.run(), name="knowledge: indexer")
        try:
            while not running.done():
                await asyncio.wait({running}, timeout=self._update_seconds)
                await self._in_thread(self._reload, indexer.home)
        finally:
            await run_to_end(cancel_and_wait(running), "end of the index update")
        return running.result()

    def _log_once(self, error: Exception) -> None:
        if str(error) != self._last_error:
            log.warning("knowledge index not updated: %s", error)
        self._last_error = str(error)


class IndexerProcess:
    """Updates the index of this host in child processes."""

    def __init__(self, home: IndexFolder, folder: Path, database_url: str, *, tasks: bool) -> None:
        self.home = home
        self._arguments = [str(home.path), str(folder), *(() if tasks else ("--no-tasks",))]
        self._database_url = database_url

    async def run(self) -> bool:
        """Runs the indexer once; the child does not outlive this call.

        Returns False if another one is at work, which this one leaves to it.
        Raises KnowledgeIndexError with the child's last line of output if it failed or took too long.
        """
        async with child_process(
            sys.executable, "-m", "router.knowledge.indexer", *self._arguments,
            terminate_seconds=TERMINATE_SECONDS,
            env={**os.environ, "ROUTER_DATABASE_URL": self._database_url},
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        ) as child:  # fmt: skip
            try:
                out, err = await asyncio.wait_for(child.communicate(), MAX_RUN_SECONDS)
            except asyncio.TimeoutError as error:
                raise KnowledgeIndexError(f"the indexer took longer than {MAX_RUN_SECONDS:g} s") from error
        if child.returncode:
            lines = err.decode("utf-8", "replace").strip().splitlines()
            raise KnowledgeIndexError(lines[-1] if lines else f"the indexer exited with {child.returncode}")
        report = json.loads(out)
        if report["added"] or report["deleted"]:
            log.info("knowledge index: %(added)d added, %(deleted)d deleted, %(seconds).1f s", report)
        return not report["busy"]


def _index_name(database_url: str, folder: Path, *, tasks: bool) -> str:
    """Returns a name per database, folder and engine version: no other combination can read the index."""
    identity = json.dumps([database_url, str(folder.resolve()), tasks])
    return f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}-{FORMAT}-{ENGINE}"[:100]
