"""Interactive requests from the console, over one router that is opened on demand and closed when idle."""

from __future__ import annotations

import asyncio
import importlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from router.background import cancel_and_wait
from router.errors import CapacityExceeded, RouterError
from router.settings import Addresses, config_folder, data_folder, load_config

from . import audit
from .live import as_line

if TYPE_CHECKING:
    from router.answering import Answer, Event, Router

log = logging.getLogger("router.console")

MAX_CONCURRENCY = 20
IDLE_SECONDS = 300.0
IDLE_CHECK_SECONDS = 10.0
GRACE_SECONDS = 1.0
LATE_SECONDS = 120.0
KEEP_ALIVE_SECONDS = 2.0
MAX_ANSWER_CHARACTERS = 200_000


class AskBody(BaseModel):
    """Body of a request; the fields are the options of `router ask`."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, max_length=1_000_000)
    category: str | None = None
    model: str | None = None
    deadline_seconds: float | None = Field(default=None, ge=0.05, le=3600)


class AskSessions:
    """Answers prompts. A request runs to its end even if the page disconnects."""

    def __init__(self, addresses: Callable[[], Addresses]) -> None:
        self._addresses = addresses
        self._router: Router | None = None
        self._lock = asyncio.Lock()
        self._running: set[asyncio.Task[None]] = set()
        self._warming: set[asyncio.Task[None]] = set()
        self._used_at = 0.0
        self._closer: asyncio.Task[None] | None = None

    def warm_up(self) -> bool:
        """Opens the router in the background; returns whether it is open already."""
        if self._router is None and not self._lock.locked():
            task = asyncio.create_task(self._open_early(), name="router console ask warm-up")
            self._warming.add(task)
            task.add_done_callback(self._warming.discard)
        return self._router is not None

    async def _open_early(self) -> None:
        try:
            await self._opened()
        except RouterError as error:  # the request that needs it reports the error
            log.warning("console: cannot open the router: %s", error)

    async def stream(self, body: AskBody, client: str = "") -> AsyncIterator[bytes]:
        """Yields JSON lines: `opening`, `event`s, the `answer`, `late` answers, or an `error`, then `end`.

        `opening` tells that the router is not open yet, so that the first call takes some seconds.

        Raises CapacityExceeded if MAX_CONCURRENCY requests are in progress.
        """
        if len(self._running) >= MAX_CONCURRENCY:
            raise CapacityExceeded(
                f"The console is already answering {len(self._running)} prompts, the maximum.", 1.0
            )
        lines: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        task = asyncio.create_task(self._answer(body, client, lines.put_nowait), name="router console ask")
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return _json_lines(lines)

    async def close(self) -> None:
        """Cancels the requests in progress and closes the router."""
        await cancel_and_wait(*self._running, *self._warming, *filter(None, [self._closer]))
        await self._close_router()

    async def _answer(self, body: AskBody, client: str, send: Callable[[dict[str, Any]], None]) -> None:
        try:
            if self._router is None:
                send({"opening": True})
            router = await self._opened()
            answer = await router.answer(
                body.prompt, category=body.category or None, model=body.model or None,
                deadline_seconds=body.deadline_seconds, client=client,
                on_event=lambda event: send({"event": _event_object(event)}),
            )  # fmt: skip
            send({"answer": _answer_object(answer)})
            if answer.task_id is not None:
                await audit.store(lambda: self._addresses().database_url, "ask", f"task {answer.task_id}")
            until = time.monotonic() + LATE_SECONDS
            while better := await router.late(answer, seconds=until - time.monotonic()):
                answer = better
                send({"late": _answer_object(answer)})
        except RouterError as error:
            send({"error": str(error)})
        except Exception:
            log.exception("console: request failed")
            send({"error": "The request failed. See the api-server's log."})
        finally:
            send({"end": True})
            self._used_at = time.monotonic()

    async def _opened(self) -> Router:
        async with self._lock:
            self._used_at = time.monotonic()
            if self._router is None:
                # In a thread, because importing the search engine takes a second.
                answering = await asyncio.to_thread(importlib.import_module, "router.answering.router")
                addresses = await asyncio.to_thread(self._addresses)
                folder: Path = config_folder()
                config = await asyncio.to_thread(load_config, folder)
                router: Router = answering.Router(addresses, config, folder, data_folder())
                await router.open()
                self._router = router
                self._closer = asyncio.create_task(self._close_when_idle(), name="router console ask idle")
            return self._router

    async def _close_when_idle(self) -> None:
        # Time passes without an event to wait for.
        while self._running or time.monotonic() - self._used_at < IDLE_SECONDS:  # noqa: ASYNC110
            await asyncio.sleep(IDLE_CHECK_SECONDS)
        await self._close_router()

    async def _close_router(self) -> None:
        async with self._lock:
            router, self._router = self._router, None
            if router is not None:
                await router.close(grace_seconds=GRACE_SECONDS)


async def _json_lines(lines: asyncio.Queue[dict[str, Any]]) -> AsyncIterator[bytes]:
    """Yields the lines until the last, with keep-alive lines between them."""
    while True:
        getting = asyncio.ensure_future(lines.get())
        try:
            await asyncio.wait({getting}, timeout=KEEP_ALIVE_SECONDS)
            line = getting.result() if getting.done() else {"alive": True}
        finally:
            getting.cancel()
        yield as_line(line)
        if "end" in line:
            return


def _event_object(event: Event) -> dict[str, Any]:
    return {**asdict(event), "kind": event.kind.value, "call": _call_object(event.call)}


def _answer_object(answer: Answer) -> dict[str, Any]:
    text = answer.text
    if len(text) > MAX_ANSWER_CHARACTERS:
        more = len(text) - MAX_ANSWER_CHARACTERS
        text = f"{text[:MAX_ANSWER_CHARACTERS]}\n(Truncated: {more:,} more characters in the table tasks.)"
    rank = answer.rank.name.lower().replace("_", " ")
    calls = [_call_object(call) for call in answer.calls]
    return {**asdict(answer), "text": text, "rank": rank, "calls": calls}


def _call_object(call: Any) -> dict[str, Any] | None:
    if call is None:
        return None
    return {
        **asdict(call), "call_id": str(call.call_id), "role": call.role.value,
        "rank": call.rank.name.lower().replace("_", " "),
        "outcome": call.outcome.value if call.outcome else None,
    }  # fmt: skip
