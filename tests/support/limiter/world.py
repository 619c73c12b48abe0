"""Several clients on one real Redis, compared step by step with the specification.

Time passes only in explicit steps, which may come in any order. `World` compares each reply of the script
with the specification, each permit with the clock rules, and finally has the judge check all arrivals.
"""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass, field, replace
from typing import Any

from bench.judge import Arrival, TargetChange, judge
from router.errors import LimiterUnavailable, PermitExpired
from router.limiter import PastCall, Permit, TrafficLimiter, Wait, WaitReason
from router.limiter.codec import Needs
from router.settings import InteractiveShare
from router.task import Outcome
from router.traffic import TrafficTarget
from tests.support.limiter.following import (
    EPOCH,
    KEY,
    MICRO_FLOAT,
    MODEL,
    SETTINGS,
    SETTLE_SECONDS,
    SHORT_WAY,
    Following,
    IssuedPermit,
    Mismatch,
)
from tests.support.limiter.redis import Connection, ScriptRedis, with_our_clock
from tests.support.limiter.specification import MICRO, LimiterSpec, micros

WAITING_AGAIN = 4  # every fourth call whose permit expired stays in the call log, unsent


Need = int | tuple[int, int]  # tokens, or tokens and cost


def flat(needs: tuple[Need, ...]) -> Needs:
    """Returns tokens and cost of each call, one after the other."""
    return tuple(part for need in needs for part in (need if isinstance(need, tuple) else (need, 0)))


async def reserve_many(
    limiter: TrafficLimiter, needs: tuple[Need, ...], *, waits: bool = False, interactive: bool = False
) -> tuple[list[Permit], Wait]:
    """Reserves a permit per need, in one round trip."""
    state = limiter._tracker.state(MODEL)
    return await limiter._reservations.reserve_many(state, flat(needs), waits=waits, interactive=interactive)


@dataclass
class World(Following):
    """Simulated deployment. `lines` are all targets that will be set: they determine how long sends count."""

    connection: Connection
    script: str
    lines: list[str]
    clients: int = 3
    with_history: bool = True
    now: int = 1_000 * MICRO
    skew: int = 0
    travels: list[int] = field(default_factory=list)
    waits: bool = False  # denied requests keep tokens free, which the specification does not know
    share: InteractiveShare = field(default_factory=InteractiveShare)
    steps: int = 0

    def __post_init__(self) -> None:
        self.redis = ScriptRedis(self.connection, self._wall, lambda: self.now, self._travel)
        self.redis.do("FLUSHALL")
        self.settings = replace(SETTINGS, interactive=self.share)
        self.spec = LimiterSpec(self.settings)
        self.limiters: list[TrafficLimiter] = []
        self.offsets = [0, 3 * 3600 * MICRO, -700 * MICRO]  # clients' clocks do not agree
        self.current = 0
        self.held: list[IssuedPermit] = []
        self.changes: list[TargetChange] = []
        self.state = "gone"  # "sound": the script has all sends; "doubtful": it may detect a loss
        self.generation = 0.0
        self.clock_reading = (0, 0.0)
        self.noticed: dict[int, int] = {}  # client -> since when it knows of the loss
        self.jumped = False  # since the last call
        self.disturbed_until = 0
        self.known_from = 0
        self.rows: list[PastCall] = []
        self.rebuilt: dict[bytes, int] = {}
        targets = [TrafficTarget.parse(line) for line in self.lines]
        self.longest = max((target.longest_window_seconds for target in targets), default=0)
        self.retention = micros(max(self.longest, SETTINGS.max_call_seconds) + 0.25)
        self.transit = micros(
            min(
                (SETTINGS.slacks(limit.window_seconds).transit for t in targets for limit in t.windows),
                default=SETTINGS.second_slacks.transit,
            )
        )
        for _ in range(self.clients):
            self.limiters.append(self._new_limiter())

    # -- time ----

    def _wall(self) -> int:
        return EPOCH + self.now + self.skew

    def _travel(self) -> None:
        took = self.travels.pop() if self.travels else 0
        self.now += took
        self.jumped = self.jumped or took > SHORT_WAY  # to the script, a step ahead

    def monotonic(self) -> float:
        """Clock of the client that acts now."""
        return (self.now + self.offsets[self.current]) / MICRO

    def pass_time(self, micro: int) -> None:
        self.now += micro

    def jump(self, micro: int) -> None:
        """Steps Redis's clock, ahead or back; all other clocks continue."""
        self.skew += micro
        self.jumped = True
        if micro < 0:
            self.noticed.clear()  # a loss noticed later than now starts again

    # -- clients ----

    def _new_limiter(self) -> TrafficLimiter:
        history = self._history if self.with_history else None
        redis: Any = self.redis
        client = TrafficLimiter(redis, history, settings=self.settings, clock=self.monotonic)
        client._script.text = with_our_clock(self.script)
        return client

    def restart_client(self, who: int) -> None:
        """Replaces a process by a new one that has seen nothing; permits of the old one are lost."""
        self.noticed.pop(who, None)
        self.limiters[who] = self._new_limiter()

    def seen(self, who: int) -> tuple[float, float]:
        """Returns the latest generation and head that a client has seen."""
        seen = self.limiters[who]._tracker.state(MODEL)
        return (seen.generation, seen.head)

    async def _history(self, _model: str, seconds: float) -> list[PastCall]:
        self.rows = []
        for held in self.held:
            call_id = held.permit.call_id
            if held.sent_at is not None and held.sent_at > self.now - seconds * MICRO:
                age = (self.now - held.sent_at) / MICRO
                used = held.permit.tokens if held.used is None else held.used
                spent = held.permit.cost if held.spent is None else held.spent
                self.rows.append(PastCall(age, used, held.ended_at is None, call_id, spent))
            elif (
                held.sent_at is None
                and not held.permit.returned
                and (  # calls are logged before they are sent
                    not self._expired(held) or held.permit.number % WAITING_AGAIN == 3
                )
            ):
                self.rows.append(PastCall(0.0, held.permit.tokens, True, call_id, held.permit.cost))
        self.rows_at = self.now
        return self.rows

    def _expired(self, held: IssuedPermit) -> bool:
        return held.permit.expires_at * MICRO_FLOAT - self.offsets[held.client] < self.now

    # -- actions of clients ----

    async def set_target(self, who: int, line: str, version: int | None = None) -> None:
        self.current = who
        await self._ask(self.limiters[who].set_target(MODEL, line, version=version))

    async def peek(self, who: int) -> None:
        """Asks when a batch call may be sent."""
        self.current = who
        limiter = self.limiters[who]
        await self._ask(limiter._reservations.peek(limiter._tracker.state(MODEL)), (0, 0))

    async def reserve(
        self, who: int, needs: tuple[Need, ...], *, interactive: bool = False
    ) -> list[IssuedPermit]:
        """Reserves permits, and checks each against the clock rules."""
        self.current = who
        work = reserve_many(self.limiters[who], needs, waits=self.waits, interactive=interactive)
        reply = await self._ask(work, flat(needs))
        permits, wait = reply
        if wait.reason is WaitReason.REBUILDING:
            self._check_rebuild_time(self.now)
        made = [
            IssuedPermit(permit, who, send.send_at)
            for permit, send in zip(permits, self.spec.sends[-len(permits) :], strict=False)
        ]
        for held in made:
            held.permit.call_id = uuid.uuid4()
        for held, slack in zip(made, [self.slack] * len(made), strict=True):
            offset = self.offsets[who]
            early = round(held.permit.send_at * MICRO) - offset - held.send_at
            late = round(held.permit.expires_at * MICRO) - offset - held.send_at - slack
            self._require(early >= 0, f"the client may send {-early} us before the send time")
            self._require(late <= 0, f"the permit expires {late} us too late")
        self.held += made
        return made

    def send(self, held: IssuedPermit, transit: int) -> bool:
        """Checks the permit and sends now; False if it is expired or early."""
        if held.sent_at is not None or held.permit.returned or held.ended_at is not None:
            return False
        self.current = held.client
        if held.permit.wait_seconds > 0:
            return False
        try:
            held.permit.check()
        except PermitExpired:
            return False
        held.sent_at, held.arrived_at = self.now, self.now + min(transit, self.transit)
        return True

    async def end(
        self, held: IssuedPermit, used: int | None, times: int = 1, spent: int | None = None
    ) -> None:
        """Ends the call now and releases its permit, maybe more than once."""
        if held.sent_at is None or held.ended_at is not None or held.send_at + micros(8.0) <= self.now:
            return
        self.now = max(self.now, held.arrived_at + 1)
        held.ended_at, held.used, held.spent = self.now, used, spent
        await self._return(held, times, lambda client: client.release(held.permit, used, spent))

    async def cancel(self, held: IssuedPermit, times: int = 1) -> None:
        forgotten = held.send_at < self.now - self.retention  # by the specification, for speed
        if held.sent_at is None and not forgotten:
            await self._return(held, times, lambda client: client.cancel(held.permit))

    async def end_again(self, held: IssuedPermit, used: int | None, *, unused: bool) -> None:
        """Releases a permit that was released already."""
        if held.permit.returned:
            call = (
                (lambda client: client.cancel(held.permit))
                if unused
                else (lambda client: client.release(held.permit, used))
            )
            await self._return(held, 1, call)

    async def _return(self, held: IssuedPermit, times: int, call: Any) -> None:
        self.current = held.client
        for _ in range(times):
            held.permit.returned = False
            await self._ask(call(self.limiters[held.client]))

    async def cool_down(self, who: int, seconds: float) -> None:
        self.current = who
        await self._ask(self.limiters[who].cool_down(MODEL, seconds, "429"))

    async def record_outcome(
        self, who: int, outcome: Outcome, seconds: float | None, held: IssuedPermit | None
    ) -> None:
        """Records the outcome of a call."""
        self.current = who
        permit = None if held is None else held.permit
        await self._ask(self.limiters[who].record_outcome(MODEL, outcome, seconds, permit=permit))

    async def check_snapshot(self, who: int) -> None:
        """Compares `snapshot` with the specification."""
        self.current = who
        traffic = (await self._ask(self.limiters[who].snapshot([MODEL])))[MODEL]
        target, at = self.spec.target, self.redis.calls[-1].at
        if not self.exact(at) or self.state != "sound" or target is None or target.stopped:
            return
        sent = {str(one): len(self.spec.within(one, at)) for one in target.requests}
        tokens = {str(one): sum(send.tokens for send in self.spec.within(one, at)) for one in target.tokens}
        money = {str(one): sum(send.cost for send in self.spec.within(one, at)) for one in target.money}
        counted, expected = (traffic.sent, traffic.tokens, traffic.money), (sent, tokens, money)
        self._require(counted == expected, f"the snapshot counts {counted}, not {expected}")
        if target.at_once is not None:
            running = self.spec.running(at)
            self._require(traffic.in_flight == running, f"{traffic.in_flight} in flight, not {running}")

    async def _ask(self, coroutine: Any, needs: Needs = ()) -> Any:
        self.redis.calls.clear()
        try:
            result = await coroutine
        except LimiterUnavailable as error:
            raise Mismatch(f"the script failed: {error}") from error
        for _ in range(3):
            await asyncio.sleep(0)  # side tasks, such as learning a target
        for call in self.redis.calls:
            self._follow(call, needs)
        self.steps += 1
        self.spec.forget_before(self.now - self.retention - 2 * MICRO)
        return result

    # -- lost state ----

    def flush(self) -> None:
        self.redis.do("FLUSHALL")
        self._gone(target=False)

    def forget_scripts(self) -> None:
        self.redis.do("SCRIPT", "FLUSH")

    def restart(self, *, state: str) -> None:
        """Restarts the server, with its state "kept", "empty", or "old" as of `save`."""
        self.redis.run += 1
        self.redis.do("SCRIPT", "FLUSH")
        if state == "old":
            self._restore()
        elif state == "empty":
            self.flush()
        self._gone(target=state != "empty")

    def save(self) -> None:
        """Saves the state, as an RDB file would."""
        keys = [key.decode() for key in self.redis.do("KEYS", f"{KEY}*")]
        self.saved = {key: self.redis.do("DUMP", key) for key in keys}
        self.saved_seen = max(self.seen(who) for who in range(len(self.limiters)))
        self.saved_target = (self.spec.target, self.spec.version, self.spec.cooldown_until)

    def _restore(self) -> None:
        self.redis.do("FLUSHALL")
        for key, dump in getattr(self, "saved", {}).items():
            self.redis.do("RESTORE", key, 0, dump)
        kept = getattr(self, "saved_target", (None, 0.0, 0))
        self.spec.target, self.spec.version, self.spec.cooldown_until = kept
        if self.spec.target is not None:
            self.changes.append(TargetChange(self.now / MICRO, MODEL, self.spec.target))

    def lose_key(self) -> None:
        self.redis.do("DEL", KEY)
        self._gone(target=False)

    def roll_back(self) -> bool:
        """Restores older state in the same run; False if no client could detect it."""
        if getattr(self, "saved_seen", None) is None or self.state != "sound":
            return False
        if max(self.seen(who) for who in range(len(self.limiters))) <= self.saved_seen:
            return False
        self._restore()
        self._gone(target=True)
        return True

    def lose_chunk(self, which: int) -> bool:
        """Deletes a chunk, which the script must detect when it needs it. False if there is none."""
        chunks = sorted(self.redis.do("KEYS", f"{KEY}:m:*"))
        if not chunks or self.state != "sound":
            return False
        self.redis.do("DEL", chunks[which % len(chunks)])
        self.state = "doubtful"
        return True

    def lose_holders(self) -> None:
        """Deletes the calls in flight, which the script must detect when it needs a slot."""
        self.redis.do("DEL", f"{KEY}:holders")
        self.state = "doubtful"

    def _gone(self, *, target: bool) -> None:
        self.state = "gone"
        self.noticed.clear()
        self.disturbed_until = max(self.disturbed_until, self.now)
        if not target:
            self.spec.target, self.spec.version, self.spec.cooldown_until = None, 0.0, 0

    # -- arrivals ----

    def judge_arrivals(self) -> None:
        """Checks that no window of arrivals exceeds its limit."""
        arrivals = []
        for held in self.held:
            if held.sent_at is None:
                continue
            ended = held.ended_at if held.ended_at is not None else held.send_at + micros(8.0)
            used = held.permit.tokens if held.used is None else min(held.used, held.permit.tokens)
            spent = held.permit.cost if held.spent is None else min(held.spent, held.permit.cost)
            arrivals.append(
                Arrival(
                    held.arrived_at / MICRO,
                    max(ended, held.arrived_at + 1) / MICRO,
                    MODEL,
                    str(len(arrivals)),
                    held.permit.tokens,
                    used,
                    cost_reserved=held.permit.cost,
                    cost_used=spent,
                )
            )
        verdict = judge(
            arrivals, self.changes, backlog_from=None, backlog_until=None, settle_seconds=SETTLE_SECONDS,
            utc_offset_seconds=self.spec.epoch / MICRO,
        ).models.get(MODEL)  # fmt: skip
        if verdict is not None and verdict.breach_count:
            raise Mismatch(f"{verdict.breach_count} breaches, first {verdict.breaches[0]}")


__all__ = ["IssuedPermit", "Mismatch", "Wait", "World"]
