"""Calls without a task: trials of models, and questions to a judge model.

Like every other call they need a permit of the limiter and pass through the Models Backend. Each is in the
call log with its purpose from before it is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import time
import uuid
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

import asyncpg
from typing_extensions import Self

from router.background import cancel_and_wait, result_or_none, spawn
from router.database import fetch, fetch_one, retry_while_unavailable, settled_values
from router.errors import DatabaseError, LimiterError
from router.limiter import Permit
from router.models.call_request import CallRequest
from router.models.context import context_limits, too_long
from router.models.dispatch import availability, send_permitted
from router.models.roster import RosterModel, read_roster
from router.models.services import open_services
from router.models.targets import DEFAULT_VERSION
from router.settings import Addresses, RouterConfig
from router.task import CallResult, Outcome, new_call_id

Purpose = Literal["trial", "judge"]

MAX_CONCURRENCY = 64
REDIS_SECONDS = 2.0
POLL_SECONDS = 1.0  # how often to check whether a permit may still come in time
CLOSE_SECONDS = 5.0  # for logging the calls that were canceled


@dataclass(frozen=True, slots=True)
class DirectResult:
    """Result of one call. Without a permit in time `result` is None. `why` is the error, if any.

    `seconds` is the latency at the backend, 0 if nothing was sent.
    """

    call_id: uuid.UUID
    result: CallResult | None
    seconds: float
    cost_usd: float | None
    why: str | None = None


@dataclass(slots=True)
class _Call:
    request: CallRequest
    category: str
    purpose: Purpose
    sent_at: float | None = None  # by the monotonic clock
    no_permit: str | None = None  # the reason

    def before_send(self, permit: Permit) -> None:
        permit.check()
        self.sent_at = time.monotonic()

    def canceled(self) -> CallResult:
        error = "canceled by the caller"
        if self.sent_at is None:
            return CallResult(Outcome.UNSENT, error=error)
        passed = time.monotonic() - self.sent_at
        return CallResult(Outcome.ABANDONED, error=error, latency_seconds=passed, may_go_on=True)


class DirectCaller:
    """Makes calls without a task, at most MAX_CONCURRENCY at a time; use it as `async with`.

    Opening raises DatabaseError or LimiterUnavailable if Postgres or Redis is unavailable. Closing cancels
    the calls in flight and logs them as canceled. An instance belongs to one event loop.
    """

    def __init__(self, addresses: Addresses, config: RouterConfig) -> None:
        self._addresses = addresses
        self._config = config
        self._worker = f"{socket.gethostname()}:calls:{secrets.token_hex(6)}"
        self._stack = contextlib.AsyncExitStack()
        self._slots = asyncio.Semaphore(MAX_CONCURRENCY)
        self._calls: set[asyncio.Task[DirectResult]] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._with_target: set[str] = set()
        self._clock_offset_seconds = 0.0
        self.pool: asyncpg.Pool

    async def __aenter__(self) -> Self:
        try:
            await self._open()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await cancel_and_wait(*self._calls)
        if self._ending:
            await asyncio.wait(set(self._ending), timeout=CLOSE_SECONDS)
        await cancel_and_wait(*self._ending)
        await self._stack.aclose()

    async def call(
        self, model: RosterModel, prompt: str, *, category: str, purpose: Purpose,
        max_tokens: int | None = None, timeout_seconds: float,
    ) -> DirectResult:  # fmt: skip
        """Makes one call. Raises nothing for what the model does; waits `timeout_seconds` for the permit.

        Raises DatabaseError if the call cannot be logged; then it is not sent. A model without a traffic
        target gets its `default_target`. A cancellation cancels the call and logs it.
        """
        request = CallRequest.to(
            model, new_call_id(time.monotonic() + self._clock_offset_seconds), prompt, max_tokens
        )
        size, limit = (
            len(prompt.encode("utf-8", "replace")),
            context_limits({model.model: model})[model.model],
        )
        if not limit.fits(size, request.max_tokens):
            why = too_long(limit, size, request.max_tokens)
            return DirectResult(request.call_id, None, 0.0, None, why)
        calling = self._call(_Call(request, category, purpose), model, timeout_seconds)
        return await spawn(calling, f"{purpose} call {request.call_id}", self._calls)

    async def known_models(self) -> frozenset[str]:
        """Returns the names that the Models Backend can call now. Raises BackendUnavailable."""
        return frozenset(await self._backend.models())

    async def _open(self) -> None:
        opening = open_services(self._addresses, self._config, redis_seconds=REDIS_SECONDS)
        services = await self._stack.enter_async_context(opening)
        self.pool, self._limiter, self._backend = services.pool, services.limiter, services.backend
        before = time.monotonic()
        now = await fetch_one(self.pool, "SELECT extract(epoch FROM clock_timestamp())::float8 AS now")
        self._clock_offset_seconds = now["now"] - (before + time.monotonic()) / 2
        roster = await read_roster(self.pool)
        await services.targets.restore(roster)
        self._with_target.update(roster.models)

    async def _call(self, call: _Call, model: RosterModel, timeout_seconds: float) -> DirectResult:
        async with self._slots:
            until = time.monotonic() + timeout_seconds
            why_not = await self._wait_for_permit(model, timeout_seconds)
            if why_not is not None:
                return DirectResult(call.request.call_id, None, 0.0, None, why_not)
            return await self._send_logged(call, until)

    async def _wait_for_permit(self, model: RosterModel, timeout_seconds: float) -> str | None:
        """Waits until a permit looks likely; returns the reason if none can come in time.

        The call is logged only after that: its open row would count as sent when a Redis that lost its state
        rebuilds it from the log.
        """

        async def near() -> bool:
            await self._limiter.wait_until_available(model.model)
            return True

        until = time.monotonic() + timeout_seconds
        try:
            await self._ensure_target(model)
            is_near = None
            ahead = await availability(self._limiter, model.model)
            while ahead.seconds is not None and (left := until - time.monotonic()) >= ahead.seconds:
                if is_near:  # and the check after it agrees
                    return None
                wait_seconds = min(left, POLL_SECONDS)
                is_near = await result_or_none(near(), wait_seconds, f"router near {model.model}")
                ahead = await availability(self._limiter, model.model)
        except LimiterError as error:
            return str(error)
        return f"no permit for {model.model} in time: {ahead.why}"

    async def _ensure_target(self, model: RosterModel) -> None:
        """Gives a model that is not on the roster a target, which is not recorded."""
        if model.model not in self._with_target:
            await self._limiter.set_target(model.model, model.default_target, version=DEFAULT_VERSION)
            self._with_target.add(model.model)

    async def _send_logged(self, call: _Call, until: float) -> DirectResult:
        try:
            await self._log_begin(call)
            result = await self._send(call, until)
        except DatabaseError:
            self._log_end(call, CallResult(Outcome.UNSENT, error="Postgres had not confirmed the call"))
            raise
        except asyncio.CancelledError:
            self._log_end(call, call.canceled())
            raise
        await asyncio.shield(self._log_end(call, result))
        if call.no_permit is not None:
            return DirectResult(call.request.call_id, None, 0.0, None, call.no_permit)
        seconds = result.latency_seconds or 0.0
        return DirectResult(call.request.call_id, result, seconds, result.cost_usd, result.error)

    async def _send(self, call: _Call, until: float) -> CallResult:
        left = until - time.monotonic()
        try:
            return await send_permitted(
                self._limiter, self._backend, call.request, permit_seconds=left, before_send=call.before_send
            )
        except LimiterError as error:
            call.no_permit = str(error)
            return CallResult(Outcome.UNSENT, error=call.no_permit)

    async def _log_begin(self, call: _Call) -> None:
        await fetch(
            self.pool, "SELECT begin_call($1, $2, $3, $4, $5, $6)", call.request.call_id, call.request.model,
            call.category, call.purpose, self._worker, call.request.reserved_tokens,
        )  # fmt: skip

    def _log_end(self, call: _Call, result: CallResult) -> asyncio.Task[None]:
        """Completes the call's row in a task of its own, which outlives a canceled caller."""
        outcome, _answer, *values = settled_values(result)
        request = call.request
        arguments = (
            request.call_id, outcome, *values, request.model, call.category, call.purpose, self._worker,
            request.reserved_tokens,
        )  # fmt: skip
        statement = "SELECT end_call($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)"

        async def end() -> None:
            await retry_while_unavailable(lambda: fetch(self.pool, statement, *arguments))

        ending = spawn(end(), f"end of call {request.call_id}", self._ending)
        # Retrieved: a waiting caller gets the error, and otherwise the call is marked lost.
        ending.add_done_callback(lambda task: task.cancelled() or task.exception())
        return ending
