"""Replays each call of the script on the specification, and compares the replies."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from bench.judge import TargetChange
from router.limiter import LimiterSettings, PastCall, WaitReason
from router.limiter.breaker import Signal
from router.limiter.codec import LOST, MORE, Needs, unpack_decision, unpack_grants
from router.limiter.permit import Permit
from router.traffic import TrafficTarget
from tests.support.limiter.redis import ScriptCall, ScriptRedis
from tests.support.limiter.specification import MICRO, TIMED, Decision, LimiterSpec, Send, micros

MODEL = "m"
KEY = f"router:{{{MODEL}}}"
EPOCH = 1_709_250_180 * MICRO  # worlds begin 20 s before the March of a leap year
SETTINGS = LimiterSettings(max_call_seconds=8.0)
LOOK = micros(SETTINGS.look_ahead_seconds)
SETTLE_SECONDS = 0.6  # look-ahead and slacks of what was decided before a change
SHORT_WAY = 12_000
KEPT_SECONDS = 60  # windows up to it are exact without a rebuild
MICRO_FLOAT = 1e6
FOREVER = 10**15
ONLY_AGAIN = frozenset(
    {WaitReason.CONCURRENCY, WaitReason.HALF_OPEN}
)  # they wait for the end of a call, not for a time


class Mismatch(AssertionError):  # noqa: N818 - of two models, not an error of one
    """Raised when the script deviates from the specification."""


@dataclass
class IssuedPermit:
    """A granted permit and what the client did with it."""

    permit: Permit
    client: int
    send_at: int
    sent_at: int | None = None
    arrived_at: int = 0
    ended_at: int | None = None
    used: int | None = None
    spent: int | None = None


class Following:
    """Expected state of the script, compared with its replies."""

    spec: LimiterSpec
    redis: ScriptRedis
    now: int
    steps: int
    current: int
    with_history: bool
    waits: bool
    jumped: bool
    disturbed_until: int
    known_from: int
    retention: int
    state: str
    generation: float
    clock_reading: tuple[int, float]
    noticed: dict[int, int]
    rows: list[PastCall]
    rows_at: int
    rebuilt: dict[bytes, int]
    held: list[IssuedPermit]
    changes: list[TargetChange]
    slack: int
    interactive = False  # the call that is followed
    peeks = False

    def exact(self, at: int) -> bool:
        """Whether the script must match the specification to the microsecond."""
        target = self.spec.target
        if (
            self.jumped
            or at < self.disturbed_until
            or target is None
            or (self.waits and (target.tokens or target.money))
        ):
            return False
        return all(self.spec.counts_since(limit, at) >= self.known_from for limit in target.windows)

    def _follow(self, call: ScriptCall, needs: Needs) -> None:  # noqa: C901 - one branch per verb
        if call.verb in {"reserve", "peek"}:
            if self.jumped:
                asked = (
                    self.spec.priority.asked_at is not None
                )  # the script's times of requests were not moved
                self.jumped, self.disturbed_until = False, call.at + (FOREVER if asked else self.retention)
            self._follow_reserve(call, needs)
        elif call.verb == "release":
            if self.state != "gone":
                for record in struct.iter_unpack("<5d16s", call.arguments[0]):  # type: ignore[arg-type]
                    self._follow_release(*record)
        elif call.verb == "target":
            taken, version = struct.unpack("<2d", call.reply)
            line = call.arguments[2]
            self._follow_target(
                call, taken, version, TrafficTarget.parse(line if isinstance(line, str) else line.decode())
            )
        elif call.verb == "outcome":
            if self.state != "gone":
                self._follow_outcome(call)
        elif call.verb == "loss":
            live, _, clock, *_ = struct.unpack("<6d", call.reply)
            self._require(not live or self.state != "gone", "lost state counts as live")
            self.clock_reading = (call.at, clock)
        elif call.verb == "rebuild":
            self._follow_rebuild(call)

    def _follow_reserve(self, call: ScriptCall, needs: Needs) -> None:
        status, generation, head, _, again, reason, slack, clock, *_, ahead = unpack_decision(call.reply)
        sender, _, _, asks = struct.unpack_from("<8d", call.arguments[0])[4:]  # type: ignore[arg-type]
        self.interactive, self.peeks = bool(asks), call.verb == "peek"
        commit = not self.peeks
        if status == MORE:
            return
        self.slack = int(slack)
        if status == 2:
            seen_version = struct.unpack_from("<4d", call.arguments[0])[3]  # type: ignore[arg-type]
            older = seen_version > self.spec.version
            self._require(self.spec.target is None or older, "a target was lost")
            return
        if status == LOST:
            seen = struct.unpack_from("<d", call.arguments[0])[0]  # type: ignore[arg-type]
            older = seen > self.generation  # built by a client that knew less, after the clock was set back
            self._require(self.state != "sound" or older, "sound state was discarded")
            self.state = "gone"
            return
        self._require(self.state != "gone", "permits from lost state")
        self.generation = generation
        self.spec.epoch = round(clock) - call.at
        priority = self.spec.priority
        if commit and needs and self.spec.target is not None:
            priority.begin(call.at, sender, self.spec.target, self.spec.sends, interactive=self.interactive)
        grants = list(unpack_grants(call.reply))
        exact = self.exact(call.at) and self.state == "sound"
        for (number, wait), *need in zip(grants, needs[::2], needs[1::2], strict=False):
            self._follow_grant(call.at, int(number), round(wait), (need[0], need[1]), exact=exact)
        self._require(head == self.spec.head, f"the script counts {head} sends, not {self.spec.head}")
        hint = (None if again < 0 else round(again), WaitReason(int(reason)))
        if exact:
            self._require_denial(call.at, needs[2 * len(grants) :], hint, fresh=not grants)
            expected = 0 if hint[1] is WaitReason.PRIORITY else self._horizon(call.at)
            self._require(ahead == expected, f"the look-ahead is {ahead} us, not {expected}")
        if (
            commit
            and hint[1] in {WaitReason.BUDGET, WaitReason.TOO_EXPENSIVE}
            and len(needs) > 2 * len(grants)
        ):
            self.spec.denied(call.at, needs[2 * len(grants) + 1])
        self._follow_ask(call.at, sender if commit else 0, len(needs) > 2 * len(grants), hint)

    def _follow_ask(self, at: int, sender: float, denied: bool, hint: tuple[int | None, WaitReason]) -> None:
        again, reason = hint
        priority = self.spec.priority
        if reason is WaitReason.PRIORITY:
            priority.yield_until = at + (again or 0)
        if sender < 0:
            waits = denied and (again is not None or reason in ONLY_AGAIN)
            waits_for = 0 if reason in ONLY_AGAIN else at + (again or 0)
            priority.end(at, sender, waits_for if waits else None)
            if waits and reason is not WaitReason.PRIORITY:
                priority.yield_until = 0

    def _check_rebuild_time(self, at: int) -> None:
        """Recovery may take until permits expired and, without a history, the windows are over."""
        noticed = self.noticed.setdefault(self.current, at)
        longest = 0.35 if self.with_history else 0.35 + self.retention / MICRO
        self._require(at - noticed <= micros(4 * longest), f"the state is lost for {at - noticed} us")

    def _follow_grant(self, at: int, number: int, wait: int, need: tuple[int, int], *, exact: bool) -> None:
        decision = self.spec.decide(at, *need, interactive=self.interactive)
        expected = f"expected {self._in(decision, at)} us for {decision.reason.name}"
        what = f"send {number} is granted in {wait} us, {expected}"
        self._require(number == self.spec.head, f"send {number} should have number {self.spec.head}")
        self._require(decision.send_at is not None and decision.reason not in ONLY_AGAIN, what)
        soonest = decision.send_at or 0
        grain = 0 if exact else 1  # a clock step is corrected to the microsecond
        self._require(at + wait >= soonest - grain, what)
        self._require(0 <= wait <= LOOK, what)
        self._require(not exact or at + wait == soonest, what)
        if exact:
            self._require(wait <= self._horizon(at), f"{what} beyond the look-ahead of its class")
            self._require(not self._must_yield(at, at + wait), f"{what}, which is kept for the other class")
        self.spec.grant(at, at + wait, *need, interactive=self.interactive)

    def _horizon(self, at: int) -> float:
        assert self.spec.target is not None
        return self.spec.priority.horizon(at, self.spec.target, interactive=self.interactive)

    def _must_yield(self, at: int, send_at: int) -> bool:
        assert self.spec.target is not None
        priority = self.spec.priority
        if not priority.asking(at) or 0 < priority.yield_until <= at:
            return False
        return priority.yields(at, send_at, self.spec.target, interactive=self.interactive)

    def _require_denial(
        self, at: int, left: Needs, hint: tuple[int | None, WaitReason], *, fresh: bool
    ) -> None:
        again, reason = hint
        short = self.spec.short if self.peeks and at < self.spec.short_until else 0
        decision = self.spec.decide(
            at, *((0, short) if short else left[:2] or (0,)), interactive=self.interactive
        )
        soonest = None if decision.send_at is None else decision.send_at - at
        what = f"the next send waits {again} us for {reason.name}, not {soonest} for {decision.reason.name}"
        if not left:  # a prediction: it may be too early, never too late
            in_time = again is not None and soonest is not None and again <= soonest
            self._require(in_time or reason is decision.reason or again is None, what)
            return
        denied = (
            decision.send_at is None or decision.reason in ONLY_AGAIN or (soonest or 0) > self._horizon(at)
        )
        if not denied and self._must_yield(at, decision.send_at or 0):
            pace = self.spec.priority.due if self.interactive else 0
            until = self.spec.priority.yield_until or max(decision.send_at or 0, at + 50_000, pace)
            self._require(reason is WaitReason.PRIORITY and again == until - at, f"{what}, but it must yield")
            return
        self._require(denied or self.peeks, what)
        same = reason is decision.reason or {reason, decision.reason} <= TIMED
        self._require(same and (again == soonest or not fresh), what)

    def _follow_release(  # noqa: PLR0917 - one record
        self, generation: float, number: float, used: float, spent: float, unused: float, call_id: bytes
    ) -> None:
        rebuilt = self.rebuilt.pop(call_id, None)
        current = int(number) if generation == self.generation else rebuilt
        if current is not None and unused:
            self.spec.cancel(current)
        elif current is not None:
            self.spec.release(current, None if used < 0 else int(used), None if spent < 0 else int(spent))
        if rebuilt not in {None, current}:
            self.spec.cancel(rebuilt)

    def _follow_outcome(self, call: ScriptCall) -> None:
        _, _, signal, cooldown, generation, number, *_, known_trips = struct.unpack("<10d", call.arguments[0])  # type: ignore[arg-type]
        known = int(number) if number >= 0 and generation == self.generation else None
        if Signal(int(signal)) is Signal.RESTORE:
            self.spec.breaker.trips = max(self.spec.breaker.trips, int(known_trips))
        self.spec.record_outcome(call.at, Signal(int(signal)), cooldown / MICRO, known)
        _, failures, trips, _ = struct.unpack("<4d", call.reply)
        breaker = self.spec.breaker
        if not self.exact(call.at) and (failures, trips) != (
            breaker.failures,
            breaker.trips,
        ):  # it may still cool down there
            breaker.opened_at = self.spec.head if trips > breaker.trips else breaker.opened_at
            breaker.failures, breaker.trips = int(failures), int(trips)
        ours = (breaker.failures, breaker.trips)
        self._require((failures, trips) == ours, f"failures and trips are {(failures, trips)}, not {ours}")

    def _follow_target(self, call: ScriptCall, taken: float, version: float, target: TrafficTarget) -> None:
        wanted = struct.unpack_from("<d", call.arguments[0])[0]  # type: ignore[arg-type]
        allowed = wanted == 0 or wanted >= self.spec.version
        self._require(bool(taken) == allowed, f"version {wanted:.0f} over {self.spec.version:.0f}: {taken}")
        if taken:
            self._require(version >= self.spec.version, "a version decreased")
            self.spec.set_target(target, version)
            self.changes.append(TargetChange(call.at / MICRO, MODEL, target))
            if self.state == "sound" and self.redis.do("HGET", KEY, "run") == b"4:":
                longer = self.with_history and target.longest_window_seconds > KEPT_SECONDS
                self._require(longer, "sound state was discarded by a target")
                self.state = "gone"  # sends from before the log are read from the history
                self.noticed.clear()
                self.disturbed_until = max(self.disturbed_until, call.at)

    def _follow_rebuild(self, call: ScriptCall) -> None:
        (built,) = struct.unpack("<d", call.reply)
        self._require(bool(built), "the state was not rebuilt")
        valid = [
            held
            for held in self.held
            if held.sent_at is None and not held.permit.returned and not self._expired(held)
        ]
        self._require(not valid, f"rebuilt while {len(valid)} permits are valid")
        send_times = call.arguments[1]
        read_at, clock = self.clock_reading
        holder = micros(SETTINGS.max_call_seconds)
        sends = []
        for number, (send_at,) in enumerate(struct.iter_unpack("<d", send_times)):  # type: ignore[arg-type]
            true = read_at + round(send_at - clock)
            sends.append(Send(number, true, 0, true + holder, true))
        self.rebuilt.clear()
        ordered = sorted(self.rows, key=lambda row: -row.age_seconds_latest)
        self._require(len(ordered) == len(sends), "calls of the history are missing")
        for send, row in zip(sends, ordered, strict=True):
            send.tokens, send.cost, send.returned = row.tokens, row.cost, not row.open
            if row.open and row.call_id is not None:
                self.rebuilt[row.call_id.bytes] = send.number
            soonest = self.rows_at - round(row.age_seconds_latest * MICRO)
            self._require(send.send_at >= soonest - 1, "a past call counts as older than it is")
        *_, cooldown, trips = struct.unpack("<6d", call.arguments[0])  # type: ignore[arg-type]
        self.spec.rebuild(sends, call.at + round(cooldown) if cooldown > 0 else 0, int(trips))
        self.rows = []
        self.state = "sound"
        self.noticed.clear()
        since = struct.unpack_from("<2d", call.arguments[0])[1]  # type: ignore[arg-type]
        self.known_from = read_at + round(since - clock) if since > 0 else 0

    def _in(self, decision: Decision, at: int) -> int | None:
        return None if decision.send_at is None else decision.send_at - at

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise Mismatch(
                f"step {self.steps} {[(call.verb, call.at) for call in self.redis.calls]}, "
                f"at {self.now} with {self.spec.target}: {message}"
            )
