"""One of the two routers that solve the same days: its engine, its workers, and its interactive requests."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import Self

from bench.learning_demo.scenario import Task
from router import Router
from router.background import cancel_and_wait
from router.database import connect
from router.models import sync_roster
from router.settings import Addresses, RouterConfig
from router.workers import Engine, Worker

MAX_DAY_SECONDS = 120.0
POLL_SECONDS = 0.05
REQUEST_INTERVAL_SECONDS = 0.02
ROSTER_SECONDS = 0.2
BACKLOG_LEFT = 40  # tasks: the slowest need not end before interactive requests start

_INSERT = """
INSERT INTO tasks (prompt, category, external_id)
SELECT * FROM unnest($1::text[], $2::text[], $3::text[])"""
_ANSWERS = r"""
SELECT substring(prompt FROM '\[([^\]]+)\]$') AS key, answer_call_id::text AS call_id, status::text
  FROM tasks WHERE id > $1"""
_CALLS = """
SELECT category, model, role <> 'batch' AS interactive, count(*) AS calls,
       count(*) FILTER (WHERE outcome = 'answered') AS answered, coalesce(sum(cost), 0)::float8 AS cost
  FROM model_calls WHERE task_id > $1 AND rank = 3 AND outcome <> 'unsent'
 GROUP BY 1, 2, 3"""


class DayTooLongError(RuntimeError):
    """A day's tasks did not end within MAX_DAY_SECONDS."""


@dataclass(frozen=True)
class Solved:
    """One task at the end of its day; `seconds` is the latency of an interactive request."""

    key: str
    category: str
    interactive: bool
    good: bool
    seconds: float | None


@dataclass(frozen=True)
class SideDay:
    """One day of one side; `calls` are rows of _CALLS."""

    tasks: tuple[Solved, ...]
    calls: tuple[Mapping[str, Any], ...]

    def share_of_calls(self, model: str, category: str) -> float:
        """The model's calls in the category, as a share of the category's tasks."""
        tasks = sum(task.category == category for task in self.tasks)
        calls = sum(
            row["calls"] for row in self.calls if (row["model"], row["category"]) == (model, category)
        )
        return calls / tasks if tasks else 0.0


class Side:
    """To be used as `async with`; `variables` are the lines that the traffic Variables would hold."""

    def __init__(self, addresses: Addresses, config: RouterConfig, knowledge: Path) -> None:
        self._engine = Engine(addresses, config, self._read_variables)
        self._router = Router(addresses, config, knowledge)
        self._stack = contextlib.AsyncExitStack()
        self._addresses, self._config = addresses, config
        self._first_id = 0
        self._latencies: dict[str, float] = {}
        self.unsolved = 0
        self.variables: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        async with self._stack:
            await asyncio.to_thread(self._sync)
            await self._engine.start()
            self._stack.push_async_callback(self._engine.stop, grace_seconds=1.0)
            await self._router.open(classify=False)
            self._stack.push_async_callback(self._router.close)
            self._solving = asyncio.create_task(self._solve())
            self._stack.push_async_callback(cancelled_once, self._solving)
            self._stack = self._stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def solve_day(self, tasks: Sequence[Task]) -> None:
        """Have the backlog solved, then send the interactive requests: a full backlog takes every permit."""
        deadline = time.monotonic() + MAX_DAY_SECONDS
        pool = self._engine.pool
        self._first_id = await pool.fetchval("SELECT coalesce(max(id), 0) FROM tasks")
        backlog = [task for task in tasks if not task.interactive]
        columns = zip(*((task.prompt, task.category, task.key) for task in backlog), strict=True)
        await pool.execute(_INSERT, *map(list, columns))
        await self._until_left(BACKLOG_LEFT, deadline)
        await self._request([task for task in tasks if task.interactive])
        await self._until_left(0, deadline)

    async def results(self, tasks: Sequence[Task], flaws: Mapping[str, str | None]) -> SideDay:
        """The day's answers and calls; `flaws` maps call_id to the flaw of each answer."""
        pool = self._engine.pool
        answers = {row["key"]: row for row in await pool.fetch(_ANSWERS, self._first_id)}
        solved = []
        for task in tasks:
            row = answers.get(task.key)
            good = (
                row is not None and row["status"] == "solved" and flaws.get(row["call_id"], "unknown") is None
            )
            seconds = self._latencies.get(task.key)
            solved.append(Solved(task.key, task.category, task.interactive, good, seconds))
        return SideDay(tuple(solved), tuple(await pool.fetch(_CALLS, self._first_id)))

    def _sync(self) -> None:
        with connect(self._addresses.database_url) as connection:
            sync_roster(connection, self._config)

    async def _read_variables(self, models: list[str]) -> Mapping[str, str | None]:
        return {model: self.variables.get(model) for model in models}

    async def _solve(self) -> None:
        """Run one pull loop per model of the roster, including models that join later."""
        pulls: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                for model in self._engine.roster.models.keys() - pulls.keys():
                    pulls[model] = Worker(self._engine, model, run="demo").start_pulling()
                done, _ = await asyncio.wait(pulls.values(), timeout=ROSTER_SECONDS)
                for pull in done:
                    pull.result()
        finally:
            await cancel_and_wait(*pulls.values())

    async def _until_left(self, tasks: int, deadline: float) -> None:
        while True:
            if self._solving.done():
                self._solving.result()
            self.unsolved = await self._engine.pool.fetchval("SELECT count(*) FROM queue")
            if self.unsolved <= tasks:
                return
            if time.monotonic() > deadline:
                unsolved = f"{self.unsolved} tasks are unsolved after {MAX_DAY_SECONDS:g} s"
                raise DayTooLongError(f"{unsolved}. Use a smaller --tasks.")
            await asyncio.sleep(POLL_SECONDS)

    async def _request(self, tasks: Sequence[Task]) -> None:
        self._latencies = {}
        requests: list[asyncio.Task[None]] = []
        try:
            for task in tasks:
                requests.append(asyncio.create_task(self._answer(task)))
                await asyncio.sleep(REQUEST_INTERVAL_SECONDS)
            await asyncio.gather(*requests)
        finally:
            await cancel_and_wait(*requests)

    async def _answer(self, task: Task) -> None:
        answer = await self._router.answer(task.prompt, category=task.category)
        self._latencies[task.key] = answer.seconds


async def cancelled_once(task: asyncio.Task[None]) -> None:
    """Cancel the task and wait for its clean-up; a second cancellation would interrupt that."""
    task.cancel()
    await asyncio.wait({task})
