"""Endpoint of chat completions, whole or as server-sent events.

A request whose client disconnects is canceled.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from router.answering import Answer, Router
from router.background import cancel_and_wait
from router.errors import (
    BackendUnavailable,
    CapacityExceeded,
    ContextLengthExceeded,
    DatabaseError,
    InputError,
    LimiterError,
    ModelFailed,
)
from router.request import RequestError
from router.server.middleware import ClientGone, Limits, read_body, request_client
from router.server.requests import Catalog, ChatRequest, invalid_request, parse_chat
from router.server.responses import (
    KEEP_ALIVE,
    ApiError,
    ApiResponse,
    EventStream,
    Reply,
    event,
    role_event,
    routing_of,
)
from router.server.slots import Slots, Uploads
from router.task import AnswerRank

log = logging.getLogger("router.serve")

HOLD_SECONDS = 2.0  # before a stream starts, so that early errors have an HTTP status
UNAVAILABLE_RETRY_SECONDS = 5.0
UPLOADS_PER_SLOT = 2  # bodies that may be arriving, for each request in progress
MAX_SHOWN = 50  # characters of a header in an error
LARGE_BODY_BYTES = 256 * 1024  # parsing a larger one would block the event loop for milliseconds
STREAM_HEADERS = {
    "cache-control": "no-store",
    "x-accel-buffering": "no",  # some proxies would buffer the events
}


class ChatCompletions:
    """ASGI endpoint; answers up to `limits.max_concurrency` requests at the same time."""

    def __init__(self, router: Router, limits: Limits, several_clients: Callable[[], bool]) -> None:
        self._router = router
        self._limits = limits
        self._uploads = Uploads(UPLOADS_PER_SLOT * limits.max_concurrency)
        self._slots = Slots(limits.max_concurrency, several_clients)
        self._answering: set[asyncio.Task[Answer]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        document = await self._read_json(request)
        with self._slots.take(request.user.username):
            catalog = await read_catalog(self._router, request.user.models)
            await self._answer(request, parse_chat(document, catalog), catalog, send)

    def cancel(self) -> None:
        """Cancels all requests in progress; their clients are asked to retry."""
        for answering in self._answering:
            answering.cancel()

    async def _read_json(self, request: Request) -> Any:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "Send JSON, with `Content-Type: application/json`.")
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if encoding != "identity":
            shown = encoding[:MAX_SHOWN]
            raise ApiError(415, f"The body is encoded as {shown!r}. Send it without Content-Encoding.")
        content = await read_body(request, self._limits, self._uploads)
        try:
            if len(content) > LARGE_BODY_BYTES:
                return await asyncio.to_thread(json.loads, content)
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"We could not parse the JSON body of your request: {error}.") from error

    async def _answer(self, request: Request, chat: ChatRequest, catalog: Catalog, send: Send) -> None:
        began = time.monotonic()
        request_id: str = request.state.request_id
        loop = asyncio.get_running_loop()
        asking = self._ask_router(chat, request)
        answering = loop.create_task(asking, name=f"router chat {request_id}")
        disconnect = loop.create_task(_disconnected(request), name=f"router client of {request_id}")
        self._answering.add(answering)
        keep_alive = self._limits.keep_alive_seconds
        completion = _Completion(chat, catalog, answering, disconnect, keep_alive_seconds=keep_alive)
        try:
            response = await completion.response()
            await response(request.scope, request.receive, send)
        finally:
            await cancel_and_wait(disconnect, answering)
            self._answering.discard(answering)
        log.info("%s client=%s model=%s: %s in %.2f s", request_id, request.user.username,
                 chat.requested_model, completion.outcome, time.monotonic() - began)  # fmt: skip

    async def _ask_router(self, chat: ChatRequest, request: Request) -> Answer:
        return await self._router.answer(
            chat.request, category=chat.category, deadline_seconds=chat.deadline_seconds,
            client=request_client(request), models=request.user.models,
        )  # fmt: skip


async def read_catalog(router: Router, allowed: frozenset[str] | None) -> Catalog:
    """Returns what a key with these models (None: all) can request now: models may change at runtime."""
    config = router.config
    in_use = [model for model in await router.models() if allowed is None or model.model in allowed]
    max_tokens = {model.model: model.max_tokens for model in in_use}
    return Catalog(max_tokens, tuple(sorted(config.categories)), config.fallback.max_tokens)


class _Completion:
    """Response to one chat request: waits for the answer as long as the client is connected."""

    def __init__(
        self, chat: ChatRequest, catalog: Catalog, answering: asyncio.Task[Answer],
        disconnect: asyncio.Task[None], *, keep_alive_seconds: float,
    ) -> None:  # fmt: skip
        self.outcome = "no answer"
        self._chat = chat
        self._catalog = catalog
        self._answering = answering
        self._disconnect = disconnect
        self._keep_alive_seconds = keep_alive_seconds
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    async def response(self) -> Response:
        """Returns the response. Raises ApiError, or ClientGone if the client disconnects first."""
        await self._wait(HOLD_SECONDS if self._chat.stream else None)
        model, headers = self._chat.requested_model, {}
        if self._answering.done():
            reply = self._reply()
            if not self._chat.stream:
                return ApiResponse(reply.completion(), headers=reply.headers())
            model, headers = reply.model, reply.headers()
        return EventStream(self._events(model), headers={**STREAM_HEADERS, **headers})

    async def _events(self, model: str) -> AsyncIterator[bytes]:
        usage = self._chat.include_usage
        yield role_event(self._id, self._created, model, include_usage=usage)
        while not self._answering.done():
            if not await self._wait(self._keep_alive_seconds):
                yield KEEP_ALIVE
        try:
            reply = self._reply()
        except ApiError as error:
            self.outcome = f"{error.status} {error}"
            yield event(error.document)
            return
        except Exception:
            log.exception("unexpected error in a stream")
            yield event(ApiError(500, "Internal server error. The server's log has the details.").document)
            return
        for chunk in reply.events(include_usage=usage):
            yield chunk

    async def _wait(self, seconds: float | None) -> bool:
        """Waits for the answer; returns whether it is there. Raises ClientGone on a disconnect."""
        tasks = {self._answering, self._disconnect}
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if self._disconnect.done() and not self._answering.done():
            raise ClientGone("the client disconnected before there was an answer")
        return self._answering.done()

    def _reply(self) -> Reply:
        if self._answering.cancelled():
            message = "The server is stopping. Retry later."
            raise ApiError(503, message, code="stopping", retry_after_seconds=UNAVAILABLE_RETRY_SECONDS)
        error = self._answering.exception()
        if isinstance(error, Exception):
            raise _api_error(error) from error
        answer = self._answering.result()
        if answer.rank is AnswerRank.PASSAGES:
            raise _no_answer(answer)
        max_tokens = self._catalog.max_tokens(answer.model, answer.rank, self._chat.request.max_tokens)
        reply = Reply(answer, self._id, self._created, max_tokens, self._chat.stops)
        provisional = " (provisional)" if answer.provisional else ""
        self.outcome = f"answered by {reply.model}{provisional}, task {answer.task_id}"
        return reply


def _no_answer(answer: Answer) -> ApiError:
    """Returns the error for an answer without a model; its `router` field has the passages."""
    passages = answer.text if answer.sources else None
    routing = {**routing_of(answer), "passages": passages}
    found = "router.passages has the relevant passages." if passages else "No relevant passages were found."
    if any(call.sent_seconds is not None for call in answer.calls):
        message = f"No model answered before the deadline. {found}"
        return ApiError(504, message, code="no_answer", routing=routing)
    waits = [call.retry_after_seconds for call in answer.calls if call.retry_after_seconds is not None]
    if waits:
        message, retry = f"All models are at capacity until the deadline. {found}", min(waits)
        return ApiError(429, message, code="rate_limit_exceeded", retry_after_seconds=retry, routing=routing)
    message, retry = f"No model is available. {found}", UNAVAILABLE_RETRY_SECONDS
    return ApiError(503, message, code="unavailable", retry_after_seconds=retry, routing=routing)


def _api_error(error: Exception) -> Exception:
    """Returns what the client receives for an error of the router; other errors are returned unchanged."""
    if isinstance(error, CapacityExceeded):
        return ApiError(
            429, str(error), code="rate_limit_exceeded", retry_after_seconds=error.retry_after_seconds
        )
    if isinstance(error, ContextLengthExceeded):
        return ApiError(400, str(error), param="messages", code="context_length_exceeded")
    if isinstance(error, InputError):
        return (
            invalid_request(error)
            if isinstance(error, RequestError)
            else ApiError(422, str(error), param="messages")
        )
    if isinstance(error, ModelFailed):
        return ApiError(502, str(error), code="model_failed")
    if isinstance(error, (LimiterError, DatabaseError, BackendUnavailable)):
        log.error("%s: %s", type(error).__name__, error)  # addresses are not for clients
        message = "A service that the router needs is unavailable. The server's log has the details."
        return ApiError(503, message, code="unavailable", retry_after_seconds=UNAVAILABLE_RETRY_SECONDS)
    return error


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
