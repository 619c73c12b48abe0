"""Some clients, one real Redis, and the specification beside it: whatever is asked of both must agree.

Time passes only when a step says so. Every step may be asked for in any order; `World` compares each reply of
the script with the specification, each permit with the clock rules, and at the end the door with the judge.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from bench.judge import Arrival, TargetChange, judge
from router.errors import LimiterUnavailable, PermitExpired
from router.limiter import PastCall, Permit, TrafficLimiter, Wait, WaitReason
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
    Difference,
    Following,
    Held,
)
from tests.support.limiter.redis import Connection, ScriptRedis, with_our_clock
from tests.support.limiter.specification import MICRO, LimiterSpec, micros


async def reserve_many(limiter: TrafficLimiter, tokens: tuple[int, ...]) -> tuple[list[Permit], Wait]:
    """Reserves a permit per element of `tokens`, in one round trip."""
    return await limiter._reservations.reserve_many(limiter._tracker.state(MODEL), tokens)


@dataclass
class World(Following):
    """`lines` are the targets that this world will know: they say how long anything can be remembered."""

    connection: Connection
    script: str
    lines: list[str]
    clients: int = 3
    with_history: bool = True
    now: int = 1_000 * MICRO
    skew: int = 0
    travels: list[int] = field(default_factory=list)
    steps: int = 0

    def __post_init__(self) -> None:
        self.redis = ScriptRedis(self.connection, self._wall, lambda: self.now, self._travel)
        self.redis.do("FLUSHALL")
        self.spec = LimiterSpec(SETTINGS)
        self.everyone: list[TrafficLimiter] = []
        self.offsets = [0, 3 * 3600 * MICRO, -700 * MICRO]  # clients' clocks have nothing in common
        self.current = 0
        self.held: list[Held] = []
        self.changes: list[TargetChange] = []
        self.state = "gone"  # "sound": the script must know all; "doubtful": it may find out that it does not
        self.generation = 0.0
        self.clock_told = (0, 0.0)
        self.noticed: dict[int, int] = {}  # who knows of a loss, and since when
        self.jumped = False  # since Redis was last asked
        self.disturbed_until = 0
        self.known_from = 0
        self.rows: list[PastCall] = []
        targets = [TrafficTarget.parse(line) for line in self.lines]
        self.longest = max((target.longest_window_seconds for target in targets), default=0)
        self.memory = micros(max(self.longest + 0.25, SETTINGS.max_call_seconds))
        self.transit = micros(
            min(
                (
                    SETTINGS.slacks(limit.window_seconds).transit
                    for t in targets
                    for limit in (*t.requests, *t.tokens)
                ),
                default=SETTINGS.second_slacks.transit,
            )
        )
        for _ in range(self.clients):
            self.everyone.append(self._newcomer())

    # -- time ----

    def _wall(self) -> int:
        return EPOCH + self.now + self.skew

    def _travel(self) -> None:
        took = self.travels.pop() if self.travels else 0
        self.now += took
        self.jumped = self.jumped or took > SHORT_WAY  # for Redis as if its clock had been set forward

    def monotonic(self) -> float:
        """The clock of the client that acts now."""
        return (self.now + self.offsets[self.current]) / MICRO

    def pass_time(self, micro: int) -> None:
        self.now += micro

    def jump(self, micro: int) -> None:
        """Redis's clock is set, forward or back; everybody else's goes on."""
        self.skew += micro
        self.jumped = True
        if micro < 0:
            self.noticed.clear()  # a loss that was noticed later than now begins anew

    # -- clients ----

    def _newcomer(self) -> TrafficLimiter:
        history = self._history if self.with_history else None
        redis: Any = self.redis
        client = TrafficLimiter(redis, history, settings=SETTINGS, clock=self.monotonic)
        client._script.text = with_our_clock(self.script)
        return client

    def restart_client(self, who: int) -> None:
        """A new process in the place of another one: it has seen nothing, and what the old one held dies."""
        self.noticed.pop(who, None)
        self.everyone[who] = self._newcomer()

    def seen(self, who: int) -> tuple[float, float]:
        """The newest that a client has seen of the model."""
        seen = self.everyone[who]._tracker.state(MODEL)
        return (seen.generation, seen.head)

    async def _history(self, _model: str, seconds: float) -> list[PastCall]:
        self.rows = []
        for held in self.held:
            if held.sent_at is not None and held.sent_at > self.now - seconds * MICRO:
                age = (self.now - held.sent_at) / MICRO
                self.rows.append(PastCall(age, held.permit.tokens, held.ended_at is None))
            elif held.sent_at is None and not self._dead(held):  # logged before it is sent
                self.rows.append(PastCall(0.0, held.permit.tokens, open=True))
        self.rows_at = self.now
        return self.rows

    def _dead(self, held: Held) -> bool:
        return held.permit.expires_at * MICRO_FLOAT - self.offsets[held.client] < self.now

    # -- what clients do ----

    async def set_target(self, who: int, line: str, version: int | None = None) -> None:
        self.current = who
        await self._ask(self.everyone[who].set_target(MODEL, line, version=version))

    async def reserve(self, who: int, needs: tuple[int, ...]) -> list[Held]:
        """Ask for permits; each is checked against the clock rules, and held."""
        self.current = who
        reply = await self._ask(reserve_many(self.everyone[who], needs), needs)
        permits, wait = reply
        if wait.reason is WaitReason.REBUILDING:
            self._agree_to_wait(self.now)
        made = [
            Held(permit, who, send.moment)
            for permit, send in zip(permits, self.spec.sends[-len(permits) :], strict=False)
        ]
        for held, slack in zip(made, [self.slack] * len(made), strict=True):
            offset = self.offsets[who]
            early = round(held.permit.send_at * MICRO) - offset - held.moment
            late = round(held.permit.expires_at * MICRO) - offset - held.moment - slack
            self._agree(early >= 0, f"the client may send {-early} us before the moment")
            self._agree(late <= 0, f"the permit lives {late} us too long")
        self.held += made
        return made

    def send(self, held: Held, transit: int) -> bool:
        """Check the permit and write it to the socket now; False if it was dead or too early."""
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

    async def end(self, held: Held, used: int | None, times: int = 1) -> None:
        """The call ends now, and its caller says so, maybe more than once."""
        if held.sent_at is None or held.ended_at is not None or held.moment + micros(8.0) <= self.now:
            return
        self.now = max(self.now, held.arrived_at + 1)
        held.ended_at, held.used = self.now, used
        await self._return(held, times, lambda client: client.release(held.permit, used))

    async def cancel(self, held: Held, times: int = 1) -> None:
        if held.sent_at is None:
            await self._return(held, times, lambda client: client.cancel(held.permit))

    async def end_again(self, held: Held, used: int | None, *, unused: bool) -> None:
        """A second process reports what another one has reported."""
        if held.permit.returned:
            call = (
                (lambda client: client.cancel(held.permit))
                if unused
                else (lambda client: client.release(held.permit, used))
            )
            await self._return(held, 1, call)

    async def _return(self, held: Held, times: int, call: Any) -> None:
        self.current = held.client
        for _ in range(times):
            held.permit.returned = False
            await self._ask(call(self.everyone[held.client]))

    async def cool_down(self, who: int, seconds: float) -> None:
        self.current = who
        await self._ask(self.everyone[who].cool_down(MODEL, seconds, "429"))

    async def record_outcome(
        self, who: int, outcome: Outcome, seconds: float | None, held: Held | None
    ) -> None:
        """Somebody says what a call came to."""
        self.current = who
        permit = None if held is None else held.permit
        await self._ask(self.everyone[who].record_outcome(MODEL, outcome, seconds, permit=permit))

    async def look(self, who: int) -> None:
        """What `snapshot` says must be what is there."""
        self.current = who
        traffic = (await self._ask(self.everyone[who].snapshot([MODEL])))[MODEL]
        target, at = self.spec.target, self.redis.asked[-1].at
        if not self.exact(at) or self.state != "sound" or target is None or target.stopped:
            return
        sent = {str(limit): len(self.spec.counted(limit.window_seconds, at)) for limit in target.requests}
        latest = max(at, self.spec.sends[-1].moment if self.spec.sends else at)
        for limit in target.tokens:  # what is over by the latest granted moment may be left out already
            most, least = (
                sum(send.tokens for send in self.spec.counted(limit.window_seconds, when))
                for when in (at, latest)
            )
            counted = traffic.tokens[str(limit)]
            self._agree(
                least <= counted <= most, f"the snapshot counts {counted} of {limit}, not {least} to {most}"
            )
        self._agree(traffic.sent == sent, f"the snapshot counts {traffic.sent}, and there are {sent}")
        if target.at_once is not None:
            running = self.spec.running(at)
            self._agree(traffic.in_flight == running, f"{traffic.in_flight} at once for {running}")

    async def _ask(self, coroutine: Any, needs: tuple[int, ...] = ()) -> Any:
        self.redis.asked.clear()
        try:
            result = await coroutine
        except LimiterUnavailable as error:
            raise Difference(f"the script failed: {error}") from error
        for _ in range(3):
            await asyncio.sleep(0)  # what was begun aside, such as learning a target
        for asked in self.redis.asked:
            self._follow(asked, needs)
        self.steps += 1
        self.spec.forget_before(self.now - self.memory - 2 * MICRO)
        return result

    # -- loss of memory ----

    def flush(self) -> None:
        self.redis.do("FLUSHALL")
        self._gone(target=False)

    def forget_scripts(self) -> None:
        self.redis.do("SCRIPT", "FLUSH")

    def restart(self, *, memory: str) -> None:
        """Another run of the server, with `memory` "kept", "empty", or "old" as `save` left it."""
        self.redis.run += 1
        self.redis.do("SCRIPT", "FLUSH")
        if memory == "old":
            self._restore()
        elif memory == "empty":
            self.flush()
        self._gone(target=memory != "empty")

    def save(self) -> None:
        """What an RDB file would hold now."""
        keys = [key.decode() for key in self.redis.do("KEYS", f"{KEY}*")]
        self.saved = {key: self.redis.do("DUMP", key) for key in keys}
        self.saved_seen = max(self.seen(who) for who in range(len(self.everyone)))
        self.saved_rest = (self.spec.target, self.spec.version, self.spec.rest_until)

    def _restore(self) -> None:
        self.redis.do("FLUSHALL")
        for key, dump in getattr(self, "saved", {}).items():
            self.redis.do("RESTORE", key, 0, dump)
        kept = getattr(self, "saved_rest", (None, 0.0, 0))
        self.spec.target, self.spec.version, self.spec.rest_until = kept
        if self.spec.target is not None:
            self.changes.append(TargetChange(self.now / MICRO, MODEL, self.spec.target))

    def lose_key(self) -> None:
        self.redis.do("DEL", KEY)
        self._gone(target=False)

    def roll_back(self) -> bool:
        """An older memory in the same run; False if nobody could know that it is older."""
        if getattr(self, "saved_seen", None) is None or self.state != "sound":
            return False
        if max(self.seen(who) for who in range(len(self.everyone))) <= self.saved_seen:
            return False
        self._restore()
        self._gone(target=True)
        return True

    def lose_chunk(self, which: int) -> bool:
        """One of the pieces of memory is gone; whoever needs it must find out. False if there is none."""
        chunks = sorted(self.redis.do("KEYS", f"{KEY}:m:*"))
        if not chunks or self.state != "sound":
            return False
        self.redis.do("DEL", chunks[which % len(chunks)])
        self.state = "doubtful"
        return True

    def lose_holders(self) -> None:
        """The set of calls in flight is gone; whoever needs a place must find out."""
        self.redis.do("DEL", f"{KEY}:holders")
        self.state = "doubtful"

    def _gone(self, *, target: bool) -> None:
        self.state = "gone"
        self.noticed.clear()
        self.disturbed_until = max(self.disturbed_until, self.now)
        if not target:
            self.spec.target, self.spec.version, self.spec.rest_until = None, 0.0, 0

    # -- at the door ----

    def judge_the_door(self) -> None:
        """No window at the door may be overfull, whatever happened."""
        arrivals = []
        for held in self.held:
            if held.sent_at is None:
                continue
            ended = held.ended_at if held.ended_at is not None else held.moment + micros(8.0)
            used = held.permit.tokens if held.used is None else min(held.used, held.permit.tokens)
            arrivals.append(
                Arrival(
                    held.arrived_at / MICRO,
                    max(ended, held.arrived_at + 1) / MICRO,
                    MODEL,
                    str(len(arrivals)),
                    held.permit.tokens,
                    used,
                )
            )
        verdict = judge(
            arrivals, self.changes, backlog_from=None, backlog_until=None, settle_seconds=SETTLE_SECONDS
        ).models.get(MODEL)
        if verdict is not None and verdict.breach_count:
            raise Difference(f"{verdict.breach_count} breaches at the door, first {verdict.breaches[0]}")


__all__ = ["Difference", "Held", "Wait", "World"]
