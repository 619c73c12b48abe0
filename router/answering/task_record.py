"""Task of one request in Postgres: begun by its first call, handed on between calls, ended by the last."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

from router.answering import store
from router.answering.context import RequestContext
from router.answering.store import CallRow, RequestTask
from router.errors import DatabaseError, InputError, InvalidValue, LeaseLost
from router.request import ModelRequest
from router.task import AnswerRank, CallResult, Outcome

T = TypeVar("T")


class TaskRecord:
    """Task of one request. Its first call claims it; a call that settles hands the claim to a successor."""

    def __init__(
        self, context: RequestContext, request: ModelRequest, deadline_seconds: float,
        task: RequestTask | None = None, *, max_tokens: int | None = None,
    ) -> None:  # fmt: skip
        """`task` is an existing one, which these calls do not claim."""
        self.context = context
        self.deadline_seconds = deadline_seconds
        self._request = request
        self._max_tokens = max_tokens
        self._begun: asyncio.Future[RequestTask] = asyncio.get_running_loop().create_future()
        self._is_beginning = task is not None
        if task is not None:
            self._begun.set_result(task)
        self._settling = asyncio.Lock()
        self._open: list[CallRow] = []
        self._pending: set[object] = set()
        self._changed = asyncio.Event()

    @property
    def task(self) -> RequestTask | None:
        """The task, or None until it is stored."""
        begun = self._begun
        is_stored = begun.done() and not begun.cancelled() and begun.exception() is None
        return begun.result() if is_stored else None

    async def write(self, row: CallRow) -> CallRow:
        """Logs the call before it is sent; returns the row as stored.

        Raises DatabaseError, or InputError if the prompt cannot be sent to any model.
        """
        if not self._is_beginning:
            self._is_beginning = True
            row = await self._begin(row)
        else:
            task = await asyncio.shield(self._begun)
            await self._confirmed(row, store.add_call(self.context.pool, task, row))
        self._open.append(row)
        self._notify()
        return row

    async def _confirmed(self, row: CallRow, writing: Awaitable[T]) -> T:
        try:
            return await writing
        except (LeaseLost, InputError):
            raise
        except BaseException:
            self.context.unconfirmed.add(row.call_id)
            raise

    async def _begin(self, row: CallRow) -> CallRow:
        try:
            try:
                task = await self._insert(row)
            except LeaseLost:  # this process was stalled for longer than its lease
                self.context.queue.rename(row.worker)
                row = replace(row, worker=self.context.worker)
                task = await self._insert(row)
        except BaseException as error:
            cancelled = isinstance(error, asyncio.CancelledError)
            why = DatabaseError("canceled before Postgres confirmed it") if cancelled else error
            self._begun.set_exception(why)
            self._begun.exception()  # mark as retrieved: there may be no other waiter
            raise
        self._begun.set_result(task)
        return row

    async def _insert(self, row: CallRow) -> RequestTask:
        beginning = store.begin(
            self.context.pool, self._request, self.deadline_seconds, self._max_tokens, row
        )
        return await self._confirmed(row, beginning)

    async def settle(self, row: CallRow, result: CallResult, *, late: bool) -> None:
        """Closes the call. Retries while Postgres is unavailable.

        A call that does not solve the task waits until there is a successor, or none is pending. Calls settle
        one at a time, so that the successor is still open.
        """
        while True:
            async with self._settling:
                others = [other for other in self._open if other is not row]
                solves = result.outcome is Outcome.ANSWERED and row.rank is AnswerRank.CHOSEN_MODEL
                if solves or others or not self._pending:
                    successor = max(others, key=lambda other: other.rank, default=None)
                    await self._settle(row, result, successor, late=late)
                    return
                changed = self._changed
            await changed.wait()

    async def _settle(
        self, row: CallRow, result: CallResult, successor: CallRow | None, *, late: bool
    ) -> None:
        task = self.task
        if task is None:
            return
        pool, successor_id = self.context.pool, successor.call_id if successor else None
        try:
            await store.settle(pool, task, row, result, late=late, successor=successor_id)
        except InvalidValue as error:
            failure = CallResult(Outcome.ERROR, error=f"the answer could not be stored: {error}")
            await store.settle(pool, task, row, failure, late=late, successor=successor_id)
        finally:
            self._open.remove(row)
            self._notify()

    def expect_call(self) -> Callable[[], None]:
        """Leaves the task open for one more call until the returned function is called. Idempotent."""
        token = object()
        self._pending.add(token)

        def end() -> None:
            self._pending.discard(token)
            self._notify()

        return end

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
