"""Calls without a task: trials of models, and questions to a judging model.

They go the way of every other call, under a permit of the limiter and through the Models Backend, and each is
in the call log with its purpose, from before it is sent.
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

from router.background import cancel_and_wait, result_or_none
from router.database import fetch, fetch_one, retry_while_unavailable, settled_values
from router.errors import DatabaseError, LimiterError
from router.limiter import Permit
from router.models.dispatch import CallRequest, availability, send_permitted
from router.models.roster import RosterModel, read_roster
from router.models.services import open_services
from router.settings import Addresses, RouterConfig
from router.task import CallResult, Outcome, new_call_id

Purpose = Literal["trial", "judge"]

MOST_AT_ONCE = 64
REDIS_SECONDS = 2.0
LOOK_AGAIN_SECONDS = 1.0  # whether a permit may still come in time
CLOSE_SECONDS = 5.0  # for the log to hear of calls that were given up
FIRST_VERSION = 1  # of a target that nobody set: any Variable that was ever read is newer


@dataclass(frozen=True, slots=True)
class DirectResult:
    """What came of one call. `result` is None if there was no permit in time; `why` says what went wrong.

    `seconds` are those at the backend, 0 if nothing was sent.
    """

    call_id: uuid.UUID
    result: CallResult | None
    seconds: float
    cost_usd: float | None
    why: str | None = None


@dataclass(slots=True)
class _Call:
    order: CallRequest
    category: str
    purpose: Purpose
    sent_at: float | None = None  # on the monotonic clock
    no_permit: str | None = None  # why there was none

    def going_out(self, permit: Permit) -> None:
        permit.check()
        self.sent_at = time.monotonic()

    def given_up(self) -> CallResult:
        if self.sent_at is None:
            return CallResult(Outcome.UNSENT, error="given up: whoever called went away")
        passed = time.monotonic() - self.sent_at
        why = "whoever called went away"
        return CallResult(Outcome.ABANDONED, error=why, latency_seconds=passed, may_go_on=True)


class DirectCaller:
    """Makes calls without a task, at most MOST_AT_ONCE at the same time; to be used as `async with`.

    Opening raises DatabaseError or LimiterUnavailable if Postgres or Redis is away. What is under way when it
    closes is given up, and logged so. All its state belongs to one event loop.
    """

    def __init__(self, addresses: Addresses, config: RouterConfig) -> None:
        self._addresses = addresses
        self._config = config
        self._worker = f"{socket.gethostname()}:calls:{secrets.token_hex(6)}"
        self._stack = contextlib.AsyncExitStack()
        self._places = asyncio.Semaphore(MOST_AT_ONCE)
        self._making: set[asyncio.Task[DirectResult]] = set()
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
        await cancel_and_wait(*self._making)
        if self._ending:
            await asyncio.wait(set(self._ending), timeout=CLOSE_SECONDS)
        await cancel_and_wait(*self._ending)
        await self._stack.aclose()

    async def call(
        self, model: RosterModel, prompt: str, *, category: str, purpose: Purpose,
        max_tokens: int | None = None, timeout_seconds: float,
    ) -> DirectResult:  # fmt: skip
        """Make one call: never raises for what the model does, and waits `timeout_seconds` for its permit.

        DatabaseError if it cannot be logged: then it is not sent. A model without a traffic target has its
        `default_target`. Cancelled, it is given up, and logged so.
        """
        order = self._order(model, prompt, max_tokens)
        making = asyncio.get_running_loop().create_task(
            self._made(_Call(order, category, purpose), model, timeout_seconds),
            name=f"router {purpose} call {order.call_id}",
        )
        self._making.add(making)
        making.add_done_callback(self._making.discard)
        return await making

    async def known_models(self) -> frozenset[str]:
        """The names that the Models Backend can call now. BackendUnavailable if it does not say."""
        return frozenset(await self._backend.models())

    async def _open(self) -> None:
        opening = open_services(self._addresses, self._config, redis_seconds=REDIS_SECONDS)
        services = await self._stack.enter_async_context(opening)
        self.pool, self._limiter, self._backend = services.pool, services.limiter, services.backend
        before = time.monotonic()
        now = await fetch_one(self.pool, "SELECT extract(epoch FROM clock_timestamp())::float8 AS now")
        self._clock_offset_seconds = now["now"] - (before + time.monotonic()) / 2
        roster = await read_roster(self.pool)
        await services.targets.begin(roster)
        self._with_target.update(roster.models)

    def _order(self, model: RosterModel, prompt: str, max_tokens: int | None) -> CallRequest:
        most = model.max_tokens if max_tokens is None else min(max_tokens, model.max_tokens)
        return CallRequest(
            call_id=new_call_id(time.monotonic() + self._clock_offset_seconds), model=model.model,
            endpoint=model.endpoint, prompt=prompt, max_tokens=most,
            reserved_tokens=len(prompt.encode("utf-8", "replace")) + most,  # no token is shorter than a byte
            timeout_seconds=model.timeout_seconds,
        )  # fmt: skip

    async def _made(self, call: _Call, model: RosterModel, timeout_seconds: float) -> DirectResult:
        async with self._places:
            until = time.monotonic() + timeout_seconds
            why_not = await self._why_not(model, timeout_seconds)
            if why_not is not None:
                return DirectResult(call.order.call_id, None, 0.0, None, why_not)
            return await self._logged(call, until)

    async def _why_not(self, model: RosterModel, timeout_seconds: float) -> str | None:
        """Wait until a send looks possible; why none does in time.

        What is logged before is open. So a Redis that lost its memory asks the log before this call is there.
        """

        async def near() -> bool:
            await self._limiter.wait_until_available(model.model)
            return True

        until = time.monotonic() + timeout_seconds
        try:
            await self._give_target(model)
            is_near = None
            ahead = await availability(self._limiter, model.model)
            while ahead.seconds is not None and (left := until - time.monotonic()) >= ahead.seconds:
                if is_near:  # and it was so when looked at after that
                    return None
                wait_seconds = min(left, LOOK_AGAIN_SECONDS)
                is_near = await result_or_none(near(), wait_seconds, f"router near {model.model}")
                ahead = await availability(self._limiter, model.model)
        except LimiterError as error:
            return str(error)
        return f"no permit for {model.model} in time: {ahead.why}"

    async def _give_target(self, model: RosterModel) -> None:
        """A model that is tried before it is on the roster has a target, too; nobody keeps it."""
        if model.model not in self._with_target:
            await self._limiter.set_target(model.model, model.default_target, version=FIRST_VERSION)
            self._with_target.add(model.model)

    async def _logged(self, call: _Call, until: float) -> DirectResult:
        try:
            await self._begin(call)
            result = await self._sent(call, until)
        except DatabaseError:
            self._end(call, CallResult(Outcome.UNSENT, error="Postgres had not confirmed it"))
            raise
        except asyncio.CancelledError:
            self._end(call, call.given_up())
            raise
        await asyncio.shield(self._end(call, result))
        if call.no_permit is not None:
            return DirectResult(call.order.call_id, None, 0.0, None, call.no_permit)
        seconds = result.latency_seconds or 0.0
        return DirectResult(call.order.call_id, result, seconds, result.cost_usd, result.error)

    async def _sent(self, call: _Call, until: float) -> CallResult:
        left = until - time.monotonic()
        try:
            return await send_permitted(
                self._limiter, self._backend, call.order, permit_seconds=left, going_out=call.going_out
            )
        except LimiterError as error:
            call.no_permit = str(error)
            return CallResult(Outcome.UNSENT, error=call.no_permit)

    async def _begin(self, call: _Call) -> None:
        await fetch(
            self.pool, "SELECT begin_call($1, $2, $3, $4, $5, $6)", call.order.call_id, call.order.model,
            call.category, call.purpose, self._worker, call.order.reserved_tokens,
        )  # fmt: skip

    def _end(self, call: _Call, result: CallResult) -> asyncio.Task[None]:
        """Close the call in the log, in a task of its own: it goes on when whoever called has gone."""
        ending = asyncio.get_running_loop().create_task(
            self._closed(call, result), name=f"router end of call {call.order.call_id}"
        )
        self._ending.add(ending)
        ending.add_done_callback(self._over)
        return ending

    async def _closed(self, call: _Call, result: CallResult) -> None:
        outcome, _answer, *values = settled_values(result)
        order = call.order
        closing = (
            order.call_id, outcome, *values, order.model, call.category, call.purpose, self._worker,
            order.reserved_tokens,
        )  # fmt: skip
        statement = "SELECT end_call($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)"
        await retry_while_unavailable(lambda: fetch(self.pool, statement, *closing))

    def _over(self, ending: asyncio.Task[None]) -> None:
        self._ending.discard(ending)
        if not ending.cancelled():
            ending.exception()  # looked at: whoever waits for it hears of it, and otherwise the call is lost
