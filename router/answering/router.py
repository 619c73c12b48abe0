"""Answering one prompt now, from everywhere: the library's front door.

    async with Router.from_config() as router:
        answer = await router.answer("Why is the sky blue?")
        better = await router.late(answer)

How preferred model and fallback race is in `race` (decisions), `asked` (one prompt) and `runners` (one call);
what a process needs for it is in `asker`.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from typing_extensions import Self

from router.answering.answer import Answer, CallSummary, Event, EventKind, Listener
from router.answering.plan import RequestOptions
from router.answering.request import Request
from router.answering.service import AnsweringService
from router.background import result_or_none
from router.classification import Classification
from router.errors import CapacityExceeded, InputError, ModelFailed, unknown
from router.models import RosterModel
from router.settings import (
    Addresses,
    RouterConfig,
    addresses_from_environment,
    config_folder,
    data_folder,
    load_config,
)
from router.task import Role

__all__ = ["Answer", "CallSummary", "Event", "EventKind", "Listener", "Role", "Router"]

LONGEST_DEADLINE_SECONDS = 3600.0
SHORTEST_DEADLINE_SECONDS = 0.05
LARGEST_MAX_TOKENS = 1_000_000
BUSY_RETRY_SECONDS = 1.0
MOST_HELD = 20  # times `most_at_once` prompts are held, while late answers or Postgres are waited for
MOST_PROVISIONAL = 1000  # answers for which a better one can be asked for
GIVEN_UP_SECONDS = 3.0  # after giving up, for the log to hear of it


class Router:
    """Answers prompts, as many at once as the config allows. Use it as `async with`, or just ask.

    Without `async with` it opens itself for a prompt, and closes once nothing better can come for it.
    """

    def __init__(
        self, addresses: Addresses, config: RouterConfig, folder: Path, data: Path | None = None
    ) -> None:
        """`folder` holds `knowledge/`; in `data` this host keeps its index of it, in memory if None."""
        self.addresses = addresses
        self.config = config
        self._folder = folder
        self._data = data
        self._asker: AnsweringService | None = None
        self._lock = asyncio.Lock()
        self._asked: set[Request] = set()
        self._provisional: dict[uuid.UUID, Request] = {}  # by the first call; the latest ones
        self._answering = 0
        self._entered = False
        self._closing: asyncio.Task[None] | None = None
        self._all_closed = asyncio.Event()
        self._all_closed.set()

    @classmethod
    def from_config(cls, folder: Path | None = None, environment: Mapping[str, str] | None = None) -> Self:
        """A router for `config/*.yaml` and the environment's addresses. ConfigError names what is wrong."""
        folder = folder or config_folder(environment)
        return cls(
            addresses_from_environment(environment), load_config(folder), folder, data_folder(environment)
        )

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def open(self, *, classify: bool = True) -> None:
        """Connect, begin the lease, get the categoriser ready, unless every prompt will name its category.

        Also while Postgres or Redis is away: then only knowledge answers, until they are back.
        """
        self._entered = True
        await self._opened(classify=classify)

    async def close(self, *, grace_seconds: float = 0.0) -> None:
        """Close everything. Calls under way have `grace_seconds`; then they are given up, and logged so."""
        waiting = {asyncio.ensure_future(asked.ended.wait()) for asked in self._asked}
        if waiting:
            await asyncio.wait(waiting, timeout=grace_seconds)
            for asked in self._asked:
                asked.give_up("the asker stopped")
            await asyncio.wait(waiting, timeout=GIVEN_UP_SECONDS)
        for waiter in waiting:
            waiter.cancel()
        for asked in list(self._asked):
            await asked.stop()
        self._entered = False
        asker, self._asker = self._asker, None
        if asker is None:
            await self._all_closed.wait()  # perhaps it closes by itself at this moment
            return
        self._all_closed.clear()
        try:
            await asker.close()
        finally:
            self._all_closed.set()

    async def answer(
        self, prompt: str, *, category: str | None = None, model: str | None = None,
        deadline_seconds: float | None = None, max_tokens: int | None = None,
        on_event: Listener | None = None,
    ) -> Answer:  # fmt: skip
        """The best answer within the deadline (by default that of the category), at the least passages.

        With `model` only that one is called: CapacityExceeded says when to retry if it has no permit in time,
        ModelFailed why it did not answer. InputError names what is wrong with the prompt or an option.
        Cancelled, it gives up what is under way.
        """
        self._check_prompt(prompt)
        self._check_numbers(deadline_seconds, max_tokens)
        if category is not None and category not in self.config.categories:
            raise unknown(category, self.config.categories, "category")
        if self._answering >= self.config.answering.max_concurrency:
            raise CapacityExceeded(
                f"{self._answering} prompts are being answered, the most at once.", BUSY_RETRY_SECONDS
            )
        if len(self._asked) >= MOST_HELD * self.config.answering.max_concurrency:
            raise CapacityExceeded(
                f"{len(self._asked)} prompts wait for what comes late.", BUSY_RETRY_SECONDS
            )
        self._answering += 1
        try:
            asker = await self._opened(classify=category is None and model is None)
            if model is not None:
                if not asker.knows_the_roster:
                    raise ModelFailed(f"{model} cannot be asked: Postgres is away. Try again later.")
                if model not in asker.roster.models:
                    raise unknown(model, asker.roster.models, "model in use")
            question = RequestOptions(prompt, model, deadline_seconds, max_tokens)
            return await self._ask(asker, question, category, on_event)
        finally:
            self._answering -= 1
            self._close_if_alone()

    async def late(self, answer: Answer, *, seconds: float | None = None) -> Answer | None:
        """Wait for the better answer that may come after this one; None once none can come any more.

        It takes at most `seconds`, and `asking.late_seconds`. What comes is kept for the task whether anybody
        waits or not.
        """
        asked = self._provisional.get(answer.calls[0].call_id) if answer.calls else None
        if asked is None or not answer.provisional:
            return None
        if seconds is None:
            return await asked.better(answer.rank)
        return await result_or_none(asked.better(answer.rank), max(0.0, seconds), "router waits for a better")

    async def models(self) -> tuple[RosterModel, ...]:
        """The models that can be asked now, by name."""
        asker = await self._opened(classify=False)
        self._close_if_alone()
        return tuple(asker.roster.models[name] for name in sorted(asker.roster.models))

    async def _ask(
        self,
        asker: AnsweringService,
        question: RequestOptions,
        category: str | None,
        on_event: Listener | None,
    ) -> Answer:
        asked = Request(asker.desk, question, on_event)

        async def classify(prompt: str, seconds: float) -> Classification:
            if category is not None:
                return Classification(category, 1.0, "whoever asked said so")
            return await asker.classify(prompt, seconds)

        self._asked.add(asked)
        asyncio.get_running_loop().create_task(self._forget(asked), name="router end of asking")
        answer = await asked.answer(classify)
        if answer.provisional:
            for call in answer.calls[:1]:
                self._provisional[call.call_id] = asked
            while len(self._provisional) > MOST_PROVISIONAL:
                del self._provisional[next(iter(self._provisional))]
        return answer

    async def _forget(self, asked: Request) -> None:
        await asked.ended.wait()
        self._asked.discard(asked)

    # -- opening and closing by itself --------------------------------------------------------------------

    async def _opened(self, *, classify: bool) -> AnsweringService:
        async with self._lock:
            if self._asker is None:
                asker = AnsweringService(
                    self.addresses, self.config, self._folder, self._data, self._open_calls
                )
                await asker.open()
                self._asker = asker
            if classify:
                await self._asker.start_classifier()
            return self._asker

    def _close_if_alone(self) -> None:
        """Close, once nothing better may come, what nobody entered and nobody will leave."""
        if self._entered or self._answering or self._asker is None:
            return
        if self._closing is None or self._closing.done():
            closing = self._close_when_ended()
            self._closing = asyncio.get_running_loop().create_task(closing, name="router close when ended")

    async def _close_when_ended(self) -> None:
        try:
            while self._asked:
                await asyncio.wait({asyncio.ensure_future(asked.ended.wait()) for asked in self._asked})
            async with self._lock:
                if not (self._entered or self._answering or self._asked):
                    await self.close()
        except asyncio.CancelledError:  # the event loop ends
            await self.close()
            raise

    def _open_calls(self) -> set[uuid.UUID]:
        return {call_id for asked in self._asked for call_id in asked.open_calls}

    # -- what cannot be asked -----------------------------------------------------------------------------

    def _check_prompt(self, prompt: str) -> None:
        most = self.config.answering.max_prompt_bytes
        if not isinstance(prompt, str):
            raise InputError(f"The prompt is {type(prompt).__name__}, not text. Decode it, or write it out.")
        if not prompt.strip():
            raise InputError("The prompt is empty. Write what is to be answered.")
        try:
            size = len(prompt) if len(prompt) > most else len(prompt.encode())
        except UnicodeEncodeError as error:
            raise InputError(
                f"The prompt is no valid Unicode text, at character {error.start + 1}."
            ) from error
        if size > most:
            raise InputError(f"The prompt has {size} bytes or more; at most {most} are taken. Shorten it.")
        if "\x00" in prompt:
            raise InputError(f"The prompt holds a NUL character, at {prompt.index(chr(0)) + 1}. Take it out.")

    def _check_numbers(self, deadline_seconds: float | None, max_tokens: int | None) -> None:
        low, high = SHORTEST_DEADLINE_SECONDS, LONGEST_DEADLINE_SECONDS
        if deadline_seconds is not None and not low <= deadline_seconds <= high:
            raise InputError(
                f"A deadline of {deadline_seconds:g} s cannot be met: give {low:g} to {high:g} s."
            )
        if max_tokens is not None and not 1 <= max_tokens <= LARGEST_MAX_TOKENS:
            raise InputError(f"max_tokens is {max_tokens}; give 1 to {LARGEST_MAX_TOKENS}.")
