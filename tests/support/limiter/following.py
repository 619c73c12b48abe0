"""The specification at the side of the script: each call of the script is followed, and must be allowed."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from bench.judge import TargetChange
from router.limiter import LimiterSettings, PastCall, WaitReason
from router.limiter.breaker import Signal
from router.limiter.codec import LOST, unpack_decision, unpack_grants
from router.limiter.permit import Permit
from router.traffic import TrafficTarget
from tests.support.limiter.redis import Asked, ScriptRedis
from tests.support.limiter.specification import MICRO, TIMED, Decision, LimiterSpec, Send, micros

MODEL = "m"
KEY = f"router:{{{MODEL}}}"
EPOCH = 1_700_000_000 * MICRO
SETTINGS = LimiterSettings(max_call_seconds=8.0)
LOOK = micros(SETTINGS.look_ahead_seconds)
SETTLE_SECONDS = 0.6  # look-ahead, send slack and transit slack of what was decided before a change
SHORT_WAY = 12_000
MICRO_FLOAT = 1e6
ONLY_AGAIN = frozenset(
    {WaitReason.CONCURRENCY, WaitReason.HALF_OPEN}
)  # they wait for an end, not for a moment


class Difference(AssertionError):  # noqa: N818 - a fact about two models, not an error of one
    """The script did what the specification does not allow."""


@dataclass
class Held:
    """A permit in somebody's hands, and what became of it."""

    permit: Permit
    client: int
    moment: int
    sent_at: int | None = None
    arrived_at: int = 0
    ended_at: int | None = None
    used: int | None = None


class Following:
    """What is known of the script's state, and whether its replies agree with the specification."""

    spec: LimiterSpec
    redis: ScriptRedis
    now: int
    steps: int
    current: int
    with_history: bool
    jumped: bool
    disturbed_until: int
    known_from: int
    memory: int
    state: str
    generation: float
    clock_told: tuple[int, float]
    noticed: dict[int, int]
    rows: list[PastCall]
    rows_at: int
    held: list[Held]
    changes: list[TargetChange]
    slack: int

    def exact(self, at: int) -> bool:
        """Whether the script must know everything that the specification knows, to the microsecond."""
        target = self.spec.target
        if self.jumped or at < self.disturbed_until or target is None:
            return False
        windows = [limit.window_seconds for limit in (*target.requests, *target.tokens)]
        slack = SETTINGS.send_slack(target)
        periods = [micros(window + slack + SETTINGS.slacks(window).transit) for window in windows]
        return at - max(periods, default=0) >= self.known_from

    def _follow(self, asked: Asked, needs: tuple[int, ...]) -> None:  # noqa: C901 - one branch a verb
        if asked.verb == "reserve":
            if self.jumped:
                self.jumped, self.disturbed_until = False, asked.at + self.memory
            self._follow_reserve(asked, needs)
        elif asked.verb == "release":
            if self.state != "gone":
                for generation, number, used, unused in struct.iter_unpack("<4d", asked.arguments[0]):  # type: ignore[arg-type]
                    self._follow_return(generation, int(number), used, unused)
        elif asked.verb == "target":
            taken, version = struct.unpack("<2d", asked.reply)
            line = asked.arguments[2]
            self._follow_target(
                asked, taken, version, TrafficTarget.parse(line if isinstance(line, str) else line.decode())
            )
        elif asked.verb == "outcome":
            if self.state != "gone":
                self._follow_heed(asked)
        elif asked.verb == "loss":
            live, _, clock, *_ = struct.unpack("<6d", asked.reply)
            self._agree(not live or self.state != "gone", "a lost memory is held to be live")
            self.clock_told = (asked.at, clock)
        elif asked.verb == "rebuild":
            self._follow_rebuild(asked)

    def _follow_reserve(self, asked: Asked, needs: tuple[int, ...]) -> None:
        status, generation, head, _, again, reason, slack, *_ = unpack_decision(asked.reply)
        self.slack = int(slack)
        if status == 2:
            self._agree(self.spec.target is None, "a target was forgotten")
            return
        if status == LOST:
            seen = struct.unpack_from("<d", asked.arguments[0])[0]  # type: ignore[arg-type]
            older = seen > self.generation  # built by one who knew less, after the clock was set back
            self._agree(self.state != "sound" or older, "a sound memory was given up")
            self.state = "gone"
            return
        self._agree(self.state != "gone", "permits from a lost memory")
        self.generation = generation
        grants = list(unpack_grants(asked.reply))
        exact = self.exact(asked.at) and self.state == "sound"
        for (number, wait), need in zip(grants, needs, strict=False):
            self._follow_grant(asked.at, int(number), round(wait), need, exact=exact)
        self._agree(head == self.spec.head, f"the script counts {head} sends, and there are {self.spec.head}")
        if exact:
            hint = (None if again < 0 else round(again), WaitReason(int(reason)))
            self._agree_on_the_rest(asked.at, needs[len(grants) :], hint, fresh=not grants)

    def _agree_to_wait(self, at: int) -> None:
        """What is lost is back as soon as its permits are dead and, without a history, its windows over."""
        noticed = self.noticed.setdefault(self.current, at)
        longest = 0.35 if self.with_history else 0.35 + self.memory / MICRO
        self._agree(at - noticed <= micros(4 * longest), f"the memory is lost for {at - noticed} us")

    def _follow_grant(self, at: int, number: int, wait: int, need: int, *, exact: bool) -> None:
        decision = self.spec.decide(at, need)
        said = f"{decision.reason.name} says {self._in(decision, at)}"
        what = f"send {number} is granted in {wait} us, where {said}"
        self._agree(number == self.spec.head, f"send {number} is number {self.spec.head}")
        self._agree(decision.moment is not None and decision.reason not in ONLY_AGAIN, what)
        soonest = decision.moment or 0
        grain = 0 if exact else 1  # a clock that was set is corrected to the microsecond
        self._agree(at + wait >= soonest - grain, what)
        self._agree(0 <= wait <= LOOK, what)
        self._agree(not exact or at + wait == soonest, what)
        self.spec.grant(at + wait, need)

    def _agree_on_the_rest(
        self, at: int, left: tuple[int, ...], hint: tuple[int | None, WaitReason], *, fresh: bool
    ) -> None:
        again, reason = hint
        decision = self.spec.decide(at, left[0] if left else 0)
        soonest = None if decision.moment is None else decision.moment - at
        said = (
            f"the next is said to wait {again} us for {reason.name}, not {soonest} for {decision.reason.name}"
        )
        if not left:  # only a hint: it may be too soon, never too late
            in_time = again is not None and soonest is not None and again <= soonest
            self._agree(in_time or reason is decision.reason or again is None, said)
            return
        held_back = decision.moment is None or decision.reason in ONLY_AGAIN or (soonest or 0) > LOOK
        self._agree(held_back, said)
        same = reason is decision.reason or {reason, decision.reason} <= TIMED
        self._agree(same and (again == soonest or not fresh), said)

    def _follow_return(self, generation: float, number: int, used: float, unused: float) -> None:
        if generation == self.generation:
            if unused:
                self.spec.cancel(number)
            else:
                self.spec.release(number, None if used < 0 else int(used))

    def _follow_heed(self, asked: Asked) -> None:
        _, _, sign, rest, generation, number, *_, trips = struct.unpack("<10d", asked.arguments[0])  # type: ignore[arg-type]
        known = int(number) if number >= 0 and generation == self.generation else None
        if Signal(int(sign)) is Signal.RESTORE:
            self.spec.breaker.trip = max(self.spec.breaker.trip, int(trips))
        self.spec.record_outcome(asked.at, Signal(int(sign)), rest / MICRO, known)
        _, failures, trip, _ = struct.unpack("<4d", asked.reply)
        breaker = self.spec.breaker
        if not self.exact(asked.at) and (failures, trip) != (
            breaker.failures,
            breaker.trip,
        ):  # it may still rest there
            breaker.opened_at = self.spec.head if trip > breaker.trip else breaker.opened_at
            breaker.failures, breaker.trip = int(failures), int(trip)
        ours = (breaker.failures, breaker.trip)
        self._agree((failures, trip) == ours, f"failures and trip are {(failures, trip)}, not {ours}")

    def _follow_target(self, asked: Asked, taken: float, version: float, target: TrafficTarget) -> None:
        wanted = struct.unpack_from("<d", asked.arguments[0])[0]  # type: ignore[arg-type]
        allowed = wanted == 0 or wanted >= self.spec.version
        self._agree(bool(taken) == allowed, f"version {wanted:.0f} against {self.spec.version:.0f}: {taken}")
        if taken:
            self._agree(version >= self.spec.version, "a version went back")
            self.spec.set_target(target, version)
            self.changes.append(TargetChange(asked.at / MICRO, MODEL, target))

    def _follow_rebuild(self, asked: Asked) -> None:
        (built,) = struct.unpack("<d", asked.reply)
        self._agree(bool(built), "the memory was not built")
        alive = [
            held
            for held in self.held
            if held.sent_at is None and not held.permit.returned and not self._dead(held)
        ]
        self._agree(not alive, f"it is rebuilt while {len(alive)} permits are still out")
        moments = asked.arguments[1]
        told_at, clock = self.clock_told
        holder = micros(SETTINGS.max_call_seconds)
        sends = []
        for number, (moment,) in enumerate(struct.iter_unpack("<d", moments)):  # type: ignore[arg-type]
            true = told_at + round(moment - clock)
            sends.append(Send(number, true, 0, true + holder, true))
        ordered = sorted(self.rows, key=lambda row: -row.age_seconds_latest)
        self._agree(len(ordered) == len(sends), "the history was not taken whole")
        for send, row in zip(sends, ordered, strict=True):
            send.tokens, send.returned = row.tokens, not row.open
            soonest = self.rows_at - round(row.age_seconds_latest * MICRO)
            self._agree(send.moment >= soonest - 1, "a past call is held to be older than it is")
        *_, rests, trips = struct.unpack("<6d", asked.arguments[0])  # type: ignore[arg-type]
        self.spec.rebuild(sends, asked.at + round(rests) if rests > 0 else 0, int(trips))
        self.rows = []
        self.state = "sound"
        self.noticed.clear()
        since = struct.unpack_from("<2d", asked.arguments[0])[1]  # type: ignore[arg-type]
        self.known_from = told_at + round(since - clock) if since > 0 else 0

    def _in(self, decision: Decision, at: int) -> int | None:
        return None if decision.moment is None else decision.moment - at

    def _agree(self, so: bool, otherwise: str) -> None:
        if not so:
            raise Difference(
                f"step {self.steps} {[(asked.verb, asked.at) for asked in self.redis.asked]}, "
                f"at {self.now} with {self.spec.target}: {otherwise}"
            )
