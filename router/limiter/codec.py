"""Binary layouts of requests and replies of `limiter.lua`: little-endian doubles, times in microseconds."""

from __future__ import annotations

import struct
import uuid
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from router.limiter.breaker import BreakerSettings, Verdict
from router.limiter.permit import PastCall, Permit, WaitReason
from router.limiter.settings import LimiterSettings
from router.limiter.snapshot import ModelTraffic
from router.settings import InteractiveShare
from router.traffic import MAX_CALL_COST, TrafficTarget

MICRO = 1_000_000
LOST, MORE = 1, 3  # a reply's status; 0 is success, 2 a model without a target, 3 asks to call again

_DECISION = struct.Struct("<12d")
_GRANT = struct.Struct("<2d")
_CLIENT_GRANT = struct.Struct("<3d")
_REQUEST_HEAD = 8
_PER_PERMIT = 2
_ONE_PERMIT = struct.Struct(f"<{_REQUEST_HEAD + _PER_PERMIT}d")
_RELEASE = struct.Struct("<5d16s")
_CALENDARS = (None, "day", "month")  # by number
_OPEN_CALL = struct.Struct("<16sd")
_SNAPSHOT_HEAD = 11
_NO_CALL = bytes(16)
UNKNOWN = -1  # tokens or money of a call that are not known

Needs = tuple[int, ...]  # tokens and money of each permit, one after the other: (tokens, money, tokens, ...)


class Breaker(NamedTuple):
    """Reply to `outcome`: state of the breaker afterwards."""

    status: float
    failures: float
    trips: float
    cooldown: float


class Loss(NamedTuple):
    """Reply to `loss`. `known`: a process had seen the lost state; `longest` is the longest period."""

    live: float
    lost_for: float
    clock: float
    longest: float
    known: float
    generation: float


def pack_reserve(  # noqa: PLR0917 - the layout itself; keywords would cost on the hot path
    generation: float, clock_bound: float, head: float, version: float, sender: float,
    look_ahead_seconds: float, call_seconds: float, interactive: float, needs: Needs,
) -> bytes:  # fmt: skip
    """Packs a request for a permit per two `needs`.

    `sender` is 0 if it does not wait for them, and negative for interactive requests that do.
    """
    layout = _ONE_PERMIT if len(needs) == _PER_PERMIT else struct.Struct(f"<{_REQUEST_HEAD + len(needs)}d")
    return layout.pack(
        generation, clock_bound, head, version, sender, look_ahead_seconds * MICRO, call_seconds * MICRO,
        interactive, *needs,
    )  # fmt: skip


# Head of a reply: status, generation, head, target version, wait (negative if only a change can help),
# reason, send slack, clock, failures, trips, unresolved rebuilt calls, look-ahead applied. A plain tuple: a
# named one takes 2 us of a decision's 90.
unpack_decision: Callable[[bytes], tuple[float, ...]] = _DECISION.unpack_from


def unpack_client_grants(reply: bytes) -> tuple[Iterator[tuple[float, float, float]], bytes]:
    """Returns grants, with their numbers in the client's log, and the client's own reply if it was asked."""
    end = max(_DECISION.size, len(reply) - _DECISION.size)
    return _CLIENT_GRANT.iter_unpack(reply[_DECISION.size : end]), reply[end:]


def unpack_grants(reply: bytes) -> Iterator[tuple[float, float]]:
    """Yields the number of each granted send, and the microseconds until it may leave."""
    return _GRANT.iter_unpack(reply[_DECISION.size :])


def pack_set_target(version: int | None, settings: LimiterSettings, *, has_log: bool) -> bytes:
    """Packs the request to apply a target; None is a version newer than the applied one."""
    return struct.pack("<3d", version or 0, settings.max_call_seconds * MICRO, float(has_log))


def pack_target(target: TrafficTarget, settings: LimiterSettings, model: str | None) -> bytes:
    """Packs a target as the script stores it, without a model that of a client; the script sets the version.

    Calls of a client are not paced.
    """
    send, share = settings.send_slack(target), InteractiveShare(at_most=1.0)
    if model is not None:
        share = settings.interactive_share(model)
    else:
        target = replace(target, burst=True)
    limits: list[float] = []
    windows = [float(limit.window_seconds * MICRO) for limit in target.windows]
    for limit in target.windows:
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
        round(settings.batch_gap(target, share) * MICRO),
        float(share.reserved > 0),
        share.at_most,
        len(target.tokens) + len(target.money),
    )
    calendars = [_CALENDARS.index(limit.calendar) for limit in target.money]
    values = [*head, *limits, *windows, *calendars]
    return struct.pack(f"<{len(values)}d", *values)


def unpack_set_target(reply: bytes) -> tuple[bool, float]:
    """Returns whether the target was applied, and the version that now is."""
    applied, version = struct.unpack("<2d", reply)
    return bool(applied), version


def pack_release(
    permit: Permit, send: tuple[int, int], used: int | None, spent: int | None, *, unused: bool
) -> bytes:
    """Packs the release of a permit's `send` (generation, number), with tokens and money; None is unknown."""
    call = _NO_CALL if permit.call_id is None else permit.call_id.bytes
    return _RELEASE.pack(*send, _known(used), _known(spent), float(unused), call)


def pack_end(call_id: uuid.UUID, used: int | None, spent: int | None, *, unused: bool) -> bytes:
    """Packs the end of a call that was open when the state was rebuilt, as `pack_release` does."""
    return _RELEASE.pack(0, -1, _known(used), _known(spent), float(unused), call_id.bytes)


def _known(amount: int | None) -> int:
    return UNKNOWN if amount is None else amount


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


def pack_history(calls: Iterable[PastCall], clock: float) -> tuple[bytes, bytes, bytes, bytes, bytes]:
    """Packs send times (ascending), tokens, money, a bit per call (0: open), and id and send of open ones."""
    ordered = sorted(calls, key=lambda call: -call.age_seconds_latest)
    send_times = array("d", (clock - max(0.0, call.age_seconds_latest) * MICRO for call in ordered))
    tokens = struct.pack(f"<{len(ordered)}I", *(min(call.tokens, MAX_CALL_COST) for call in ordered))
    money = struct.pack(f"<{len(ordered)}I", *(min(call.cost, MAX_CALL_COST) for call in ordered))
    bits = bytearray((len(ordered) + 7) // 8)
    still_open = bytearray()
    for number, call in enumerate(ordered):
        if not call.open:
            bits[number >> 3] |= 128 >> (number & 7)
        elif call.call_id is not None:
            still_open += _OPEN_CALL.pack(call.call_id.bytes, number)
    return send_times.tobytes(), tokens, money, bytes(bits), bytes(still_open)


def unpack_snapshot(model: str, line: bytes, cooldown_reason: bytes, packed: bytes) -> ModelTraffic:
    """Unpacks the reply to `snapshot`."""
    target = TrafficTarget.parse(line.decode()) if line else None
    status, version, *numbers = struct.unpack(f"<{len(packed) // 8}d", packed)
    if status or target is None:
        why = WaitReason.NO_TARGET if target is None else WaitReason.REBUILDING
        text = line.decode() or None
        return ModelTraffic(model, text, {}, {}, 0, None, why, 0.0, None, version=int(version))
    again, reason, in_flight, cooldown, trips, failures, refused, since, last = numbers[: _SNAPSHOT_HEAD - 2]
    limits = target.windows if not target.stopped else ()
    usage = numbers[_SNAPSHOT_HEAD - 2 :]
    counts = {str(limit): int(n) for limit, n in zip(limits, usage, strict=False)}
    recent = usage[len(limits) :] if limits else []
    return ModelTraffic(
        model=model,
        target=str(target),
        sent={str(limit): counts[str(limit)] for limit in target.requests if str(limit) in counts},
        tokens={str(limit): counts[str(limit)] for limit in target.tokens if str(limit) in counts},
        money={str(limit): counts[str(limit)] for limit in target.money if str(limit) in counts},
        recent_money={str(limit): int(n) for limit, n in zip(target.money, recent, strict=False)},
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
        version=int(version),
    )
