"""Clients of the console for bench/console.py; they send the requests of its page at the same intervals."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

VIEWS = ("models", "queue", "ranking", "models", "queue", "task", "models", "queue", "ranking", "ask")
PARTS = (
    "page", "console.css", "console.js", "draw.js", "models.js", "model_row.js", "queue.js", "lists.js",
    "task.js", "ranking.js", "discovery.js", "ask.js",
)  # fmt: skip
# view -> (path, interval in seconds)
POLLED: dict[str, tuple[tuple[str, float], ...]] = {
    "queue": (("calls?limit=30", 3.0),),
    "ranking": (("priorities", 15.0), ("search", 15.0)),
    "task": (("tasks/{task}", 2.0),),
}
PROBED = (
    "me", "status", "history", "calls?limit=30", "calls?limit=30&outcome=wrong&model=llm-07",
    "failures?limit=20", "failures?limit=20&category=general", "tasks/{task}", "priorities", "search",
)  # fmt: skip
PROBE_PAUSE_SECONDS = 0.05
OPEN_SECONDS = 0.5  # between the start of two clients
FAILURES_SECONDS = 3.0  # shortest interval between requests for failures


@dataclass
class Observations:
    """Observations of all clients: route -> response times, and the time each saw a number of failures."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    failures: list[dict[int, float]] = field(default_factory=list)
    bytes: int = 0
    lines: int = 0
    wrong: list[str] = field(default_factory=list)

    def note(self, route: str, began: float) -> None:
        """Records a complete response."""
        self.seconds.setdefault(route, []).append(time.monotonic() - began)


class Client:
    """A client with one page open."""

    def __init__(
        self, session: aiohttp.ClientSession, base: str, view: str, task: int, seen: Observations
    ) -> None:
        self._session = session
        self._base = base
        self._view = view
        self._task = task
        self._seen = seen
        self._aside: asyncio.Task[None] | None = None
        self._failures_at: dict[int, float] = {}
        seen.failures.append(self._failures_at)

    async def follow(self, after_seconds: float) -> None:
        """Opens the page after a delay and follows it until cancelled."""
        await asyncio.sleep(after_seconds)
        for part in PARTS:
            await self._get(part)
        await self.api("me")
        if self._view == "models":
            await self.api("history")
        polling = [self._poll(path, seconds) for path, seconds in POLLED.get(self._view, ())]
        await asyncio.gather(self._listen(), *polling)

    async def api(self, path: str) -> None:
        """Requests a route of the API and records it by its pattern."""
        await self._get(f"api/{path.format(task=self._task)}", f"GET {path}")

    async def _get(self, path: str, name: str | None = None) -> None:
        began = time.monotonic()
        async with self._session.get(f"{self._base}/{path}") as answer:
            body = await answer.read()
        self._seen.bytes += len(body)
        if answer.status != 200:
            self._seen.wrong.append(f"{path}: {answer.status}")
        if name is not None:
            self._seen.note(name, began)

    async def _poll(self, path: str, seconds: float) -> None:
        while True:
            await self.api(path)
            await asyncio.sleep(seconds)

    async def _listen(self) -> None:
        failed, asked_at = -1, 0.0
        while True:
            began: float | None = time.monotonic()
            async with self._session.get(f"{self._base}/api/live") as answer:
                async for line in answer.content:
                    if began is not None:
                        self._seen.note("GET live (first line)", began)
                        began = None
                    self._seen.lines += 1
                    self._seen.bytes += len(line)
                    now = json.loads(line)["tasks"]["failed"]
                    self._failures_at.setdefault(now, time.monotonic())
                    at = time.monotonic()
                    if self._view == "queue" and now != failed and at - asked_at > FAILURES_SECONDS:
                        failed, asked_at = now, at
                        asking = self.api("failures?limit=20")
                        self._aside = asyncio.create_task(asking, name="console bench failures")

    async def probe(self, times: int) -> None:
        """Requests every route this number of times, sequentially."""
        for _ in range(times):
            for path in PROBED:
                await self.api(path)
                await asyncio.sleep(PROBE_PAUSE_SECONDS)


def update_delays(changes: dict[int, float], failures_at: Sequence[dict[int, float]]) -> list[float]:
    """Returns the seconds from each change until each client saw it or a later one."""
    delays = []
    for one in failures_at:
        if one:
            first, last = min(one), max(one)
            for failed, at in changes.items():
                if first < failed <= last:
                    delays.append(min(when for count, when in one.items() if count >= failed) - at)
    return delays


async def while_connected(
    clients: Sequence[Client], work: Callable[[], Awaitable[Any]], wrong: list[str]
) -> None:
    """Runs `work` while all clients are connected; their errors are added to `wrong`."""
    following = [
        asyncio.create_task(one.follow(number * OPEN_SECONDS), name="console bench client")
        for number, one in enumerate(clients)
    ]
    try:
        await work()
    finally:
        for task in following:
            task.cancel()
        ended = await asyncio.gather(*following, return_exceptions=True)
        wrong += [repr(one) for one in ended if isinstance(one, Exception)]
