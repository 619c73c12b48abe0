"""Binary layouts of requests and replies of `limiter.lua`: little-endian doubles, times in microseconds."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from router.limiter.breaker import BreakerSettings, Verdict
from router.limiter.permit import PastCall, Permit, WaitReason
from router.limiter.settings import LimiterSettings
from router.limiter.snapshot import ModelTraffic
from router.traffic import TrafficTarget

MICRO = 1_000_000
LOST = 1  # a reply's status; 0 is success, 2 is a model without a target

_DECISION = struct.Struct("<10d")
_GRANT = struct.Struct("<2d")
_ONE_PERMIT = struct.Struct("<6d")
_RELEASE = struct.Struct("<4d")
_SNAPSHOT_HEAD = 10


class Breaker(NamedTuple):
    """Reply to `outcome`: state of the breaker afterwards."""

    status: float
    failures: float
    trips: float
    cooldown: float


class Loss(NamedTuple):
    """Reply to `loss`. `known` says that somebody had seen what was lost; `longest` is the longest period."""

    live: float
    lost_for: float
    clock: float
    longest: float
    known: float
    generation: float


# -- reserve and peek ----------------------------------------------------------------------------------


def pack_reserve(  # noqa: PLR0917 - the layout itself; keywords would cost on the hot path
    generation: float,
    clock_bound: float,
    head: float,
    look_ahead_seconds: float,
    call_seconds: float,
    tokens: tuple[int, ...],
) -> bytes:
    """Packs a request for a permit per element of `tokens`."""
    layout = _ONE_PERMIT if len(tokens) == 1 else struct.Struct(f"<{5 + len(tokens)}d")
    return layout.pack(
        generation, clock_bound, head, look_ahead_seconds * MICRO, call_seconds * MICRO, *tokens
    )


# Head of a reply: status, generation, head, target version, wait (negative if only a change can help),
# reason, send slack, clock, failures, trips. A plain tuple: a named one takes 2 us of a decision's 90.
unpack_decision: Callable[[bytes], tuple[float, ...]] = _DECISION.unpack_from


def unpack_grants(reply: bytes) -> Iterator[tuple[float, float]]:
    """Yields the number of each granted send, and the microseconds until it may leave."""
    return _GRANT.iter_unpack(reply[_DECISION.size :])


# -- targets -------------------------------------------------------------------------------------------


def pack_set_target(version: int | None, settings: LimiterSettings) -> bytes:
    """Packs the request to apply a target; None is a version newer than the applied one."""
    return struct.pack("<2d", version or 0, settings.max_call_seconds * MICRO)


def pack_target(target: TrafficTarget, settings: LimiterSettings) -> bytes:
    """Packs a target as the script stores it; the script fills in the version."""
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


def unpack_set_target(reply: bytes) -> tuple[bool, float]:
    """Returns whether the target was applied, and the version that now is."""
    applied, version = struct.unpack("<2d", reply)
    return bool(applied), version


# -- releases and outcomes -----------------------------------------------------------------------------


def pack_release(permit: Permit, used: float, *, unused: bool) -> bytes:
    """Packs one released permit; `used` is negative if the tokens used are unknown."""
    return _RELEASE.pack(permit.generation, permit.number, used, float(unused))


def unpack_release(reply: bytes) -> bool:
    """Returns whether the script notified the other processes."""
    _, notified = struct.unpack("<2d", reply)
    return bool(notified)


def pack_outcome(
    verdict: Verdict, generation: float, clock_bound: float, *,
    send: tuple[int, int] | None, trips: float, breaker: BreakerSettings,
) -> bytes:  # fmt: skip
    """Packs a verdict; `send` is (generation, number) of the send that it concerns."""
    send_generation, number = send or (0, -1)
    return struct.pack(
        "<10d", generation, clock_bound, verdict.signal, verdict.cooldown_seconds * MICRO,
        send_generation, number, breaker.failure_threshold, breaker.initial_cooldown_seconds * MICRO,
        breaker.max_cooldown_seconds * MICRO, trips,
    )  # fmt: skip


def unpack_breaker(reply: bytes) -> Breaker:
    """Unpacks the reply to `outcome`."""
    return Breaker._make(struct.unpack("<4d", reply))


# -- recovery ------------------------------------------------------------------------------------------


def pack_loss(*, known: bool, settings: LimiterSettings) -> bytes:
    """Packs the report of lost state; `known` says that the sender had seen it."""
    return struct.pack("<2d", float(known), settings.max_call_seconds * MICRO)


def unpack_loss(reply: bytes) -> Loss:
    """Unpacks the reply to `loss`."""
    return Loss._make(struct.unpack("<6d", reply))


def pack_rebuild(
    *, blind: bool, since: float, generation: float, cooldown_seconds: float, trips: float,
    settings: LimiterSettings,
) -> bytes:  # fmt: skip
    """Packs the request to rebuild a model's state; `since` is the first microsecond that is known."""
    return struct.pack(
        "<6d", float(blind), since, settings.max_call_seconds * MICRO, generation,
        cooldown_seconds * MICRO, trips,
    )  # fmt: skip


def pack_history(calls: Iterable[PastCall], clock: float) -> tuple[bytes, bytes, bytes]:
    """Packs send times (ascending), tokens, and a byte per call: 1 if it is still open."""
    ordered = sorted(calls, key=lambda call: -call.age_seconds_latest)
    send_times = array("d", (clock - max(0.0, call.age_seconds_latest) * MICRO for call in ordered))
    tokens = struct.pack(f"<{len(ordered)}I", *(call.tokens for call in ordered))
    return send_times.tobytes(), tokens, bytes(call.open for call in ordered)


# -- snapshot ------------------------------------------------------------------------------------------


def unpack_snapshot(model: str, line: bytes, cooldown_reason: bytes, packed: bytes) -> ModelTraffic:
    """Unpacks the reply to `snapshot`."""
    target = TrafficTarget.parse(line.decode()) if line else None
    status, *numbers = struct.unpack(f"<{len(packed) // 8}d", packed)
    if status or target is None:
        why = WaitReason.NO_TARGET if target is None else WaitReason.REBUILDING
        return ModelTraffic(model, line.decode() or None, {}, {}, 0, None, why, 0.0, None)
    again, reason, in_flight, cooldown, trips, failures, refused, since, last = numbers[: _SNAPSHOT_HEAD - 1]
    limits = [*target.requests, *target.tokens] if not target.stopped else []
    usage = numbers[_SNAPSHOT_HEAD - 1 :]
    counts = {str(limit): int(n) for limit, n in zip(limits, usage, strict=not target.stopped)}
    return ModelTraffic(
        model=model,
        target=str(target),
        sent={str(limit): counts[str(limit)] for limit in target.requests if str(limit) in counts},
        tokens={str(limit): counts[str(limit)] for limit in target.tokens if str(limit) in counts},
        in_flight=int(in_flight),
        next_seconds=None if again < 0 else again / MICRO,
        waiting_for=WaitReason(int(reason)),
        cooldown_seconds=cooldown / MICRO,
        cooldown_reason=cooldown_reason.decode(errors="replace") or None if cooldown > 0 or trips else None,
        failures=int(failures),
        trips=int(trips),
        refused=int(refused),
        refused_since_seconds=since / MICRO if refused else None,
        refused_seconds=last / MICRO if refused else None,
    )
