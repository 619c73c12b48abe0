"""The limiter as one would explain it: a list of sends, counted one by one. Slow, and obviously right.

All times are whole microseconds of true time: of a clock that neither jumps nor stops. The specification says
at which moment a call may be sent at the soonest; the script must say the same, number by number.

- A send counts from its moment on for a period: its window, the send slack of the target in force now or when
  it was decided, whichever is longer, and the window's transit slack. Then it counts no longer: windows are
  half-open. When a target with a shorter slack comes, what was sent before counts with the longest so far.
- Tokens count as they were reserved, and as used once the call is released; a cancelled send counts nowhere.
- A call runs from its decision until it is released or cancelled, at the longest until its `end`.
- Moments never decrease, and paced ones keep a gap; after the latest was cancelled, from the one before it.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field

from router.limiter.breaker import BreakerSettings, Signal
from router.limiter.permit import WaitReason
from router.limiter.settings import LimiterSettings
from router.traffic import TrafficTarget

MICRO = 1_000_000
TIMED = frozenset({WaitReason.WINDOW, WaitReason.TOKENS, WaitReason.COOLING_DOWN})


def micros(seconds: float) -> int:
    """`seconds` as the nearest whole number of microseconds."""
    return round(seconds * MICRO)


@dataclass(slots=True)
class Send:
    """One granted permit."""

    number: int
    moment: int
    tokens: int
    end: int
    dead: int  # the latest moment at which it may have been sent
    cancelled: bool = False
    returned: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """The soonest moment of one more send, None if only a change can help; and what it waits for."""

    moment: int | None
    reason: WaitReason


@dataclass
class Breaker:
    """Doubt about a model: opened by failures in a row, each time for longer, and probed call by call."""

    trip: int = 0
    failures: int = 0
    opened_at: int = 0  # the number that the next send had: earlier ones say nothing about the probes
    probe: int | None = None
    probe_end: int = 0

    def says_nothing(self, number: int | None, *, resting: bool) -> bool:
        """Whether a call was sent before the breaker opened, as far as anybody knows."""
        return self.trip > 0 and (resting if number is None else number < self.opened_at)

    def good(self) -> None:
        self.trip = self.failures = 0

    def bad(self, head: int, settings: BreakerSettings) -> float:
        """One more failure; the seconds of rest if it opens the breaker (anew)."""
        self.failures += 1
        if not self.trip and self.failures < settings.failure_threshold:
            return 0.0
        self.trip, self.failures, self.opened_at = self.trip + 1, 0, head
        self.probe, self.probe_end = None, 0
        return float(
            min(settings.max_cooldown_seconds, settings.initial_cooldown_seconds * 2 ** (self.trip - 1))
        )

    def ended(self, number: int | None) -> None:
        """The probe is over, however it went: another may go."""
        if self.trip and number is not None and number == self.probe:
            self.probe, self.probe_end = None, 0


@dataclass
class LimiterSpec:
    """One model's limiter. `now` is always given, and never decreases."""

    settings: LimiterSettings
    target: TrafficTarget | None = None
    version: float = 0
    sends: list[Send] = field(default_factory=list)
    head: int = 0
    rest_until: int = 0
    late_seconds: float = 0.0  # the longest slack of targets before the one in force, and when the last
    late_until: int = 0  # permit of theirs was dead
    breaker: Breaker = field(default_factory=Breaker)

    # -- what operators and backends say ----

    def set_target(self, target: TrafficTarget, version: float) -> None:
        """From now on `target` judges all that was sent; an older version than the one in force loses."""
        if version < self.version:
            return
        before = self.settings.send_slack(self.target) if self.target is not None else 0.0
        if before > self.settings.send_slack(target) and self.sends:
            self.late_seconds = max(self.late_seconds, before)
            for send in self.sends:
                send.dead = send.moment + micros(self.late_seconds)
            self.late_until = self.sends[-1].dead
        self.target, self.version = target, version

    def cool_down(self, now: int, seconds: float) -> None:
        """Nothing is sent for so long; a shorter rest does not end a longer one."""
        self.rest_until = max(self.rest_until, now + micros(seconds))

    def record_outcome(self, now: int, sign: Signal, seconds: float, number: int | None) -> None:
        """What a call came to; `number` is its send, None if that is not known."""
        if sign is Signal.COOL_DOWN and seconds <= 0:  # an end of all doubt
            self.rest_until = 0
            self.breaker.good()
        elif not self.breaker.says_nothing(number, resting=self.rest_until > now):
            if sign is Signal.SUCCESS:
                self.breaker.good()
            elif sign is Signal.FAILURE:
                self.cool_down(now, self.breaker.bad(self.head, self.settings.breaker))
        if seconds > 0:
            self.cool_down(now, seconds)
        self.breaker.ended(number)

    # -- sends ----

    def decide(self, now: int, tokens: int) -> Decision:  # noqa: PLR0911 - one return a reason
        """When one more send of so many tokens may leave."""
        target = self.target
        if target is None:
            return Decision(None, WaitReason.NO_TARGET)
        if target.stopped:
            return Decision(None, WaitReason.STOPPED)
        if any(tokens > limit.count for limit in target.tokens):
            return Decision(None, WaitReason.TOO_MANY_TOKENS)
        if target.at_once is not None and self.running(now) >= target.at_once:
            ends = [send.end for send in self.sends if not send.returned and send.end > now]
            return Decision(min(ends), WaitReason.CONCURRENCY)
        if self.breaker.trip and self.breaker.probe_end > now:
            return Decision(self.breaker.probe_end, WaitReason.HALF_OPEN)
        least = max(now, self.rest_until)
        if self.sends:
            least = max(least, self.sends[-1].moment + micros(target.gap_seconds))
        moment = self._first_that_fits(target, least, tokens)
        if moment > self._first_that_fits(TrafficTarget(requests=target.requests), least, 0):
            return Decision(moment, WaitReason.TOKENS)
        return Decision(
            moment, WaitReason.COOLING_DOWN if moment == self.rest_until > now else WaitReason.WINDOW
        )

    def grant(self, moment: int, tokens: int) -> Send:
        """Record a send that was decided."""
        holder = micros(self.settings.max_call_seconds)
        slack = 0.0 if self.target is None else self.settings.send_slack(self.target)
        send = Send(self.head, moment, tokens, moment + holder, max(moment + micros(slack), self.late_until))
        self.sends.append(send)
        self.head += 1
        if self.breaker.trip:
            self.breaker.probe, self.breaker.probe_end = send.number, send.end
        return send

    def release(self, number: int, used: int | None) -> None:
        """The call ended having used so many tokens (None: as reserved). Only the first return counts."""
        self.breaker.ended(number)
        send = self._find(number)
        if send is not None and not send.returned:
            send.returned = True
            send.tokens = send.tokens if used is None else used

    def cancel(self, number: int) -> None:
        """Nothing was sent by this permit; if nothing followed, the pace goes on from the send before it."""
        self.breaker.ended(number)
        send = self._find(number)
        if send is None or send.returned:
            return
        send.returned = send.cancelled = True
        if send is self.sends[-1] and len(self.sends) > 1:
            send.moment = self.sends[-2].moment

    # -- what is there ----

    def running(self, now: int) -> int:
        """Calls that may be at work."""
        return sum(not send.returned and send.end > now for send in self.sends)

    def counted(self, window_seconds: int, at: int) -> list[Send]:
        """The sends that count in a window at this moment."""
        return [send for send in self.sends if not send.cancelled and at < self.leaves(send, window_seconds)]

    def leaves(self, send: Send, window_seconds: int) -> int:
        """When a send counts no longer: late by today's slack, or by its own if that was longer."""
        assert self.target is not None
        slack, transit = self.settings.send_slack(self.target), self.settings.slacks(window_seconds).transit
        today = send.moment + micros(window_seconds + slack + transit)
        return max(today, send.dead - micros(slack) + micros(window_seconds + slack + transit))

    def _first_that_fits(self, target: TrafficTarget, least: int, tokens: int) -> int:
        """Later is never worse: nothing is added, and what is there leaves. So the first change that fits."""
        windows = {limit.window_seconds for limit in (*target.requests, *target.tokens)}
        changes = {self.leaves(send, window) for send in self.sends for window in windows}
        moments = [least, *sorted(change for change in changes if change > least)]
        return moments[bisect.bisect_left(moments, True, key=lambda at: self._fits(target, at, tokens))]

    def _fits(self, target: TrafficTarget, at: int, tokens: int) -> bool:
        for limit in target.requests:
            if len(self.counted(limit.window_seconds, at)) + 1 > limit.count:
                return False
        for budget in target.tokens:
            if sum(send.tokens for send in self.counted(budget.window_seconds, at)) + tokens > budget.count:
                return False
        return True

    def _find(self, number: int) -> Send | None:
        if not self.sends or not 0 <= number - self.sends[0].number < len(self.sends):
            return None
        return self.sends[number - self.sends[0].number]

    # -- memory ----

    def rebuild(self, sends: Iterable[Send], rest_until: int, trip: int) -> None:
        """Begin anew with these sends, oldest first: numbers start again, and what was out is dead."""
        self.sends = list(sends)
        self.head = len(self.sends)
        self.rest_until, self.breaker = rest_until, Breaker(trip)
        self.late_seconds, self.late_until = 0.0, 0

    def forget_before(self, at: int) -> None:
        """Drop sends that no window can hold any more, to stay quick; the latest stays for the pace."""
        old = bisect.bisect_left(self.sends, at, key=lambda send: send.moment)
        del self.sends[: max(0, min(old, len(self.sends) - 2))]
