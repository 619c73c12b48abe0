"""One call of a request: logged, permitted, sent, settled, or canceled."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Literal

from router.answering.answer import CallSummary
from router.answering.plan import RoutingPlan
from router.answering.policy import AttemptState
from router.answering.task_record import TaskRecord
from router.errors import DatabaseError, InputError, LimiterError, RouterError, SendingPaused
from router.limiter import Permit
from router.models import availability, send_permitted
from router.request import ModelRequest
from router.task import CallResult, Outcome, Role

log = logging.getLogger("router.answering")

Change = Literal["sent", "waiting", "ended"]


class Attempt:
    """One call of a request: `await run()`, then `await close()`. Times are on the monotonic clock.

    `on_change` is called when the call is sent, waits too long for its permit, or ends.
    """

    def __init__(
        self, record: TaskRecord, plan: RoutingPlan, role: Role, model: str, request: ModelRequest, *,
        number: int, on_change: Callable[[Attempt, Change], None] = lambda _attempt, _change: None,
    ) -> None:  # fmt: skip
        context = record.context
        self.request = plan.call_request(context.new_call_id(), role, model, request)
        self.row = plan.call_row(
            self.request.call_id, role, model, worker=context.worker, number=number,
            reserved_tokens=self.request.reserved_tokens,
        )  # fmt: skip
        self.result: CallResult | None = None
        self.started_at = time.monotonic()
        self.sent_at: float | None = None
        self.ended_at: float | None = None
        self.refusal: InputError | None = None
        self.unlogged = False  # the log row could not be written, so it was not sent
        self.late = False  # the request was answered before
        self.canceled_unsent = False  # another call was sent instead
        self.interrupted = False  # the task that runs it was canceled
        self.settled = asyncio.Event()
        self._record = record
        self._context = context
        self._on_change = on_change
        self._end_pending = record.expect_call()
        self._written = False
        self._cancel_reason: str | None = None
        self._waiting_for_permit = False
        self._unavailable = False
        self._sending: asyncio.Task[CallResult] | None = None

    @property
    def state(self) -> AttemptState:
        """Progress of the call."""
        if self.result is None:
            if self.sent_at is not None or not (self._waiting_for_permit or self._unavailable):
                return AttemptState.RUNNING
            return AttemptState.UNAVAILABLE if self._unavailable else AttemptState.WAITING_FOR_PERMIT
        if self.result.outcome is Outcome.ANSWERED:
            return AttemptState.ANSWERED
        unsent = self.result.outcome is Outcome.UNSENT and not self._unavailable
        return AttemptState.UNSENT if unsent else AttemptState.FAILED

    @property
    def too_long(self) -> bool:
        """Whether the backend refused the prompt as too long for this model."""
        return self.result is not None and self.result.outcome is Outcome.TOO_LONG

    @property
    def in_progress(self) -> bool:
        """Whether this call may still bring an answer."""
        return self.result is None

    async def run(self, patience_seconds: float, until: float) -> None:
        """Makes the call and sets `result`.

        Waits for a permit until `until`; after `patience_seconds` the state is WAITING_FOR_PERMIT. A
        cancellation ends the call and is recorded in `interrupted`.
        """
        try:
            self._finish(await self._make(patience_seconds, until))
        except asyncio.CancelledError:
            self.interrupted = self._cancel_reason is None
            self._finish(self._canceled_result())

    def _finish(self, result: CallResult) -> None:
        if self.result is None:
            self._end_pending()
            self.result = result
            self.ended_at = time.monotonic()
            self._on_change(self, "ended")

    async def close(self) -> None:
        """Settles the call."""
        assert self.result is not None
        try:
            if self._written:
                await self._record.settle(self.row, self.result, late=self.late)
        finally:
            self.settled.set()

    def cancel(self, why: str) -> None:
        """Ends the call if it is in progress; an unsent one is not sent any more.

        Writing the log row is not interrupted, so that its outcome stays known.
        """
        if self.in_progress:
            self._cancel_reason = self._cancel_reason or why
            if self._sending is not None:
                self._sending.cancel()

    def cancel_unsent(self, why: str) -> None:
        """Cancels the call unless it was sent."""
        if self.sent_at is None and self.in_progress:
            self.canceled_unsent = True
            self.cancel(why)

    def _mark_waiting(self) -> None:
        if self.sent_at is None and not self._waiting_for_permit:
            self._waiting_for_permit = True
            self._on_change(self, "waiting")

    async def _make(self, patience_seconds: float, until: float) -> CallResult:
        try:
            return await self._write_and_send(patience_seconds, until)
        except InputError as error:
            self.refusal = error
            return CallResult(Outcome.UNSENT, error=str(error))
        except DatabaseError as error:
            self.unlogged = True
            return CallResult(Outcome.UNSENT, error=f"the call could not be logged: {error}")
        except (SendingPaused, LimiterError) as error:
            return CallResult(Outcome.UNSENT, error=str(error))
        except RouterError as error:
            return CallResult(Outcome.REJECTED, error=str(error))
        except Exception as error:
            log.exception("unexpected error in call %s", self.row.call_id)
            return CallResult(Outcome.ERROR, error=f"unexpected error: {type(error).__name__}")

    async def _write_and_send(self, patience_seconds: float, until: float) -> CallResult:
        if self._cancel_reason is None:
            self.row = await self._record.write(self.row)
            self._written = True
            self._end_pending()
        if self._cancel_reason is not None:
            return self._canceled_result()
        self._sending = asyncio.get_running_loop().create_task(
            self._send(patience_seconds, until), name=f"router send {self.row.call_id}"
        )
        return await self._sending

    async def _send(self, patience_seconds: float, until: float) -> CallResult:
        limiter, model = self._context.limiter, self.row.model
        expected = await availability(limiter, model)
        self._unavailable = expected.cooling_down
        left = until - time.monotonic()
        if expected.seconds is None or expected.seconds > left:
            wait = "" if expected.seconds is None else f" for {expected.seconds:.1f} s"
            why = f"no permit for {model}{wait}: {expected.why}"
            return CallResult(Outcome.UNSENT, error=why, retry_after_seconds=expected.retry_after_seconds)
        if expected.cooling_down or expected.seconds > patience_seconds:
            self._mark_waiting()
        loop = asyncio.get_running_loop()
        patience = loop.call_later(patience_seconds, self._mark_waiting)
        watching = loop.create_task(self._watch_availability(), name=f"router watch of {model}")
        sending = send_permitted(
            limiter, self._context.backend, self.request,
            permit_seconds=left, before_send=self._before_send, on_result=self._finish,
        )  # fmt: skip
        try:
            return await sending
        finally:
            patience.cancel()
            watching.cancel()

    async def _watch_availability(self) -> None:
        """Ends the patience early if the model starts to cool down."""
        await self._context.limiter.wait_until_unavailable(self.row.model)
        if self.sent_at is None:
            self._unavailable = True
            self._mark_waiting()

    def _before_send(self, permit: Permit) -> None:
        self._context.check_may_send()
        permit.check()
        self.sent_at = time.monotonic()
        self._on_change(self, "sent")

    def _canceled_result(self) -> CallResult:
        why = self._cancel_reason or "the request was canceled"
        if self.sent_at is None:
            return CallResult(Outcome.UNSENT, error=f"canceled before it was sent: {why}")
        passed = time.monotonic() - self.sent_at
        return CallResult(Outcome.ABANDONED, error=why, latency_seconds=passed, may_go_on=True)

    def summary(self, began: float) -> CallSummary:
        """Returns the call as of now, with times since `began`."""
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
