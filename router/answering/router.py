"""Answers single prompts: the entry point of the library.

async with Router.from_config() as router:
    answer = await router.answer("Why is the sky blue?")
    better = await router.late(answer)
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

from router.answering.answer import (
    MAX_DEADLINE_SECONDS,
    MAX_TOKENS,
    MIN_DEADLINE_SECONDS,
    Answer,
    CallSummary,
    Event,
    EventKind,
    Listener,
)
from router.answering.plan import RequestOptions
from router.answering.progress import unanswered
from router.answering.request import Request
from router.answering.service import FIRST_CONTACT_SECONDS, AnsweringService
from router.background import result_or_none, spawn
from router.classification import Classification
from router.errors import CapacityExceeded, InputError, ModelFailed, unknown
from router.models import RosterModel, check_request
from router.request import Conversation, ModelRequest, read_request
from router.settings import (
    Addresses,
    RouterConfig,
    addresses_from_environment,
    config_folder,
    data_folder,
    load_config,
)
from router.task import Role, checked_client
from router.traffic import TrafficTarget

__all__ = ["Answer", "CallSummary", "Event", "EventKind", "Listener", "Role", "Router"]

Prompt = str | Mapping[str, Any] | ModelRequest
BUSY_RETRY_SECONDS = 1.0
MAX_HELD_FACTOR = 20  # times `max_concurrency`: requests held for late answers, or because Postgres hangs
MAX_PROVISIONAL = 1000  # provisional answers that can still be improved
CANCEL_SECONDS = 3.0  # for canceled calls to be logged
CONTACT_SHARE = 0.8  # of the time left, that a request waits for the first contact with Postgres


class Router:
    """Answers prompts, up to `max_concurrency` at the same time.

    Use it as `async with`. Otherwise `answer` opens it implicitly, and it closes as soon as no request is in
    progress and no late answer is pending.
    """

    def __init__(
        self, addresses: Addresses, config: RouterConfig, folder: Path, data: Path | None = None
    ) -> None:
        """`folder` contains `knowledge/`. Its index is stored in `data`, or in memory if that is None."""
        self.addresses = addresses
        self.config = config
        self._folder = folder
        self._data = data
        self._service: AnsweringService | None = None
        self._lock = asyncio.Lock()
        self._opening: set[asyncio.Task[AnsweringService]] = set()
        self._requests: set[Request] = set()
        self._provisional: dict[uuid.UUID, Request] = {}  # by the first call, oldest first
        self._answering = 0
        self._entered = False
        self._closing: asyncio.Task[None] | None = None
        self._closed = asyncio.Event()
        self._closed.set()

    @classmethod
    def from_config(cls, folder: Path | None = None, environment: Mapping[str, str] | None = None) -> Self:
        """Returns a router for `config/*.yaml` and the addresses of the environment. Raises ConfigError."""
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
        """Connects and starts the lease, and the classifier unless `classify` is false.

        Postgres and Redis may be unavailable; until both are back, requests are answered from knowledge.
        """
        self._entered = True
        service = await self._open_service(classify=classify)
        await service.until_contact(FIRST_CONTACT_SECONDS)
        if classify:
            await service.until_classifier()

    async def close(self, *, grace_seconds: float = 0.0) -> None:
        """Closes everything. Calls in progress may end within `grace_seconds`, then they are canceled."""
        waiting = {asyncio.ensure_future(request.ended.wait()) for request in self._requests}
        if waiting:
            await asyncio.wait(waiting, timeout=grace_seconds)
            for request in self._requests:
                request.cancel("the router was closed")
            await asyncio.wait(waiting, timeout=CANCEL_SECONDS)
        for waiter in waiting:
            waiter.cancel()
        for request in list(self._requests):
            await request.stop()
        self._entered = False
        service, self._service = self._service, None
        if service is None:
            await self._closed.wait()  # it may be closing by itself
            return
        self._closed.clear()
        try:
            await service.close()
        finally:
            self._closed.set()

    async def answer(
        self, prompt: Prompt, *, category: str | None = None, model: str | None = None,
        deadline_seconds: float | None = None, max_tokens: int | None = None,
        client: str = "", models: frozenset[str] | None = None, on_event: Listener | None = None,
    ) -> Answer:  # fmt: skip
        """Returns the best answer that is available by the deadline (default: the category's).

        `prompt` is a text, or a request with messages and parameters as in OpenAI's API.

        The deadline counts from this call, also where the router is opened implicitly. If no model answered,
        `Answer.model` is None and the text consists of retrieved passages, if there are any. With `model`
        only that model is called. Canceling this coroutine ends the calls in progress.

        Raises CapacityExceeded if too many requests are in progress, or if `model` is given and gets no
        permit in time; ModelFailed if `model` is given and fails, or does not answer by the deadline;
        InputError for an invalid prompt or option. `client` is the one at whose request it runs, and
        `models` are those that it may use (None: all).
        """
        began = time.monotonic()
        request = self._request(prompt)
        model = model or request.pin
        max_tokens = request.max_tokens if max_tokens is None else max_tokens
        _check_numbers(deadline_seconds, max_tokens)
        if category is not None and category not in self.config.categories:
            raise unknown(category, self.config.categories, "category")
        self._check_capacity()
        self._answering += 1
        try:
            options = RequestOptions(
                request, model, deadline_seconds, max_tokens, checked_client(client), models, began
            )
            service = await self._service_in_time(options, category)
            if model is not None:
                if service is None or not service.has_roster:
                    raise ModelFailed(
                        f"{model} was not called: Postgres is unavailable. Retry when it is back."
                    )
                if model not in service.roster.models:
                    raise unknown(model, service.roster.models, "model in use")
            if service is None:
                return unanswered(began, category or self.config.default_category)
            return await self._answer(service, options, category, on_event)
        finally:
            self._answering -= 1
            self._close_if_unused()

    async def late(self, answer: Answer, *, seconds: float | None = None) -> Answer | None:
        """Waits for an answer better than this one; returns None once none can come.

        Waits at most `seconds`, and `answering.late_seconds`. A late answer is stored in any case.
        """
        request = self._provisional.get(answer.calls[0].call_id) if answer.calls else None
        if request is None or not answer.provisional:
            return None
        if seconds is None:
            return await request.better(answer.rank)
        return await result_or_none(request.better(answer.rank), max(0.0, seconds), "router late answer")

    async def set_client_limit(self, client: str, limit: TrafficTarget | None) -> None:
        """Limits the requests of a client to this router, over all models; None: no limit.

        Raises LimiterError if Redis is unavailable.
        """
        service = await self._open_service(classify=False)
        await service.context.limiter.set_client_limit(client, limit)

    async def models(self) -> tuple[RosterModel, ...]:
        """Returns the models in use, by name."""
        service = await self._open_service(classify=False)
        await service.until_contact(FIRST_CONTACT_SECONDS)
        self._close_if_unused()
        return tuple(service.roster.models[name] for name in sorted(service.roster.models))

    async def _answer(
        self,
        service: AnsweringService,
        options: RequestOptions,
        category: str | None,
        on_event: Listener | None,
    ) -> Answer:
        request = Request(service.context, options, on_event)

        async def classify(chat: Conversation, seconds: float) -> Classification:
            if category is not None:
                return Classification(category, 1.0, "given by the caller")
            return await service.classify(chat, seconds)

        self._requests.add(request)
        asyncio.get_running_loop().create_task(self._discard_ended(request), name="router end of request")
        answer = await request.answer(classify)
        if answer.provisional:
            for call in answer.calls[:1]:
                self._provisional[call.call_id] = request
            while len(self._provisional) > MAX_PROVISIONAL:
                del self._provisional[next(iter(self._provisional))]
        return answer

    async def _discard_ended(self, request: Request) -> None:
        await request.ended.wait()
        self._requests.discard(request)

    async def _service_in_time(
        self, options: RequestOptions, category: str | None
    ) -> AnsweringService | None:
        """Returns the service, if time allows after its first contact; None if it is not open in time."""
        config = self.config.answering
        of_category = config.deadline_of(category) if category else config.default_deadline_seconds
        ends_at = options.began + (options.deadline_seconds or of_category)
        classify = category is None and options.model is None
        opening = spawn(self._open_service(classify=classify), "open", self._opening)
        opening.add_done_callback(self._opened)
        await asyncio.wait({opening}, timeout=ends_at - time.monotonic())
        if not opening.done():
            return None
        service = opening.result()
        await service.until_contact(CONTACT_SHARE * (ends_at - time.monotonic()))
        return service

    def _opened(self, opening: asyncio.Task[AnsweringService]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            self._close_if_unused()

    async def _open_service(self, *, classify: bool) -> AnsweringService:
        async with self._lock:
            if self._service is None:
                service = AnsweringService(
                    self.addresses, self.config, self._folder, self._data, self._open_calls
                )
                await service.open()
                self._service = service
            if classify:
                await self._service.start_classifier()
            return self._service

    def _close_if_unused(self) -> None:
        """Closes a router that was opened implicitly, once no late answer is pending."""
        if self._entered or self._answering or self._service is None:
            return
        if self._closing is None or self._closing.done():
            self._closing = asyncio.get_running_loop().create_task(
                self._close_when_ended(), name="router close when ended"
            )

    async def _close_when_ended(self) -> None:
        try:
            while self._requests:
                await asyncio.wait({asyncio.ensure_future(each.ended.wait()) for each in self._requests})
            async with self._lock:
                if not (self._entered or self._answering or self._requests):
                    await self.close()
        except asyncio.CancelledError:  # the event loop ends
            await self.close()
            raise

    def _open_calls(self) -> set[uuid.UUID]:
        return {call_id for request in self._requests for call_id in request.open_calls}

    def _check_capacity(self) -> None:
        limit, held = self.config.answering.max_concurrency, len(self._requests)
        if self._answering >= limit:
            raise CapacityExceeded(
                f"{self._answering} requests are in progress, the maximum. Retry later.", BUSY_RETRY_SECONDS
            )
        if held >= MAX_HELD_FACTOR * limit:
            raise CapacityExceeded(
                f"{held} requests are waiting for late answers, the maximum. Retry later.", BUSY_RETRY_SECONDS
            )

    def _request(self, prompt: Prompt) -> ModelRequest:
        if isinstance(prompt, Mapping):
            prompt = read_request(dict(prompt))
        request = prompt if isinstance(prompt, ModelRequest) else ModelRequest.of_prompt(prompt)
        self._check_prompt(request.conversation.text)
        check_request(self.config, request)
        return request

    def _check_prompt(self, prompt: str) -> None:
        limit = self.config.answering.max_prompt_bytes
        if not isinstance(prompt, str):
            raise InputError(f"The prompt must be text, not {type(prompt).__name__}.")
        if not prompt.strip():
            raise InputError("The prompt is empty.")
        try:
            size = len(prompt) if len(prompt) > limit else len(prompt.encode())
        except UnicodeEncodeError as error:
            raise InputError(
                f"The prompt is not valid Unicode: half a surrogate pair at character {error.start + 1}."
            ) from error
        if size > limit:
            raise InputError(f"The prompt is too long: at least {size} bytes, the limit is {limit}.")
        if "\x00" in prompt:
            raise InputError(f"The prompt contains a NUL character at {prompt.index(chr(0)) + 1}. Remove it.")


def _check_numbers(deadline_seconds: float | None, max_tokens: int | None) -> None:
    low, high = MIN_DEADLINE_SECONDS, MAX_DEADLINE_SECONDS
    if deadline_seconds is not None and not low <= deadline_seconds <= high:
        raise InputError(f"The deadline must be {low:g} to {high:g} s, not {deadline_seconds:g} s.")
    if max_tokens is not None and not 1 <= max_tokens <= MAX_TOKENS:
        raise InputError(f"max_tokens must be 1 to {MAX_TOKENS}, not {max_tokens}.")
