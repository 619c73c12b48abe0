"""The ideal limiter: exact, without overhead, applying every target at the time of its edit.

*Use* and *bound* are measured against it. It gives the same guarantees as the real limiter (at most N in
every window, paced sends) without its costs: no slack for the way to the backend, no time to decide, no
delay until an edit is applied. What it could have sent is what could have been used.

How it finds the next send time, in whole nanoseconds:
- requests: the N-th last send is at least W old, for each limit, and the last one at least the pacing gap;
- concurrency: a slot is free as soon as a call ends;
- tokens and money: each call counts with its reservation until it ends and with its use afterwards, for W
  from its send, or until the end of the calendar period;
- a new target applies to the whole history from its time on. A target of 0 sends nothing.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.judge.arrivals import NANOSECONDS, NEVER, ModelLog, TargetChange, nanoseconds
from router.errors import InputError
from router.traffic import MoneyLimit, TokenLimit, TrafficTarget

MOST_SENDS = 10_000_000


Amounts = tuple[int, int, int, int]  # of a call: tokens reserved and used, money reserved and used
NOTHING = (0, 0, 0, 0)


@dataclass(slots=True)
class _Budget:
    """Tokens or money of the calls in the window; those before `first` are older."""

    kind: int  # 0 for tokens, 1 for money
    window: int
    calendar: str | None = None
    utc_offset: int = 0
    first: int = 0
    spent: int = 0

    def expiry(self, sent_at: int) -> int:
        """Returns when a call leaves the window."""
        if self.calendar is None:
            return sent_at + self.window
        period = np.datetime64(sent_at + self.utc_offset, "ns").astype(
            "datetime64[D]" if self.calendar == "day" else "datetime64[M]"
        )
        return int((period + 1).astype("datetime64[ns]").astype(np.int64)) - self.utc_offset


class IdealLimiter:
    """One model's ideal limiter. Time only moves forward: `next_send`, then `send` at that time."""

    def __init__(self, changes: Sequence[TargetChange], start: int, utc_offset: int = 0) -> None:
        ordered = sorted(changes, key=lambda change: change.at_seconds)
        self._changes = [(nanoseconds(change.at_seconds), change.target) for change in ordered]
        self._next_change = 0
        self._target: TrafficTarget | None = None
        self._gap = 0
        self._now = start
        self._sent: list[int] = []
        self._counted: list[tuple[int, int]] = []  # tokens and money that each send counts for now
        # Heap: end, index of the send, tokens and money that it will count for.
        self._running: list[tuple[int, int, tuple[int, int]]] = []
        self._budgets: dict[TokenLimit | MoneyLimit, _Budget] = {}
        for _, target in self._changes:
            for tokens in target.tokens:
                self._budgets[tokens] = _Budget(0, tokens.window_seconds * NANOSECONDS)
            for money in target.money:
                window = money.window_seconds * NANOSECONDS
                self._budgets[money] = _Budget(1, window, money.calendar, utc_offset)
        self._ends_matter = bool(self._budgets) or any(
            target.at_once is not None for _, target in self._changes if not target.stopped
        )
        self._enter_changes(start)

    def next_send(self, tokens: int, money: int = 0) -> int | None:
        """Earliest time (ns) at which a call with this reservation may be sent; None: never again."""
        while True:
            change = self._changes[self._next_change][0] if self._next_change < len(self._changes) else NEVER
            send_at = self._earliest((tokens, money), before=change)
            if send_at is not None:
                self._now = send_at
                return send_at
            if change == NEVER:
                return None
            self._now = change
            self._enter_changes(change)

    def send(  # noqa: PLR0917 - `amounts` of one call
        self, at: int, latency: int, tokens: int, used: int, money: int = 0, spent: int = 0
    ) -> None:
        """Records a call sent `at` that takes `latency` (ns), with the tokens and money reserved and used."""
        if self._ends_matter:
            heapq.heappush(self._running, (at + max(1, latency), len(self._sent), (used, spent)))
            self._counted.append((tokens, money))
            for budget in self._budgets.values():
                budget.spent += (tokens, money)[budget.kind]
        self._sent.append(at)
        self._now = max(self._now, at)

    def _enter_changes(self, now: int) -> None:
        while self._next_change < len(self._changes) and self._changes[self._next_change][0] <= now:
            self._target = self._changes[self._next_change][1]
            self._gap = nanoseconds(self._target.gap_seconds)
            self._next_change += 1

    def _earliest(self, needs: tuple[int, int], before: int) -> int | None:
        target = self._target
        if target is None or target.stopped:
            return None
        send_at = self._now
        if self._sent:
            send_at = max(send_at, self._sent[-1] + self._gap)
        for limit in target.requests:
            if len(self._sent) >= limit.count:
                send_at = max(send_at, self._sent[-limit.count] + limit.window_seconds * NANOSECONDS)
        while send_at < before:
            wait_until = self._blocked_until(target, needs, send_at) if self._ends_matter else None
            if wait_until is None:
                return send_at
            send_at = wait_until
        return None

    def _blocked_until(self, target: TrafficTarget, needs: tuple[int, int], now: int) -> int | None:
        self._advance(now)
        if target.at_once is not None and len(self._running) >= target.at_once:
            return self._running[0][0]
        limits: tuple[TokenLimit | MoneyLimit, ...] = (*target.tokens, *target.money)
        for limit in limits:
            budget = self._budgets[limit]
            need = needs[budget.kind]
            # A call larger than the whole window waits until the window is empty.
            if need and budget.spent + min(need, limit.count) > limit.count:
                expiry = budget.expiry(self._sent[budget.first])
                return min(expiry, self._running[0][0]) if self._running else expiry
        return None

    def _advance(self, now: int) -> None:
        while self._running and self._running[0][0] <= now:
            _, index, used = heapq.heappop(self._running)
            for budget in self._budgets.values():
                if index >= budget.first:
                    budget.spent += used[budget.kind] - self._counted[index][budget.kind]
            self._counted[index] = used
        for budget in self._budgets.values():
            while budget.first < len(self._sent) and budget.expiry(self._sent[budget.first]) <= now:
                budget.spent -= self._counted[budget.first][budget.kind]
                budget.first += 1


def replay_ideal(
    changes: Sequence[TargetChange],
    latencies: Sequence[float] | NDArray[np.float64],
    backlog_from: float,
    until: float,
    *,
    amounts: Sequence[Amounts] = (),
    before: ModelLog | None = None,
    most: int = MOST_SENDS,
    utc_offset: int = 0,
) -> NDArray[np.float64]:
    """Send times (seconds) of the ideal limiter in [backlog_from, until] with a constant backlog.

    `changes` are one model's. The i-th send takes the i-th of `latencies` (seconds) and of `amounts`,
    cycling. `before` are calls sent before the backlog began: they occupy the ideal's windows as they
    occupied the real ones. It stops after `most` sends.
    """
    if len({change.model for change in changes}) > 1:
        raise ValueError("replay_ideal takes the changes of one model; bound() takes those of several")
    start, end = nanoseconds(backlog_from), nanoseconds(until)
    limiter = IdealLimiter(changes, start, utc_offset)
    if before is not None:
        columns = [column.tolist() for column in before[:6]]
        for at, ended, *rest in zip(*columns, strict=True):
            limiter.send(at, ended - at, *rest)
    drawn = [nanoseconds(float(latency)) for latency in latencies] or [0]
    draws = zip(itertools.cycle(drawn), itertools.cycle(amounts or [NOTHING]))
    sends: list[int] = []
    for latency, one in itertools.islice(draws, most):
        send_at = limiter.next_send(one[0], one[2])
        if send_at is None or send_at > end:
            break
        limiter.send(send_at, latency, *one)
        sends.append(send_at)
    return np.array(sends, dtype=np.float64) / NANOSECONDS


@dataclass(frozen=True)
class Bound:
    """Earliest end of a backlog: `seconds` from its start to the last answer, and each model's share."""

    seconds: float
    sent: dict[str, int]


def bound(
    changes: Sequence[TargetChange],
    tasks: int,
    latency_of: Callable[[str, int], float],
    start: float,
    *,
    tokens_of: Callable[[str, int], tuple[int, int]] | None = None,
) -> Bound:
    """Earliest time of the last answer to `tasks` tasks, all present at `start`, with ideal limiters.

    Work-conserving: the model that may send next takes the next task, so the sends are the `tasks` earliest
    of all models' ideal sends, and the last answer is the latest of their ends. No task waits for a faster
    model, and every task is answered at the first attempt. `latency_of(model, task)` is in seconds,
    with tasks numbered from 0 in the order of their sends; `tokens_of(model, n)` gives (reserved, used) of
    the model's own n-th call. Raises InputError if the
    targets do not allow all tasks to be sent.
    """
    limiters = {
        model: IdealLimiter([change for change in changes if change.model == model], nanoseconds(start))
        for model in sorted({change.model for change in changes})
    }
    sent = dict.fromkeys(limiters, 0)
    tokens = {model: tokens_of(model, 0) if tokens_of else (0, 0) for model in limiters}
    upcoming = [
        (send_at, model)
        for model, limiter in limiters.items()
        if (send_at := limiter.next_send(tokens[model][0])) is not None
    ]
    heapq.heapify(upcoming)
    last_answer = nanoseconds(start)
    for task in range(tasks):
        if not upcoming:
            raise InputError(f"The targets let only {task} of {tasks} tasks be sent: all models end stopped.")
        send_at, model = heapq.heappop(upcoming)
        latency = nanoseconds(latency_of(model, task))
        limiters[model].send(send_at, latency, *tokens[model])
        sent[model] += 1
        last_answer = max(last_answer, send_at + latency)
        if task + 1 == tasks:
            break
        tokens[model] = tokens_of(model, sent[model]) if tokens_of else (0, 0)
        following = limiters[model].next_send(tokens[model][0])
        if following is not None:
            heapq.heappush(upcoming, (following, model))
    return Bound((last_answer - nanoseconds(start)) / NANOSECONDS, sent)
