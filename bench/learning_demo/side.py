"""One of the two routers that live through the same days: its engine and workers, and what is asked of it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import Self

from bench.learning_demo.script import Task
from router.answering import Router
from router.background import cancel_and_wait
from router.database import connect
from router.models import sync_roster
from router.settings import Addresses, RouterConfig
from router.workers import Engine, Worker

LONGEST_DAY_SECONDS = 120.0
LOOK_SECONDS = 0.05
ASK_EVERY_SECONDS = 0.02
ALMOST_DONE = 40  # tasks: the slowest need not be waited for before others ask
FOLLOW_SECONDS = 0.2

_INSERT = """
INSERT INTO tasks (prompt, category, external_id)
SELECT * FROM unnest($1::text[], $2::text[], $3::text[])"""
_ENDED = r"""
SELECT substring(prompt FROM '\[([^\]]+)\]$') AS key, answered_by, answer_call_id::text AS call_id,
       status::text
  FROM tasks WHERE id > $1"""
_CALLS = """
SELECT category, model, role <> 'batch' AS asked, count(*) AS calls,
       count(*) FILTER (WHERE outcome = 'answered') AS answered,
       coalesce(sum(latency_seconds) FILTER (WHERE outcome = 'answered'), 0)::float8 AS seconds,
       coalesce(sum(cost), 0)::float8 AS cost
  FROM model_calls WHERE task_id > $1 AND rank = 3 AND outcome <> 'unsent'
 GROUP BY 1, 2, 3"""


class DayTooLong(RuntimeError):  # noqa: N818 - a state of the world, read as one
    """A day's tasks were not all done within LONGEST_DAY_SECONDS."""


@dataclass(frozen=True)
class Solved:
    """One task at the day's end. `good` is the stand-in's own word, `seconds` what whoever asked waited."""

    key: str
    category: str
    asked: bool
    model: str | None
    good: bool
    seconds: float | None


@dataclass(frozen=True)
class Calls:
    """A day's calls of a model in a category, of prompts that were asked or of the backlog."""

    category: str
    model: str
    asked: bool
    calls: int
    answered: int
    seconds: float
    cost: float


@dataclass(frozen=True)
class SideDay:
    """What a day came to on one side."""

    tasks: tuple[Solved, ...]
    calls: tuple[Calls, ...]
    seconds: float

    @property
    def good(self) -> float:
        """The share of good answers, of all tasks."""
        return share_good(self.tasks)

    def share_of_calls(self, model: str, category: str) -> float:
        """The model's calls in the category, as a share of the category's tasks."""
        tasks = sum(task.category == category for task in self.tasks)
        calls = sum(c.calls for c in self.calls if (c.model, c.category) == (model, category))
        return calls / tasks if tasks else 0.0


def share_good(tasks: Sequence[Solved]) -> float:
    """The share of good answers; 0 of nothing."""
    return sum(task.good for task in tasks) / len(tasks) if tasks else 0.0


class Side:
    """Use it as `async with`; then `live` through one day after the other."""

    def __init__(self, name: str, addresses: Addresses, config: RouterConfig, folder: Path) -> None:
        self.name = name
        self.addresses = addresses
        self.config = config
        self._folder = folder
        self._open = contextlib.AsyncExitStack()
        self._seconds = 0.0
        self._first_id = 0
        self._waits: dict[str, float] = {}
        self.unsolved = 0
        self.variables: dict[str, str] = {}  # model -> the line that its Variable would hold

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._open.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._open.aclose()

    async def live(self, tasks: Sequence[Task]) -> None:
        """Let the backlog be solved, then ask what is asked; returns when all of it has ended.

        Nobody asks while most of the backlog is there: it takes all permits.
        """
        began = time.monotonic()
        self._first_id = await self._engine.pool.fetchval("SELECT coalesce(max(id), 0) FROM tasks")
        backlog = [task for task in tasks if not task.asked]
        await self._engine.pool.execute(
            _INSERT,
            [task.prompt for task in backlog],
            [task.category for task in backlog],
            [task.key for task in backlog],
        )
        await self._until_done(began, but=ALMOST_DONE)
        await self._ask([task for task in tasks if task.asked])
        await self._until_done(began)
        self._seconds = time.monotonic() - began

    async def facts(self, tasks: Sequence[Task], flaws: Mapping[str, str | None]) -> SideDay:
        """What the day came to. `flaws`: call_id -> flaw of every answer that was given."""
        pool = self._engine.pool
        ended_tasks = {row["key"]: row for row in await pool.fetch(_ENDED, self._first_id)}
        solved = []
        for task in tasks:
            row = ended_tasks.get(task.key, {"answered_by": None, "call_id": None, "status": "not kept"})
            good = row["status"] == "solved" and flaws.get(row["call_id"], "no model's") is None
            wait = self._waits.get(task.key)
            solved.append(Solved(task.key, task.category, task.asked, row["answered_by"], good, wait))
        calls = [Calls(**dict(row)) for row in await pool.fetch(_CALLS, self._first_id)]
        return SideDay(tuple(solved), tuple(calls), self._seconds)

    async def _start(self) -> None:
        await asyncio.to_thread(_synced, self.addresses.database_url, self.config)
        self._engine = Engine(self.addresses, self.config, self._read_variables)
        await self._engine.start()
        self._open.push_async_callback(self._engine.stop, grace_seconds=1.0)
        self._router = Router(self.addresses, self.config, self._folder)
        await self._router.open(classify=False)
        self._open.push_async_callback(self._router.close)
        self._solving = asyncio.create_task(self._solve(), name=f"solving, {self.name}")
        self._open.push_async_callback(cancelled_once, self._solving)

    async def _read_variables(self, models: list[str]) -> Mapping[str, str | None]:
        return {model: self.variables.get(model) for model in models}

    async def _solve(self) -> None:
        """Pull for each model of the roster, for new ones too, until this is cancelled."""
        engine = self._engine
        pulls: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                for model in engine.roster.models.keys() - pulls.keys():
                    pulls[model] = Worker(engine, model, run=self.name).start_pulling()
                if pulls:
                    await asyncio.wait(pulls.values(), timeout=FOLLOW_SECONDS)
                for pull in pulls.values():
                    if pull.done():  # a fault of the program: it ends only by being cancelled
                        pull.result()
        finally:
            await cancel_and_wait(*pulls.values())

    async def _until_done(self, began: float, *, but: int = 0) -> None:
        while True:
            if self._solving.done():
                self._solving.result()
            self.unsolved = await self._engine.pool.fetchval("SELECT count(*) FROM queue")
            if self.unsolved <= but:
                return
            if time.monotonic() - began > LONGEST_DAY_SECONDS:
                raise DayTooLong(
                    f"{self.unsolved} tasks {self.name} are not done after {LONGEST_DAY_SECONDS:g} s."
                    " Is the machine busy? Try --tasks with a smaller number."
                )
            await asyncio.sleep(LOOK_SECONDS)

    async def _ask(self, tasks: Sequence[Task]) -> None:
        self._waits = {}
        asking = []
        try:
            for task in tasks:
                asking.append(asyncio.create_task(self._ask_one(task), name=f"asks {task.key}, {self.name}"))
                await asyncio.sleep(ASK_EVERY_SECONDS)
            await asyncio.gather(*asking)
        finally:
            await cancel_and_wait(*asking)

    async def _ask_one(self, task: Task) -> None:
        answer = await self._router.answer(task.prompt, category=task.category)
        self._waits[task.key] = answer.seconds


async def cancelled_once(task: asyncio.Task[None]) -> None:
    """Cancel the task and wait until it is gone: a second time would cut off what it does to end well."""
    task.cancel()
    await asyncio.wait({task})


def _synced(url: str, config: RouterConfig) -> None:
    with connect(url) as connection:
        sync_roster(connection, config)
