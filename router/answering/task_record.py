"""The task of one asking in Postgres: begun by its first call, handed on from call to call, and ended."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import asyncpg

from router.answering import store as asking
from router.answering.store import CallRow, RequestTask
from router.errors import DatabaseError, InputError, InvalidValue, LeaseLost
from router.limiter import TrafficLimiter
from router.models import ModelsBackend
from router.task import AnswerRank, CallResult, Outcome

T = TypeVar("T")


@dataclass(slots=True)
class RequestContext:
    """What the askings of a process share. `worker` is under whose lease they hold their tasks.

    `unconfirmed` are calls of which nobody knows whether Postgres has them: they are to be forgotten.
    `check_may_send` is asked directly before each send, and raises SendingPaused if nothing may be sent.
    """

    pool: asyncpg.Pool
    limiter: TrafficLimiter
    backend: ModelsBackend
    worker: Callable[[], str]
    rename: Callable[[str], None]  # whose lease was lost
    new_call_id: Callable[[], uuid.UUID]
    check_may_send: Callable[[], None] = lambda: None
    unconfirmed: set[uuid.UUID] = field(default_factory=set)


class TaskRecord:
    """The task of one asking. Its first call begins it and holds it; the one that settles hands it on."""

    def __init__(
        self, means: RequestContext, prompt: str, deadline_seconds: float, task: RequestTask | None = None
    ) -> None:
        """`task`: there is one already, and somebody else holds it."""
        self.means = means
        self.deadline_seconds = deadline_seconds
        self._prompt = prompt
        self._begun: asyncio.Future[RequestTask] = asyncio.get_running_loop().create_future()
        self._beginning = task is not None
        if task is not None:
            self._begun.set_result(task)
        self._settling = asyncio.Lock()
        self._open: list[CallRow] = []
        self._growing = 0  # calls that may still come
        self._moved = asyncio.Event()

    @property
    def task(self) -> RequestTask | None:
        """The task, once it is there."""
        begun = self._begun
        there = begun.done() and not begun.cancelled() and begun.exception() is None
        return begun.result() if there else None

    async def write(self, row: CallRow) -> CallRow:
        """Write the call into the log, before anything is sent. DatabaseError; InputError for the prompt."""
        if not self._beginning:
            self._beginning = True
            row = await self._begin(row)
        else:
            task = await asyncio.shield(self._begun)
            await self._confirmed(row, asking.add_call(self.means.pool, task, row))
        self._open.append(row)
        self._move()
        return row

    async def _confirmed(self, row: CallRow, writing: Awaitable[T]) -> T:
        try:
            return await writing
        except (LeaseLost, InputError):
            raise
        except BaseException:
            self.means.unconfirmed.add(row.call_id)
            raise

    async def _begin(self, row: CallRow) -> CallRow:
        try:
            try:
                task = await self._insert(row)
            except LeaseLost:  # this process was stalled for longer than its lease
                self.means.rename(row.worker)
                row = replace(row, worker=self.means.worker())
                task = await self._insert(row)
        except BaseException as error:
            cancelled = isinstance(error, asyncio.CancelledError)
            why = DatabaseError("it was given up before Postgres had confirmed it") if cancelled else error
            self._begun.set_exception(why)
            self._begun.exception()  # looked at: perhaps nobody else waits for it
            raise
        self._begun.set_result(task)
        return row

    async def _insert(self, row: CallRow) -> RequestTask:
        beginning = asking.begin(self.means.pool, self._prompt, self.deadline_seconds, row)
        return await self._confirmed(row, beginning)

    async def settle(self, row: CallRow, result: CallResult, *, late: bool) -> None:
        """Close the call. Retried while Postgres is away.

        A call that does not solve the task waits until there is another open one to hand the task on to, or
        none to come. One settles at a time, so that the heir is still open.
        """
        while True:
            async with self._settling:
                others = [other for other in self._open if other is not row]
                solves = result.outcome is Outcome.ANSWERED and row.rank is AnswerRank.CHOSEN_MODEL
                if solves or others or not self._growing:
                    await self._settle(
                        row, result, max(others, key=lambda other: other.rank, default=None), late
                    )
                    return
                moved = self._moved
            await moved.wait()

    async def _settle(self, row: CallRow, result: CallResult, heir: CallRow | None, late: bool) -> None:  # noqa: FBT001 - private
        task = self.task
        if task is None:
            return
        heir_id = heir.call_id if heir else None
        try:
            await asking.settle(self.means.pool, task, row, result, late=late, heir=heir_id)
        except InvalidValue as error:
            spoilt = CallResult(Outcome.ERROR, error=f"the answer could not be stored: {error}")
            await asking.settle(self.means.pool, task, row, spoilt, late=late, heir=heir_id)
        finally:
            self._open.remove(row)
            self._move()

    def grow(self) -> PendingCall:
        """Say that another call may come; until its end is said the task is kept for it."""
        return PendingCall(self._grown)

    def _grown(self, by: int) -> None:
        self._growing += by
        self._move()

    def _move(self) -> None:
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()


class PendingCall:
    """That another call of an asking may come. `end()` says that it is there, or never will be."""

    def __init__(self, grown: Callable[[int], None]) -> None:
        self._grown = grown
        self._over = False
        grown(1)

    def end(self) -> None:
        """Saying it twice is the same as once."""
        if not self._over:
            self._over = True
            self._grown(-1)
