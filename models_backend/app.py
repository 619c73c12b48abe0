"""HTTP paths. /single and /batch are plain ASGI, so that one process holds thousands of calls."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from models_backend.access import AccessGuard
from models_backend.arrivals import Arrival, Arrivals, as_document
from models_backend.calls import BadCall, Call, CallHandler, Manner, Reply, read_call, read_json
from models_backend.conditions import Condition, Conditions
from models_backend.faults import FaultOrder, Faults
from models_backend.provider import Provider
from models_backend.settings import StandInSettings

CLIENT_GONE = 499  # the client disconnected before the answer
DRIP_SECONDS = 0.1  # between two bytes


def create_app(settings: StandInSettings) -> FastAPI:
    """The ASGI application; its lifespan writes the arrival log and holds connections."""
    arrivals = Arrivals(settings.arrival_log)
    faults = Faults(settings.seed)
    provider = Provider(settings.provider) if settings.provider else None
    conditions = Conditions(settings.seed)
    handler = CallHandler(settings, faults, conditions, provider)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(arrivals.writing())
            if provider is not None:
                await stack.enter_async_context(provider)
            yield

    app = FastAPI(title="Models Backend (stand-in)", lifespan=lifespan)
    single, batch = _SingleEndpoint(settings, handler, arrivals), _BatchEndpoint(settings, handler, arrivals)
    app.router.routes.insert(0, Route("/single", single, methods=["POST"]))
    app.router.routes.insert(1, Route("/batch", batch, methods=["POST"]))
    _add_reading_paths(app, settings, arrivals, conditions)
    _add_fault_paths(app, faults)
    _add_condition_paths(app, settings, conditions, handler)
    app.add_middleware(_ArrivalClock)
    app.add_middleware(AccessGuard, access=settings.access)
    return app


def _add_reading_paths(
    app: FastAPI, settings: StandInSettings, arrivals: Arrivals, conditions: Conditions
) -> None:
    real = settings.provider.models if settings.provider else {}

    @app.get("/models")
    async def models() -> dict[str, Any]:
        """The models that can be called, with prices in USD per million tokens."""
        rows = [
            {"name": model.name, "input_price": model.input_price, "output_price": model.output_price,
             "context_tokens": model.context_tokens, "real": model.name in real}
            for model in settings.models.values()
            if conditions.serves(model.name)
        ]  # fmt: skip
        return {"models": rows}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Liveness, process id, and calls in flight."""
        in_flight = arrivals.arrived - arrivals.ended
        return {"status": "ok", "pid": os.getpid(), "arrived": arrivals.arrived, "in_flight": in_flight}

    @app.get("/arrivals")
    async def recent(
        since: Annotated[int, Query(ge=0)] = 0, limit: Annotated[int, Query(ge=0, le=10_000)] = 1000
    ) -> dict[str, Any]:
        """Ended calls from number `since` on, `next` as the following `since`, counts by model and status."""
        upto, rows = arrivals.since(since, limit)
        return {"next": upto, "counts": arrivals.counts(), "arrivals": [as_document(row) for row in rows]}


def _add_fault_paths(app: FastAPI, faults: Faults) -> None:
    def active() -> list[dict[str, Any]]:
        now = time.monotonic()
        return [
            {**fault.order.model_dump(), "seconds_left": fault.ends_at - now} for fault in faults.active()
        ]

    @app.get("/faults")
    async def listed() -> list[dict[str, Any]]:
        """The active faults."""
        return active()

    @app.post("/faults", status_code=201)
    async def ordered(order: FaultOrder) -> list[dict[str, Any]]:
        """Makes a share of a model's calls fail for a while."""
        try:
            faults.order(order)
        except ValueError as error:
            raise HTTPException(409, str(error)) from error
        return active()

    @app.delete("/faults")
    async def cleared() -> list[dict[str, Any]]:
        """Ends all faults."""
        faults.clear()
        return []


def _add_condition_paths(
    app: FastAPI, settings: StandInSettings, conditions: Conditions, handler: CallHandler
) -> None:
    @app.get("/conditions")
    async def current() -> list[Condition]:
        """The active conditions."""
        return conditions.active()

    @app.put("/conditions")
    async def changed(orders: list[Condition]) -> list[Condition]:
        """Replaces the conditions: models that fail, are slow, expensive, better, worse or missing."""
        unknown = sorted({order.model for order in orders} - set(settings.models))
        if unknown:
            raise HTTPException(409, f"no model {unknown[0]!r} is served")
        try:
            conditions.set(orders)
        except ValueError as error:
            raise HTTPException(409, str(error)) from error
        return conditions.active()

    @app.get("/flaws")
    async def known(
        since: Annotated[int, Query(ge=0)] = 0, limit: Annotated[int, Query(ge=0, le=10_000)] = 1000
    ) -> dict[str, Any]:
        """Answers from number `since` on, each with its flaw or null, and `next` as the following `since`."""
        upto, answers = handler.book.since(since, limit)
        return {"next": upto, "answers": answers}


class _ArrivalClock:
    """Records each request's arrival time before its body is read."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["arrived_at"] = time.monotonic()
        await self._app(scope, receive, send)


class _SingleEndpoint:
    """POST /single: one prompt, one answer."""

    def __init__(self, settings: StandInSettings, handler: CallHandler, arrivals: Arrivals) -> None:
        self._settings = settings
        self._desk = handler
        self._arrivals = arrivals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived_at: float = scope["arrived_at"]
        call: Call | None = None
        reply = Reply(CLIENT_GONE, b"")
        self._arrivals.begin()
        try:
            call = read_call(read_json(await _read_body(scope, receive, self._settings.max_body_bytes)))
            solved = await self._desk.solve(call, arrived_at)
            if solved.manner is Manner.HANG:
                await _client_gone(receive)
            elif solved.manner is not Manner.DRIP or await _drip(solved, receive, send):
                reply = solved
        except BadCall as error:
            reply = error.reply
        except _ClientGone:
            pass
        finally:
            _note(self._arrivals, arrived_at, call, reply)
        if reply.manner is Manner.DRIP:
            await send({"type": "http.response.body", "body": reply.body[-1:]})
        elif reply.status != CLIENT_GONE:
            await _send(send, reply)


class _BatchEndpoint:
    """POST /batch: many prompts; replies when the slowest has ended, in the order of the prompts."""

    def __init__(self, settings: StandInSettings, handler: CallHandler, arrivals: Arrivals) -> None:
        self._settings = settings
        self._desk = handler
        self._arrivals = arrivals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived_at: float = scope["arrived_at"]
        try:
            document = read_json(await _read_body(scope, receive, self._settings.max_body_bytes))
            calls = _read_batch(document, self._settings.max_batch)
        except BadCall as error:
            await _send(send, error.reply)
            return
        except _ClientGone:
            return
        names = (f"batch-call-{number}" for number in range(len(calls)))
        tasks = [asyncio.create_task(self._solve(call, arrived_at), name=next(names)) for call in calls]
        replies = await asyncio.gather(*tasks)
        if any(reply.manner is Manner.HANG for reply in replies):
            await _client_gone(receive)
            return
        results = [_result(reply) for reply in replies]
        await _send(send, Reply(200, json.dumps({"results": results}).encode()))

    async def _solve(self, call: Call, arrived_at: float) -> Reply:
        self._arrivals.begin()
        reply = Reply(CLIENT_GONE, b"")
        try:
            reply = await self._desk.solve(call, arrived_at)
        finally:
            _note(self._arrivals, arrived_at, call, reply)
        return reply


def _read_batch(document: Any, most: int) -> list[Call]:
    """Reads `{requests: [...]}` or `{model, prompts: [...], max_tokens}`."""
    if not isinstance(document, dict):
        raise BadCall(
            422, "bad_body", "the body must be a JSON object with requests, or with model and prompts"
        )
    requests, prompts = document.get("requests"), document.get("prompts")
    if requests is None and isinstance(prompts, list):
        shared = {key: value for key, value in document.items() if key != "prompts"}
        requests = [{**shared, "prompt": prompt} for prompt in prompts]
    if not isinstance(requests, list) or not 1 <= len(requests) <= most:
        raise BadCall(422, "bad_body", f"a batch must hold from 1 to {most} requests")
    return [read_call(request) for request in requests]


def _result(reply: Reply) -> dict[str, Any]:
    try:
        found = json.loads(reply.body)
    except ValueError:
        found = {"error": {"type": "garbage", "message": "a fault was ordered"}}
    return {"status": reply.status, **found}


def _note(arrivals: Arrivals, arrived_at: float, call: Call | None, reply: Reply) -> None:
    model, request_id, reserved = (
        (call.model, call.request_id, call.tokens_reserved) if call else (None, None, None)
    )
    now, request = time.monotonic(), call.request if call else None
    arrivals.end(
        Arrival(arrived_at, now, model, request_id, reserved, reply.tokens_used, reply.status, request)
    )


class _ClientGone(Exception):  # noqa: N818 - a state of the world
    """The client disconnected before its request was complete."""


async def _read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    content = bytearray()
    if announced.isdigit() and int(announced) > limit:
        raise BadCall(413, "too_large", f"the body is larger than {limit} bytes")
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _ClientGone
        content += message.get("body", b"")
        if len(content) > limit:
            raise BadCall(413, "too_large", f"the body is larger than {limit} bytes")
        if not message.get("more_body"):
            return bytes(content)


async def _client_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _start(send: Send, reply: Reply) -> None:
    headers = {"content-type": "application/json", "content-length": str(len(reply.body)), **reply.headers}
    pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": reply.status, "headers": pairs})


async def _send(send: Send, reply: Reply) -> None:
    await _start(send, reply)
    await send({"type": "http.response.body", "body": reply.body})


async def _drip(reply: Reply, receive: Receive, send: Send) -> bool:
    """Sends all but the last byte slowly; False if the client disconnected."""
    gone = asyncio.create_task(_client_gone(receive), name="drip-client-gone")
    try:
        await _start(send, reply)
        for position in range(len(reply.body) - 1):
            await send(
                {"type": "http.response.body", "body": reply.body[position : position + 1], "more_body": True}
            )
            if (await asyncio.wait({gone}, timeout=DRIP_SECONDS))[0]:
                return False
    finally:
        gone.cancel()
    return True
