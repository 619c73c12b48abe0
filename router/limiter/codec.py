"""What passes between Python and `limiter.lua`, in the script's own order: little-endian doubles."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable

from router.limiter.breaker import BreakerSettings, Signal
from router.limiter.permit import PastCall, WaitReason
from router.limiter.settings import MICRO, LimiterSettings
from router.limiter.snapshot import ModelTraffic
from router.limiter.state import ModelState
from router.traffic import TrafficTarget

_SNAPSHOT_HEAD = 10


def packed_target(target: TrafficTarget, settings: LimiterSettings) -> bytes:
    """A target as the script keeps it; its version is filled in there."""
    send = settings.send_slack(target)
    limits: list[float] = []
    for limit in (*target.requests, *target.tokens):
        period = limit.window_seconds + send + settings.slacks(limit.window_seconds).transit
        limits += (limit.count, round(period * MICRO))
    head = (
        0.0,
        float(target.stopped),
        round(target.gap_seconds * MICRO),
        round(send * MICRO),
        -1 if target.at_once is None else target.at_once,
        len(target.requests),
        len(target.tokens),
    )
    return struct.pack(f"<{len(head) + len(limits)}d", *head, *limits)


def packed_verdict(
    seen: ModelState, left: float, sign: Signal, seconds: float, *, send: tuple[int, int] | None,
    breaker: BreakerSettings,
) -> bytes:  # fmt: skip
    """Arguments of the verb `record_outcome`; `send` is (generation, number) of the send that it concerns."""
    generation, number = send or (0, -1)
    first, longest = breaker.initial_cooldown_seconds * MICRO, breaker.max_cooldown_seconds * MICRO
    return struct.pack(
        "<10d", seen.generation, seen.claim(left), sign, seconds * MICRO, generation, number,
        breaker.failure_threshold, first, longest, seen.trip,
    )  # fmt: skip


def packed_history(calls: Iterable[PastCall], clock: float) -> tuple[bytes, bytes, bytes]:
    """Moments (ascending), tokens, and a byte a call that says whether it is still open."""
    ordered = sorted(calls, key=lambda call: -call.age_seconds_latest)
    moments = array("d", (clock - max(0.0, call.age_seconds_latest) * MICRO for call in ordered))
    tokens = struct.pack(f"<{len(ordered)}I", *(call.tokens for call in ordered))
    return moments.tobytes(), tokens, bytes(call.open for call in ordered)


def traffic_of(model: str, line: bytes, rest_reason: bytes, packed: bytes) -> ModelTraffic:
    """The reply of the verb `snapshot`."""
    target = TrafficTarget.parse(line.decode()) if line else None
    status, *numbers = struct.unpack(f"<{len(packed) // 8}d", packed)
    if status or target is None:
        why = WaitReason.NO_TARGET if target is None else WaitReason.REBUILDING
        return ModelTraffic(model, line.decode() or None, {}, {}, 0, None, why, 0.0, None)
    again, reason, at_once, resting, trip, failures, refused, since, last = numbers[: _SNAPSHOT_HEAD - 1]
    limits = [*target.requests, *target.tokens] if not target.stopped else []
    told = numbers[_SNAPSHOT_HEAD - 1 :]
    counts = {str(limit): int(n) for limit, n in zip(limits, told, strict=not target.stopped)}
    return ModelTraffic(
        model=model,
        target=str(target),
        sent={str(limit): counts[str(limit)] for limit in target.requests if str(limit) in counts},
        tokens={str(limit): counts[str(limit)] for limit in target.tokens if str(limit) in counts},
        at_once=int(at_once),
        next_seconds=None if again < 0 else again / MICRO,
        waiting_for=WaitReason(int(reason)),
        resting_seconds=resting / MICRO,
        rest_reason=rest_reason.decode(errors="replace") or None if resting > 0 or trip else None,
        failures=int(failures),
        trip=int(trip),
        refused=int(refused),
        refused_since_seconds=since / MICRO if refused else None,
        refused_seconds=last / MICRO if refused else None,
    )
