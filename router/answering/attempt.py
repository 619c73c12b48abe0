"""One call of an asking: written into the log, permitted, sent, settled, or given up on purpose."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from router.answering.answer import CallSummary
from router.answering.policy import AttemptState
from router.answering.store import CallRow
from router.answering.task_record import TaskRecord
from router.errors import DatabaseError, InputError, LimiterError, RouterError, SendingPaused
from router.limiter import Permit
from router.models import CallRequest, availability, send_permitted
from router.task import CallResult, Outcome

log = logging.getLogger("router.answering")


class Attempt:
    """One call of an asking: `await run()`, then `await close()`. Times are on the monotonic clock."""

    def __init__(
        self, ledger: TaskRecord, row: CallRow, order: CallRequest, on_news: Callable[[Attempt, str], None]
    ) -> None:
        self.row = row
        self.order = order
        self.result: CallResult | None = None
        self.started_at = time.monotonic()
        self.sent_at: float | None = None
        self.ended_at: float | None = None
        self.refusal: InputError | None = None
        self.unlogged = False  # Postgres did not take it, so it was not sent
        self.late = False  # the asker had its answer before
        self.spared = False  # given up before it was sent, since another one was
        self.cancelled = False  # by whoever ran it, not given up on purpose
        self.settled = asyncio.Event()
        self._ledger = ledger
        self._on_news = on_news
        self._coming = ledger.grow()
        self._written = False
        self._no_more: str | None = None
        self._stuck = False
        self._rests = False
        self._sending: asyncio.Task[CallResult] | None = None

    @property
    def leg(self) -> AttemptState:
        """How far it is."""
        if self.result is None:
            if self.sent_at is not None or not (self._stuck or self._rests):
                return AttemptState.RUNNING
            return AttemptState.RESTING if self._rests else AttemptState.STUCK
        if self.result.outcome is Outcome.ANSWERED:
            return AttemptState.ANSWERED
        return (
            AttemptState.UNSENT
            if self.result.outcome is Outcome.UNSENT and not self._rests
            else AttemptState.FAILED
        )

    @property
    def under_way(self) -> bool:
        """Whether an answer of this call may still come."""
        return self.result is None

    async def run(self, patience_seconds: float, until: float) -> None:
        """Make the call; `result` is what came of it. Cancelled, it is given up on purpose.

        It stands in line for a permit until `until`, and counts as stuck after `patience_seconds`.
        """
        try:
            self._came(await self._attempt(patience_seconds, until))
        except asyncio.CancelledError:
            self.cancelled = self._no_more is None
            self._came(self._given_up())

    def _came(self, result: CallResult) -> None:
        if self.result is None:
            self._coming.end()
            self.result = result
            self.ended_at = time.monotonic()
            self._on_news(self, "ended")

    async def close(self) -> None:
        """Settle the call."""
        assert self.result is not None
        try:
            if self._written:
                await self._ledger.settle(self.row, self.result, late=self.late)
        finally:
            self.settled.set()

    def give_up(self, why: str) -> None:
        """End the call, if it has not ended; what was not sent is not sent any more.

        While it is being written into the log nothing is cut off, so that what the log holds stays known.
        """
        if self.under_way:
            self._no_more = self._no_more or why
            if self._sending is not None:
                self._sending.cancel()

    def spare(self, why: str) -> None:
        """Give the call up unless it was sent."""
        if self.sent_at is None and self.under_way:
            self.spared = True
            self.give_up(why)

    def _is_stuck(self) -> None:
        if self.sent_at is None and not self._stuck:
            self._stuck = True
            self._on_news(self, "stuck")

    async def _attempt(self, patience_seconds: float, until: float) -> CallResult:
        try:
            return await self._write_and_send(patience_seconds, until)
        except InputError as error:
            self.refusal = error
            return CallResult(Outcome.UNSENT, error=str(error))
        except DatabaseError as error:
            self.unlogged = True
            return CallResult(Outcome.UNSENT, error=f"what cannot be logged is not sent: {error}")
        except (SendingPaused, LimiterError) as error:
            return CallResult(Outcome.UNSENT, error=str(error))
        except RouterError as error:
            return CallResult(Outcome.REJECTED, error=str(error))
        except Exception as error:
            log.exception("call %s: a fault of the program", self.row.call_id)
            return CallResult(Outcome.ERROR, error=f"a fault of the program: {type(error).__name__}")

    async def _write_and_send(self, patience_seconds: float, until: float) -> CallResult:
        if self._no_more is None:
            self.row = await self._ledger.write(self.row)
            self._written = True
            self._coming.end()
        if self._no_more is not None:
            return self._given_up()
        sending = self._permitted(patience_seconds, until)
        name = f"router send {self.row.call_id}"
        self._sending = asyncio.get_running_loop().create_task(sending, name=name)
        return await self._sending

    async def _permitted(self, patience_seconds: float, until: float) -> CallResult:
        means, model = self._ledger.means, self.row.model
        ahead = await availability(means.limiter, model)
        self._rests = ahead.cooling_down
        left = until - time.monotonic()
        if ahead.seconds is None or ahead.seconds > left:
            when = "" if ahead.seconds is None else f" for {ahead.seconds:.1f} s"
            why = f"no permit for {model}{when}: {ahead.why}"
            return CallResult(Outcome.UNSENT, error=why, retry_after_seconds=ahead.retry_after_seconds)
        if ahead.cooling_down or ahead.seconds > patience_seconds:
            self._is_stuck()
        loop = asyncio.get_running_loop()
        patience = loop.call_later(patience_seconds, self._is_stuck)
        watching = loop.create_task(self._until_it_rests(), name=f"router watch over {model}")
        sending = send_permitted(
            means.limiter, means.backend, self.order,
            permit_seconds=left, before_send=self._going_out, on_result=self._came,
        )  # fmt: skip
        try:
            return await sending
        finally:
            patience.cancel()
            watching.cancel()

    async def _until_it_rests(self) -> None:
        """Whoever stands in line when the model is no longer trusted need not wait for patience to end."""
        await self._ledger.means.limiter.wait_until_unavailable(self.row.model)
        if self.sent_at is None:
            self._rests = True
            self._is_stuck()

    def _going_out(self, permit: Permit) -> None:
        self._ledger.means.check_may_send()
        permit.check()
        self.sent_at = time.monotonic()
        self._on_news(self, "sent")

    def _given_up(self) -> CallResult:
        why = self._no_more or "whoever asked went away"
        if self.sent_at is None:
            return CallResult(Outcome.UNSENT, error=f"given up: {why}")
        passed = time.monotonic() - self.sent_at
        return CallResult(Outcome.ABANDONED, error=why, latency_seconds=passed, may_go_on=True)

    def as_call(self, began: float) -> CallSummary:
        """The call as it stands now; times since `began`."""
        result = self.result
        return CallSummary(
            call_id=self.row.call_id, model=self.row.model, role=self.row.role, rank=self.row.rank,
            started_seconds=self.started_at - began,
            sent_seconds=None if self.sent_at is None else self.sent_at - began,
            ended_seconds=None if self.ended_at is None else self.ended_at - began,
            outcome=result.outcome if result else None, error=result.error if result else None,
            cost_usd=result.cost_usd if result else None,
            prompt_tokens=result.prompt_tokens if result else None,
            completion_tokens=result.completion_tokens if result else None,
            retry_after_seconds=result.retry_after_seconds if result else None,
        )  # fmt: skip
