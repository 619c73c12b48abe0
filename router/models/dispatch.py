"""Sends one call under a permit: waits for the permit, sends before it expires, releases it.

Every call to a model passes through here, whether from a worker or from a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from router.background import result_or_none
from router.errors import LimiterError, PermitExpired
from router.limiter import AFTER_TIMEOUT_SECONDS, UNAVAILABLE_REASONS, Permit, TrafficLimiter, WaitReason
from router.models.backend import ModelsBackend
from router.models.call_request import CallRequest
from router.task import CallResult, Outcome
from router.traffic import MAX_COUNT

MAX_EXPIRED_PERMITS = 20
MAX_PERMIT_SECONDS = 3600.0  # past_calls in 60_roster.sql finds sends that long after they were logged
UNKNOWN_WAIT_SECONDS = 60.0  # where only an operator can help, e.g. a target of 0
SNAPSHOT_SECONDS = 0.25
MAY_PASS_AT_ANY_MOMENT = frozenset(
    {
        *(WaitReason.NOTHING, WaitReason.CONCURRENCY, WaitReason.HALF_OPEN),
        *(WaitReason.REBUILDING, WaitReason.NO_TARGET),  # Redis lost its state: it is restored at once
    }
)


async def send_permitted(
    limiter: TrafficLimiter,
    backend: ModelsBackend,
    request: CallRequest,
    *,
    permit_seconds: float,
    before_send: Callable[[Permit], None],
    on_result: Callable[[CallResult], None] | None = None,
) -> CallResult:
    """Sends one call under a permit and returns its result. Raises LimiterError without a permit in time.

    `before_send` runs immediately before the first byte is written. It checks the permit and any other
    condition; its exceptions pass through and cancel the permit. A cancellation before that point cancels
    the permit as well. After it the permit stays counted, since the backend may still be working.
    `on_result` gets the result at once: releasing the permit may take as long as Redis does.
    """
    until = time.monotonic() + min(permit_seconds, MAX_PERMIT_SECONDS)
    for _ in range(MAX_EXPIRED_PERMITS):
        permit = await limiter.acquire(
            request.model, tokens=request.reserved_tokens, cost=request.reserved_cost,
            timeout_seconds=max(0.0, until - time.monotonic()),
            call_id=request.call_id, interactive=request.interactive, client=request.client,
        )  # fmt: skip
        try:
            result = await _send(limiter, backend, request, permit, before_send)
        except PermitExpired:
            continue
        if on_result is not None:
            on_result(result)
        await _release(limiter, request, permit, result)
        return result
    raise PermitExpired(f"{MAX_EXPIRED_PERMITS} permits of {request.model} expired before they could be used")


async def _send(
    limiter: TrafficLimiter,
    backend: ModelsBackend,
    request: CallRequest,
    permit: Permit,
    before_send: Callable[[Permit], None],
) -> CallResult:
    sent = False
    # A call that outlives its slot in the limiter would let one too many through.
    longest = limiter.settings.max_call_seconds - AFTER_TIMEOUT_SECONDS
    request = replace(request, timeout_seconds=min(request.timeout_seconds, longest))

    def check() -> None:
        nonlocal sent
        before_send(permit)
        sent = True

    try:
        return await backend.call(request, before_send=check)
    except BaseException:
        with contextlib.suppress(LimiterError):  # the permit stays counted, which is safe
            if sent:  # if this was the half-open probe, another call may be the next one
                abandoned = limiter.record_outcome(request.model, Outcome.ABANDONED, permit=permit)
                await asyncio.shield(abandoned)
            else:
                await asyncio.shield(limiter.cancel(permit))
        raise


async def _release(limiter: TrafficLimiter, request: CallRequest, permit: Permit, result: CallResult) -> None:
    # The reason of a cool-down is shown to other clients, and these errors repeat what the model wrote.
    is_private = result.outcome in {Outcome.GARBAGE, Outcome.REJECTED}
    why = "its replies cannot be used" if is_private else result.error or ""
    with contextlib.suppress(LimiterError):  # the next call learns of the refusal itself
        await limiter.record_outcome(
            request.model, result.outcome, result.retry_after_seconds, why=why, permit=permit
        )
    with contextlib.suppress(LimiterError):  # the reservation expires by itself
        if result.outcome is Outcome.UNSENT:
            await limiter.cancel(permit)
        elif not result.may_go_on or (
            limiter.settings.free_broken_slots and result.outcome is Outcome.UNAVAILABLE
        ):
            used, spent = result.used_tokens, request.cost_of(result)
            await limiter.release(
                permit,
                tokens=None if used is None else min(used, MAX_COUNT),
                cost=spent,
            )


@dataclass(frozen=True, slots=True)
class Availability:
    """Seconds until a model may have a permit, None if only a change can help; and the reason to wait."""

    seconds: float | None
    why: str
    cooling_down: bool = False  # after failures, or a 429 or 503

    @property
    def retry_after_seconds(self) -> float:
        """Seconds after which a client should try again."""
        return UNKNOWN_WAIT_SECONDS if self.seconds is None else self.seconds


async def availability(
    limiter: TrafficLimiter, model: str, max_seconds: float = SNAPSHOT_SECONDS
) -> Availability:
    """Predicts the wait of a prompt that joins the model's queue now; 0 s if the limiter cannot tell.

    A slot that another call holds may be released at any time, and state that Redis lost may be restored:
    both count as 0 s.
    """
    try:
        traffic = await result_or_none(
            limiter.shared_snapshot(model),
            min(max_seconds, SNAPSHOT_SECONDS),
            f"router availability of {model}",
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
