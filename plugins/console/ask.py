"""Asking from the console: one router for all who ask, opened by the first and closed when idle."""

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

from .live import as_line

if TYPE_CHECKING:
    from router.answering import Answer, Event, Router

log = logging.getLogger("router.console")

MOST_AT_ONCE = 20
IDLE_SECONDS = 300.0
LOOK_SECONDS = 10.0
GRACE_SECONDS = 1.0
LATE_SECONDS = 120.0
ALIVE_SECONDS = 2.0  # a line at least so often, so that a page sees that nothing broke
LONGEST_ANSWER = 200_000


class Asked(BaseModel):
    """What is asked; the words are those of `router ask`."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, max_length=1_000_000)
    category: str | None = None
    model: str | None = None
    deadline_seconds: float | None = Field(default=None, gt=0, le=3600)


class Asks:
    """Answers prompts; each answering goes on to its end, whether its page still listens or not."""

    def __init__(self, addresses: Callable[[], Addresses]) -> None:
        self._addresses = addresses
        self._router: Router | None = None
        self._lock = asyncio.Lock()
        self._running: set[asyncio.Task[None]] = set()
        self._used_at = 0.0
        self._closer: asyncio.Task[None] | None = None

    async def stream(self, asked: Asked) -> AsyncIterator[bytes]:
        """What happens, a JSON line each: `event`s, the `answer`, a `late` one, an `error`; last `end`."""
        if len(self._running) >= MOST_AT_ONCE:
            raise CapacityExceeded(
                f"{len(self._running)} prompts are being answered here, the most at once.", 1.0
            )
        lines: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        task = asyncio.create_task(self._answer(asked, lines.put_nowait), name="router console ask")
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return _told(lines)

    async def close(self) -> None:
        """Give up what is under way."""
        await cancel_and_wait(*self._running, *filter(None, [self._closer]))
        await self._close_router()

    async def _answer(self, asked: Asked, tell: Callable[[dict[str, Any]], None]) -> None:
        try:
            router = await self._opened()
            answer = await router.answer(
                asked.prompt, category=asked.category or None, model=asked.model or None,
                deadline_seconds=asked.deadline_seconds,
                on_event=lambda event: tell({"event": _event_object(event)}),
            )  # fmt: skip
            tell({"answer": _answer_object(answer)})
            until = time.monotonic() + LATE_SECONDS
            while better := await router.late(answer, seconds=until - time.monotonic()):
                answer = better
                tell({"late": _answer_object(answer)})
        except RouterError as error:
            tell({"error": str(error)})
        except Exception:
            log.exception("asking from the console failed")
            tell({"error": "Asking failed. The api-server's log says why."})
        finally:
            tell({"end": True})
            self._used_at = time.monotonic()

    async def _opened(self) -> Router:
        async with self._lock:
            self._used_at = time.monotonic()
            if self._router is None:
                # In a thread: it brings the search engine with it.
                answering = await asyncio.to_thread(importlib.import_module, "router.answering.router")
                addresses = await asyncio.to_thread(self._addresses)
                folder: Path = config_folder()
                config = await asyncio.to_thread(load_config, folder)
                router: Router = answering.Router(addresses, config, folder, data_folder())
                await router.open()
                self._router = router
                self._closer = asyncio.create_task(self._close_when_idle(), name="router console asks idle")
            return self._router

    async def _close_when_idle(self) -> None:
        while self._running or time.monotonic() - self._used_at < IDLE_SECONDS:  # noqa: ASYNC110 - it ages
            await asyncio.sleep(LOOK_SECONDS)
        await self._close_router()

    async def _close_router(self) -> None:
        async with self._lock:
            router, self._router = self._router, None
            if router is not None:
                await router.close(grace_seconds=GRACE_SECONDS)


async def _told(lines: asyncio.Queue[dict[str, Any]]) -> AsyncIterator[bytes]:
    """The lines as they come, until the last; between them signs of life."""
    while True:
        getting = asyncio.ensure_future(lines.get())
        try:
            await asyncio.wait({getting}, timeout=ALIVE_SECONDS)
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
    if len(text) > LONGEST_ANSWER:
        more = len(text) - LONGEST_ANSWER
        text = f"{text[:LONGEST_ANSWER]}\n(The rest, {more:,} characters, is in tasks.)"
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
