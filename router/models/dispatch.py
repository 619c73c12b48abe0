"""One permitted call: stand in line for a permit, send at its moment, give the permit back.

Every call to a model goes this way, whoever makes it: a worker of the batch, or somebody who asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from router.background import result_or_none
from router.errors import LimiterError, PermitExpired
from router.limiter import AFTER_TIMEOUT_SECONDS, UNAVAILABLE_REASONS, Permit, TrafficLimiter, WaitReason
from router.models.backend import ModelsBackend
from router.task import CallResult, Outcome
from router.traffic import LARGEST_COUNT

MAX_EXPIRED_PERMITS = 20
UNKNOWN_WAIT_SECONDS = 60.0  # where only a person can help, e.g. a target of 0
LOOK_SECONDS = 0.25
MAY_PASS_AT_ANY_MOMENT = frozenset(
    {WaitReason.NOTHING, WaitReason.CONCURRENCY, WaitReason.REBUILDING, WaitReason.HALF_OPEN}
)


@dataclass(frozen=True, slots=True)
class CallRequest:
    """What is to be sent, and to which model."""

    call_id: uuid.UUID
    model: str
    endpoint: str
    prompt: str
    max_tokens: int
    reserved_tokens: int
    timeout_seconds: float


async def send_permitted(
    limiter: TrafficLimiter,
    backend: ModelsBackend,
    order: CallRequest,
    *,
    permit_seconds: float,
    going_out: Callable[[Permit], None],
    came: Callable[[CallResult], None] | None = None,
) -> CallResult:
    """Send one call under a permit; what came of it. LimiterError if no permit is to be had in time.

    `going_out` is called immediately before the first byte is written. It checks the permit, and whatever
    else must hold; what it raises passes through, and the permit is given back. So it is when the caller is
    cancelled before that; afterwards the permit stays counted, since the backend may still be working.
    `came` is told the result at once: giving the permit back may take as long as Redis does.
    """
    for _ in range(MAX_EXPIRED_PERMITS):
        permit = await limiter.acquire(
            order.model, tokens=order.reserved_tokens, timeout_seconds=permit_seconds
        )
        try:
            return await _send(limiter, backend, order, permit, going_out, came)
        except PermitExpired:
            continue
    raise PermitExpired(f"{MAX_EXPIRED_PERMITS} permits of {order.model} died before they could be used")


async def _send(  # noqa: PLR0917 - private: send_permitted's own arguments
    limiter: TrafficLimiter,
    backend: ModelsBackend,
    order: CallRequest,
    permit: Permit,
    going_out: Callable[[Permit], None],
    came: Callable[[CallResult], None] | None,
) -> CallResult:
    sent = False
    # A call that outlives its place in the limiter would let one too many through.
    longest = limiter.settings.max_call_seconds - AFTER_TIMEOUT_SECONDS

    def before_send() -> None:
        nonlocal sent
        going_out(permit)
        sent = True

    try:
        result = await backend.call(
            model_endpoint=order.endpoint, prompt=order.prompt, max_tokens=order.max_tokens,
            request_id=str(order.call_id), tokens_reserved=order.reserved_tokens,
            timeout_seconds=min(order.timeout_seconds, longest), before_send=before_send,
        )  # fmt: skip
    except BaseException:
        if not sent:
            with contextlib.suppress(LimiterError):  # it stays counted, which is safe
                await asyncio.shield(limiter.cancel(permit))
        else:  # if it was a probe, another call may be the next one
            with contextlib.suppress(LimiterError):
                await asyncio.shield(limiter.record_outcome(order.model, Outcome.ABANDONED, permit=permit))
        raise
    if came is not None:
        came(result)
    with contextlib.suppress(LimiterError):  # a rest is said again by whoever knows of it
        await limiter.record_outcome(
            order.model, result.outcome, result.retry_after_seconds, why=result.error or "", permit=permit
        )
    with contextlib.suppress(LimiterError):  # the reservation ends by itself
        if result.outcome is Outcome.UNSENT:
            await limiter.cancel(permit)
        elif not result.may_go_on:
            used = result.used_tokens
            await limiter.release(permit, tokens=None if used is None else min(used, LARGEST_COUNT))
    return result


@dataclass(frozen=True, slots=True)
class Availability:
    """In how many seconds a model may have a permit, None if only a change can help; and why not now."""

    seconds: float | None
    why: str
    rests: bool = False  # after failures, or a refusal

    @property
    def retry_after_seconds(self) -> float:
        return UNKNOWN_WAIT_SECONDS if self.seconds is None else self.seconds


async def availability(limiter: TrafficLimiter, model: str) -> Availability:
    """What a prompt that joins the model's line now has to expect; 0 s if the limiter cannot say it.

    A place that another call holds may be free at any moment.
    """
    try:
        traffic = await result_or_none(
            limiter.shared_snapshot(model), LOOK_SECONDS, f"router availability of {model}"
        )
    except LimiterError:
        traffic = None
    if traffic is None:
        return Availability(0.0, "")
    reason = traffic.waiting_for
    at_any_moment = reason in MAY_PASS_AT_ANY_MOMENT
    return Availability(
        0.0 if at_any_moment else traffic.next_seconds, reason.text, reason in UNAVAILABLE_REASONS
    )
