"""One path of the server: a chat completion, whole or as a stream of events.

A request whose client hangs up is given up: the router's `answer` is cancelled, and says itself what becomes
of calls that are already with a model.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Protocol

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from router.answering import Answer
from router.background import cancel_and_wait
from router.errors import (
    BackendUnavailable,
    CapacityExceeded,
    DatabaseError,
    InputError,
    LimiterError,
    ModelFailed,
)
from router.server.middleware import ClientGone, Limits, RequestInfo, read_body, send_head, send_json
from router.server.requests import Catalog, ChatRequest, read_chat
from router.server.responses import KEEP_ALIVE, ApiError, Reply, event, role_event
from router.task import AnswerRank

log = logging.getLogger("router.serve")

HOLD_SECONDS = 2.0  # a stream begins so late, so that what goes wrong at once still has a status of its own
AWAY_RETRY_SECONDS = 5.0
FULL_RETRY_SECONDS = 1.0
LARGE_BODY_BYTES = 256 * 1024  # above it, parsing would hold the loop for milliseconds

STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    "x-accel-buffering": "no",  # some proxies would keep the pieces until there are many
}


ReadCatalog = Callable[[], Awaitable[Catalog]]


class Answering(Protocol):
    """What the server needs of `router.answering.Router`."""

    async def answer(
        self, prompt: str, *, category: str | None = None, model: str | None = None,
        deadline_seconds: float | None = None, max_tokens: int | None = None,
    ) -> Answer: ...  # fmt: skip


class Chats:
    """Answers chat requests, at most `limits.at_once` at a time. Plain ASGI, behind the door."""

    def __init__(self, router: Answering, catalogue: ReadCatalog, limits: Limits) -> None:
        self._router = router
        self._catalogue = catalogue
        self._limits = limits
        self._places_taken = 0
        self._asking: set[asyncio.Task[Answer]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._place():
            document = await self._document(scope, receive)
            catalogue = await self._catalogue()
            await self._answer(read_chat(document, catalogue), catalogue, scope["visit"], receive, send)

    def give_up(self) -> None:
        """Cancel what is still being asked; its clients are told to come again."""
        for asking in self._asking:
            asking.cancel()

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        """One of the places for requests at once, taken before a body is read."""
        if self._places_taken >= self._limits.at_once:
            message = f"{self._limits.at_once} requests are being answered, which is the most at once."
            raise ApiError(503, message, code="overloaded", retry_after_seconds=FULL_RETRY_SECONDS)
        self._places_taken += 1
        try:
            yield
        finally:
            self._places_taken -= 1

    async def _document(self, scope: Scope, receive: Receive) -> Any:
        kind = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "Send JSON, with `Content-Type: application/json`.")
        content = await read_body(scope, receive, self._limits)
        try:
            if len(content) > LARGE_BODY_BYTES:
                return await asyncio.to_thread(json.loads, content)
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"We could not parse the JSON body of your request: {error}.") from error

    async def _answer(
        self, asked: ChatRequest, catalogue: Catalog, visit: RequestInfo, receive: Receive, send: Send
    ) -> None:
        began = time.monotonic()
        loop = asyncio.get_running_loop()
        asking = loop.create_task(self._asked(asked), name=f"router chat {visit.request_id}")
        gone = loop.create_task(_until_gone(receive), name=f"router client of {visit.request_id}")
        self._asking.add(asking)
        try:
            alive = self._limits.keep_alive_seconds
            conversation = _Conversation(asked, catalogue, asking, gone, send=send, keep_alive_seconds=alive)
            await (conversation.stream() if asked.stream else conversation.whole())
        finally:
            await cancel_and_wait(gone, asking)
            self._asking.discard(asking)
        log.info("%s %s asked %s: %s in %.2f s", visit.request_id, visit.client, asked.asked_model,
                 conversation.outcome, time.monotonic() - began)  # fmt: skip

    async def _asked(self, asked: ChatRequest) -> Answer:
        return await self._router.answer(
            asked.prompt, category=asked.category, model=asked.model,
            deadline_seconds=asked.deadline_seconds, max_tokens=asked.max_tokens,
        )  # fmt: skip


class _Conversation:
    """One request from the moment when it is asked: waits for the answer as long as the client does."""

    def __init__(
        self, asked: ChatRequest, catalogue: Catalog, asking: asyncio.Task[Answer],
        gone: asyncio.Task[None], *, send: Send, keep_alive_seconds: float,
    ) -> None:  # fmt: skip
        self.outcome = "no answer"
        self._asked = asked
        self._catalogue = catalogue
        self._asking = asking
        self._gone = gone
        self._send = send
        self._keep_alive_seconds = keep_alive_seconds
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    async def whole(self) -> None:
        """The answer in one piece."""
        await self._wait(None)
        reply = self._reply()
        await send_json(self._send, 200, reply.completion(), reply.headers())

    async def stream(self) -> None:
        """The answer as events; signs of life until it is there."""
        await self._wait(HOLD_SECONDS)
        here = self._asking.done()
        model = self._asked.asked_model
        headers = dict(STREAM_HEADERS)
        if here:
            reply = self._reply()
            model = reply.model
            headers.update(reply.headers())
        await send_head(self._send, 200, headers)
        usage = self._asked.include_usage
        await self._piece(role_event(self._id, self._created, model, include_usage=usage))
        while not self._asking.done():
            if not await self._wait(self._keep_alive_seconds):
                await self._piece(KEEP_ALIVE)
        await self._rest()
        await self._piece(b"", more=False)

    async def _rest(self) -> None:
        try:
            reply = self._reply()
        except ApiError as error:
            self.outcome = f"{error.status} {error}"
            await self._piece(event(error.document))
            return
        except Exception:
            log.exception("a fault of the program, in the middle of a stream")
            await self._piece(event(ApiError(500, "The server made a mistake; its log has it.").document))
            return
        for piece in reply.events(include_usage=self._asked.include_usage):
            await self._piece(piece)

    async def _wait(self, seconds: float | None) -> bool:
        """Whether there is an answer, or none to come, within `seconds`. ClientGone if the client hung up."""
        await asyncio.wait({self._asking, self._gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if self._gone.done() and not self._asking.done():
            raise ClientGone("the client hung up before there was an answer")
        return self._asking.done()

    def _reply(self) -> Reply:
        if self._asking.cancelled():
            message = "The server stops. Ask again."
            raise ApiError(503, message, code="stopping", retry_after_seconds=AWAY_RETRY_SECONDS)
        error = self._asking.exception()
        if isinstance(error, Exception):
            raise _said(error) from error
        asked, answer = self._asked, self._asking.result()
        if answer.rank is AnswerRank.PASSAGES and not answer.sources:
            raise _nothing(answer)
        most = self._catalogue.longest(answer.model, answer.rank, asked.max_tokens)
        reply = Reply(answer, self._id, self._created, most, asked.stops)
        later = ", for now" if answer.provisional else ""
        self.outcome = f"answered by {reply.model}{later}, task {answer.task_id}"
        return reply

    async def _piece(self, body: bytes, *, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})


def _nothing(answer: Answer) -> ApiError:
    """What a client is told if neither a model nor knowledge has an answer."""
    words = "and nothing about this is known here."
    if any(call.sent_seconds is not None for call in answer.calls):
        return ApiError(504, f"No model answered within the deadline, {words}", code="no_answer")
    waits = [call.retry_after_seconds for call in answer.calls if call.retry_after_seconds is not None]
    if waits:
        message = f"No model has room for this prompt in time, {words}"
        return ApiError(429, message, code="rate_limit_exceeded", retry_after_seconds=min(waits))
    message = f"No model can be asked now, {words}"
    return ApiError(503, message, code="unavailable", retry_after_seconds=AWAY_RETRY_SECONDS)


def _said(error: Exception) -> Exception:
    """What a client is told of an error; one that is no word of ours stays what it is, and becomes 500."""
    if isinstance(error, CapacityExceeded):
        return ApiError(
            429, str(error), code="rate_limit_exceeded", retry_after_seconds=error.retry_after_seconds
        )
    if isinstance(error, InputError):
        return ApiError(422, str(error), param="messages")
    if isinstance(error, ModelFailed):
        return ApiError(502, str(error), code="model_failed")
    if isinstance(error, (LimiterError, DatabaseError, BackendUnavailable)):
        log.error("%s: %s", type(error).__name__, error)  # where things are is nothing for clients
        message = "Something that the router needs is away; its log says what."
        return ApiError(503, message, code="unavailable", retry_after_seconds=AWAY_RETRY_SECONDS)
    return error


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
