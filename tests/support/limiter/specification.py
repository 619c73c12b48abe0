"""Specification of the limiter: a plain list of sends, counted one by one. Slow and simple.

All times are whole microseconds of true time, of a clock that never steps. The specification determines the
earliest send time of each call; the script must return the same.

- A send counts from its send time for a period: its window, the window's transit slack, and the longer of the
  send slacks of the current target and of the one it was decided with. Windows are half-open. When a target
  with a shorter slack is applied, earlier sends count with the longest slack so far.
- Tokens and money count as reserved, and as used once the call is released. A cancelled send does not count.
- In a calendar period a send counts from its send time until its slacks are over: until the end of the period
  in which that is. `epoch` is what UTC shows, in microseconds since 1970, at time 0.
- A call is in flight from its decision until it is released or cancelled, at most until its `end`.
- Send times never decrease, and paced ones keep a gap; after the latest is cancelled, from the one before it.
- While somebody asks, interactive calls go before batch calls: see `Priority`.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone

from router.limiter.breaker import BreakerSettings, Signal
from router.limiter.permit import WaitReason
from router.limiter.settings import LimiterSettings
from router.settings import InteractiveShare
from router.traffic import CALENDAR_SECONDS, MoneyLimit, RequestLimit, TokenLimit, TrafficTarget

MICRO = 1_000_000
TIMED = frozenset({WaitReason.WINDOW, WaitReason.TOKENS, WaitReason.BUDGET, WaitReason.COOLING_DOWN})
SHORT_KEPT = 30 * MICRO
BEGIN = datetime(1970, 1, 1, tzinfo=timezone.utc)
Limit = RequestLimit | TokenLimit | MoneyLimit


def micros(seconds: float) -> int:
    """Converts seconds to whole microseconds."""
    return round(seconds * MICRO)


@dataclass(slots=True)
class Send:
    """One granted permit."""

    number: int
    send_at: int
    tokens: int
    end: int
    expires: int  # the latest time at which it may be sent
    cost: int = 0
    cancelled: bool = False
    returned: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """Earliest time of the next send (None if only a change can help), and what it waits for."""

    send_at: int | None
    reason: WaitReason


@dataclass
class Breaker:
    """Circuit breaker: opened by failures in a row, each time for longer, then probed by single calls."""

    trips: int = 0
    failures: int = 0
    opened_at: int = 0  # number of the next send then: earlier calls do not affect the probe
    probe: int | None = None
    probe_end: int = 0

    def is_stale(self, number: int | None, *, cooling_down: bool) -> bool:
        """Whether a call was sent, as far as known, before the breaker opened."""
        return self.trips > 0 and (cooling_down if number is None else number < self.opened_at)

    def success(self) -> None:
        self.trips = self.failures = 0

    def failure(self, head: int, settings: BreakerSettings) -> float:
        """Records a failure; returns the seconds of cool-down if it opens the breaker."""
        self.failures += 1
        if not self.trips and self.failures < settings.failure_threshold:
            return 0.0
        self.trips, self.failures, self.opened_at = self.trips + 1, 0, head
        self.probe, self.probe_end = None, 0
        return float(
            min(settings.max_cooldown_seconds, settings.initial_cooldown_seconds * 2 ** (self.trips - 1))
        )

    def ended(self, number: int | None) -> None:
        """Ends the probe, whatever its outcome."""
        if self.trips and number is not None and number == self.probe:
            self.probe, self.probe_end = None, 0


@dataclass
class Priority:
    """Right of way of interactive calls, within 10 minutes of the latest.

    A denied interactive call that waits leaves an ask. A batch call gets no send for which one waits, and no
    interactive call gets one that a batch call waits for once its credit is used up: until the send time, or
    50 ms after the first call that had to yield. Batch calls are spread over the whole padded window.
    """

    settings: LimiterSettings
    asked_at: int | None = None
    asks: dict[float, tuple[int, int]] = field(default_factory=dict)  # sender -> (waits for, ends)
    credit: float = 0.0
    batch_at: int | None = None
    yield_until: int = 0
    due: int = 0

    def asking(self, now: int) -> bool:
        return self.asked_at is not None and now < self.asked_at + 600 * MICRO

    def begin(
        self, now: int, sender: float, target: TrafficTarget, sends: list[Send], *, interactive: bool
    ) -> None:
        """Records a request for permits; `sender` is 0 if it does not wait for them."""
        if interactive:
            if not self.asking(now):
                self.credit, self.batch_at = self._most_credit, None
                self._spread(now, target, sends)
            self.asked_at = now
        elif self.asking(now) and sender:
            self.batch_at = now

    def end(self, now: int, sender: float, waits_for: int | None) -> None:
        """Records whether an interactive sender still waits: for a send time, 0 for any."""
        self.asks = {who: ask for who, ask in self.asks.items() if ask[1] > now and who != sender}
        if waits_for is not None:
            self.asks[sender] = (waits_for, now + 3 * MICRO)

    def horizon(self, now: int, target: TrafficTarget, *, interactive: bool) -> float:
        """Returns how far ahead a permit may be granted."""
        look_ahead = micros(self.settings.look_ahead_seconds)
        if interactive or not self.asking(now):
            return look_ahead
        return min(look_ahead, max(micros(target.gap_seconds) / 3, 50_000))

    def yields(self, now: int, send_at: int, target: TrafficTarget, *, interactive: bool) -> bool:
        """Whether the class of a call must leave this send to the other."""
        used_up = self.batch_waits(now, target) and self.credit < 1 - self._share.at_most - 1e-9
        if interactive:
            return used_up and self.due <= send_at + micros(target.gap_seconds)
        asks = [waits_for for waits_for, ends in self.asks.values() if ends > now]
        return not used_up and bool(asks) and min(asks) <= send_at + micros(target.gap_seconds)

    def batch_waits(self, now: int, target: TrafficTarget) -> bool:
        charge = 1 - self._share.at_most
        if not self.asking(now) or self.batch_at is None or not charge:
            return False
        return now < self.batch_at + 3 * MICRO + 4 * self._step(target) / charge

    def granted(self, now: int, send_at: int, target: TrafficTarget, *, interactive: bool) -> None:
        """Accounts a send."""
        step, reserved = self._step(target), bool(self._share.reserved)
        if step and (not interactive if reserved else self.asking(now)):
            late = 0 if reserved else max(micros(target.gap_seconds) // 2, 250_000)
            self.due = max(self.due, send_at - late) + step
        if self.asking(now):
            self.yield_until = 0
            if not interactive:
                self.credit = min(self._most_credit, self.credit + self._share.at_most)
            elif self.batch_waits(now, target):
                self.credit = max(0, self.credit - (1 - self._share.at_most))

    def cancelled(self, target: TrafficTarget) -> None:
        """Gives the pace of a cancelled send back."""
        if self.due > 0:
            self.due -= self._step(target)

    def _spread(self, now: int, target: TrafficTarget, sends: list[Send]) -> None:
        """Makes batch calls wait until those of each window are no more than at an even pace."""
        slack = self.settings.send_slack(target)
        for limit in target.requests if self._step(target) and not self._share.reserved else ():
            transit = self.settings.slacks(limit.window_seconds).transit
            period = micros(limit.window_seconds + slack + transit)
            within = [send for send in sends if send.send_at > now - period]
            if within:
                self.due = max(self.due, within[0].send_at + len(within) * period // limit.count)

    @property
    def _share(self) -> InteractiveShare:
        return self.settings.interactive

    @property
    def _most_credit(self) -> float:
        return max(3 * (1 - self._share.at_most), self._share.at_most)

    def _step(self, target: TrafficTarget) -> int:
        if target.stopped or (target.burst and not self._share.reserved):
            return 0
        slack = self.settings.send_slack(target)
        periods = [
            (limit.window_seconds + slack + self.settings.slacks(limit.window_seconds).transit) / limit.count
            for limit in target.requests
        ]
        return micros(max(periods, default=0.0) / (1 - self._share.reserved))


@dataclass
class LimiterSpec:
    """Limiter of one model. `now` never decreases."""

    settings: LimiterSettings
    target: TrafficTarget | None = None
    version: float = 0
    sends: list[Send] = field(default_factory=list)
    head: int = 0
    cooldown_until: int = 0
    late_seconds: float = 0.0  # longest slack of earlier targets, and when the last
    late_until: int = 0  # of their permits expires
    breaker: Breaker = field(default_factory=Breaker)
    epoch: int = 0
    short: int = 0  # the least cost that a budget denied lately: a peek asks for it
    short_until: int = 0
    priority: Priority = field(init=False)

    def __post_init__(self) -> None:
        self.priority = Priority(self.settings)

    # -- targets and outcomes ----

    def set_target(self, target: TrafficTarget, version: float) -> None:
        """Applies a target to all sends; a version older than the applied one is ignored."""
        if version < self.version:
            return
        before = self.settings.send_slack(self.target) if self.target is not None else 0.0
        if before > self.settings.send_slack(target) and self.sends:
            self.late_seconds = max(self.late_seconds, before)
            for send in self.sends:
                send.expires = send.send_at + micros(self.late_seconds)
            self.late_until = self.sends[-1].expires
        if target != self.target:
            self.priority.yield_until = self.priority.due = 0
        if target != self.target:
            self.short = 0
        self.target, self.version = target, version

    def cool_down(self, now: int, seconds: float) -> None:
        """Starts a cool-down; a shorter one does not end a longer one."""
        self.cooldown_until = max(self.cooldown_until, now + micros(seconds))

    def record_outcome(self, now: int, signal: Signal, seconds: float, number: int | None) -> None:
        """Records an outcome; `number` is the call's send, None if unknown."""
        if signal is Signal.COOL_DOWN and seconds <= 0:  # an operator ends the cool-down
            self.cooldown_until = 0
            self.breaker.success()
        elif not self.breaker.is_stale(number, cooling_down=self.cooldown_until > now):
            if signal is Signal.SUCCESS:
                self.breaker.success()
            elif signal is Signal.FAILURE:
                self.cool_down(now, self.breaker.failure(self.head, self.settings.breaker))
        if seconds > 0:
            self.cool_down(now, seconds)
        self.breaker.ended(number)

    # -- sends ----

    def decide(self, now: int, tokens: int, cost: int = 0, *, interactive: bool = False) -> Decision:
        """Decides when one more send with these tokens and this cost may leave."""
        target = self.target
        if target is None:
            return Decision(None, WaitReason.NO_TARGET)
        blocked = self._blocked(target, now, tokens, cost)
        if blocked is not None:
            return blocked
        least = max(now, self.cooldown_until)
        if not interactive:
            least = max(least, self.priority.due)
        if self.sends:
            least = max(least, self.sends[-1].send_at + micros(target.gap_seconds))
        without_money = TrafficTarget(requests=target.requests, tokens=target.tokens)
        send_at = self._first_that_fits(target, least, tokens, cost)
        by_tokens = self._first_that_fits(without_money, least, tokens, 0)
        if send_at > by_tokens:
            return Decision(send_at, WaitReason.BUDGET)
        if by_tokens > self._first_that_fits(TrafficTarget(requests=target.requests), least, 0, 0):
            return Decision(send_at, WaitReason.TOKENS)
        return Decision(
            send_at, WaitReason.COOLING_DOWN if send_at == self.cooldown_until > now else WaitReason.WINDOW
        )

    def _blocked(self, target: TrafficTarget, now: int, tokens: int, cost: int) -> Decision | None:
        """Returns what the call waits for other than a window, if anything."""
        if target.stopped:
            return Decision(None, WaitReason.STOPPED)
        if any(tokens > limit.count for limit in target.tokens):
            return Decision(None, WaitReason.TOO_MANY_TOKENS)
        if any(cost > limit.count for limit in target.money):
            return Decision(None, WaitReason.TOO_EXPENSIVE)
        if target.at_once is not None and self.running(now) >= target.at_once:
            ends = [send.end for send in self.sends if not send.returned and send.end > now]
            return Decision(min(ends), WaitReason.CONCURRENCY)
        if self.breaker.trips and self.breaker.probe_end > now:
            return Decision(self.breaker.probe_end, WaitReason.HALF_OPEN)
        return None

    def grant(self, now: int, send_at: int, tokens: int, cost: int = 0, *, interactive: bool = False) -> Send:
        """Records a granted send."""
        self.short = 0 if cost > 0 else self.short
        if self.target is not None:
            self.priority.granted(now, send_at, self.target, interactive=interactive)
        holder = micros(self.settings.max_call_seconds)
        slack = 0.0 if self.target is None else self.settings.send_slack(self.target)
        send = Send(
            self.head, send_at, tokens, send_at + holder, max(send_at + micros(slack), self.late_until), cost
        )
        self.sends.append(send)
        self.head += 1
        if self.breaker.trips:
            self.breaker.probe, self.breaker.probe_end = send.number, send.end
        return send

    def release(self, number: int, used: int | None, spent: int | None = None) -> None:
        """Ends a call that used these tokens and this money (None: as reserved). Only the first counts."""
        self.breaker.ended(number)
        send = self._find(number)
        if send is not None and not send.returned:
            send.returned = True
            send.tokens = send.tokens if used is None else used
            send.cost = send.cost if spent is None else spent

    def cancel(self, number: int) -> None:
        """Cancels a send; if it was the latest, pacing continues from the one before it."""
        self.breaker.ended(number)
        send = self._find(number)
        if send is None or send.returned:
            return
        send.returned = send.cancelled = True
        if self.target is not None:
            self.priority.cancelled(self.target)
        if send is self.sends[-1] and len(self.sends) > 1:
            send.send_at = self.sends[-2].send_at

    def denied(self, now: int, cost: int) -> None:
        """Records a call that a budget denied."""
        fresh = self.short == 0 or now > self.short_until
        self.short, self.short_until = cost if fresh else min(self.short, cost), now + SHORT_KEPT

    # -- queries ----

    def running(self, now: int) -> int:
        """Counts the calls in flight."""
        return sum(not send.returned and send.end > now for send in self.sends)

    def counted(self, limit: Limit, at: int) -> list[Send]:
        """Returns the sends that count in a window at this time."""
        return [send for send in self.sends if not send.cancelled and at < self.leaves(send, limit)]

    def within(self, limit: Limit, at: int) -> list[Send]:
        """Returns the sends of the window that ends at this time, without slacks."""
        first = at - micros(limit.window_seconds)
        if isinstance(limit, MoneyLimit) and limit.calendar:
            first = self._period(limit.calendar, at)[0] - 1
        return [send for send in self.sends if not send.cancelled and first < send.send_at <= at]

    def counts_since(self, limit: Limit, at: int) -> int:
        """Returns a time before which no send counts at `at`."""
        assert self.target is not None
        window = limit.window_seconds
        slacks = micros(self.settings.send_slack(self.target) + self.settings.slacks(window).transit)
        if isinstance(limit, MoneyLimit) and limit.calendar:
            return self._period(limit.calendar, at)[0] - slacks
        return at - micros(window) - slacks

    def leaves(self, send: Send, limit: Limit) -> int:
        """Returns when a send leaves a window: with the current slack, or with its own if that is longer."""
        assert self.target is not None
        window = limit.window_seconds
        slack, transit = self.settings.send_slack(self.target), self.settings.slacks(window).transit
        today = send.send_at + micros(window + slack + transit)
        leaves = max(today, send.expires - micros(slack) + micros(window + slack + transit))
        if isinstance(limit, MoneyLimit) and limit.calendar:
            return self._period(limit.calendar, leaves - micros(CALENDAR_SECONDS[limit.calendar]))[1]
        return leaves

    def _period(self, kind: str, at: int) -> tuple[int, int]:
        """Returns begin and end of the calendar period that contains a time."""
        time = BEGIN + timedelta(microseconds=self.epoch + at)
        begin = time.replace(hour=0, minute=0, second=0, microsecond=0)
        if kind == "day":
            end = begin + timedelta(days=1)
        else:
            begin = begin.replace(day=1)
            end = (begin + timedelta(days=31)).replace(day=1)
        return self._at(begin), self._at(end)

    def _at(self, time: datetime) -> int:
        return (time - BEGIN) // timedelta(microseconds=1) - self.epoch

    def _first_that_fits(self, target: TrafficTarget, least: int, tokens: int, cost: int) -> int:
        """Finds the first time that fits. Usage only decreases, so a bisection over the changes suffices."""
        changes = {self.leaves(send, limit) for send in self.sends for limit in target.windows}
        send_times = [least, *sorted(change for change in changes if change > least)]
        return send_times[
            bisect.bisect_left(send_times, True, key=lambda at: self._fits(target, at, tokens, cost))
        ]

    def _fits(self, target: TrafficTarget, at: int, tokens: int, cost: int) -> bool:
        for limit in target.requests:
            if len(self.counted(limit, at)) + 1 > limit.count:
                return False
        for tokens_limit in target.tokens:
            if sum(send.tokens for send in self.counted(tokens_limit, at)) + tokens > tokens_limit.count:
                return False
        for budget in target.money:
            if sum(send.cost for send in self.counted(budget, at)) + cost > budget.count:
                return False
        return True

    def _find(self, number: int) -> Send | None:
        if not self.sends or not 0 <= number - self.sends[0].number < len(self.sends):
            return None
        return self.sends[number - self.sends[0].number]

    # -- recovery ----

    def rebuild(self, sends: Iterable[Send], cooldown_until: int, trips: int) -> None:
        """Starts again with these sends, oldest first; outstanding permits are void."""
        self.sends = list(sends)
        self.head = len(self.sends)
        self.cooldown_until, self.breaker = cooldown_until, Breaker(trips)
        self.late_seconds, self.late_until, self.short, self.short_until = 0.0, 0, 0, 0
        self.priority = Priority(self.settings)

    def forget_before(self, at: int) -> None:
        """Drops sends that left all windows, for speed; the latest is kept for pacing."""
        old = bisect.bisect_left(self.sends, at, key=lambda send: send.send_at)
        del self.sends[: max(0, min(old, len(self.sends) - 2))]
