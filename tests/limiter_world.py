"""Some clients, one real Redis, and the specification beside it: whatever is asked of both must agree.

Time passes only when a step says so. Every step may be asked for in any order; `World` compares each reply of
the script with the specification, each permit with the clock rules, and at the end the door with the judge.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from bench.judge import Arrival, TargetChange, judge
from router import limiter as limiter_module
from router import line as line_module
from router import permits as permits_module
from router import recovery as recovery_module
from router import sightings as sightings_module
from router.breaker import Sign
from router.errors import LimiterUnavailable, PermitDead
from router.limiter import LimiterSettings, PastCall, TrafficLimiter, Wait, WaitReason
from router.permits import Permit
from router.redis_script import RedisScript
from router.task import Outcome
from router.traffic import TrafficTarget
from tests.limiter_redis import Asked, Connection, ScriptRedis, with_our_clock
from tests.limiter_spec import MICRO, TIMED, Decision, LimiterSpec, Send, micros

MODEL = "m"
KEY = f"router:{{{MODEL}}}"
EPOCH = 1_700_000_000 * MICRO
SETTINGS = LimiterSettings(call_longest_seconds=8.0)
LOOK = micros(SETTINGS.look_ahead_seconds)
SETTLE_SECONDS = 0.6  # look-ahead, send slack and transit slack of what was decided before a change
SHORT_WAY = 12_000
LOST, MICRO_FLOAT = 1, 1e6
ONLY_AGAIN = frozenset({WaitReason.AT_ONCE, WaitReason.PROBING})  # they wait for an end, not for a moment


class Difference(AssertionError):
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


@dataclass
class World:
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
        self.memory = micros(max(self.longest + 0.25, SETTINGS.call_longest_seconds))
        self.transit = micros(min(
            (SETTINGS.slacks(limit.window_seconds).transit for t in targets for limit in (*t.requests, *t.tokens)),
            default=SETTINGS.second_slacks.transit))  # fmt: skip
        for _ in range(self.clients):
            self.everyone.append(self._newcomer())

    # -- time ------------------------------------------------------------------------------------------------

    def _wall(self) -> int:
        return EPOCH + self.now + self.skew

    def _travel(self) -> None:
        took = self.travels.pop() if self.travels else 0
        self.now += took
        self.jumped = self.jumped or took > SHORT_WAY  # for Redis as if its clock had been set forward

    def monotonic(self) -> float:
        """The clock of the client that acts now."""
        return (self.now + self.offsets[self.current]) / MICRO

    @contextmanager
    def clocks(self) -> Iterator[None]:
        """While this holds, the limiter's monotonic clock is ours."""
        ours = SimpleNamespace(monotonic=self.monotonic, monotonic_ns=time.monotonic_ns)
        modules: list[Any] = [limiter_module, permits_module, line_module, recovery_module, sightings_module]
        for module in modules:
            module.time = ours
        try:
            yield
        finally:
            for module in modules:
                module.time = time

    def pass_time(self, micro: int) -> None:
        self.now += micro

    def jump(self, micro: int) -> None:
        """Redis's clock is set, forward or back; everybody else's goes on."""
        self.skew += micro
        self.jumped = True

    # -- clients ---------------------------------------------------------------------------------------------

    def _newcomer(self) -> TrafficLimiter:
        history = self._history if self.with_history else None
        client = TrafficLimiter(self.redis, history, settings=SETTINGS)  # type: ignore[arg-type]
        client._script = RedisScript(self.redis, with_our_clock(self.script))  # type: ignore[arg-type]
        return client

    def restart_client(self, who: int) -> None:
        """A new process in the place of another one: it has seen nothing, and what the old one held dies."""
        self.noticed.pop(who, None)
        self.everyone[who] = self._newcomer()

    def seen(self, who: int) -> tuple[float, float]:
        """The newest that a client has seen of the model."""
        seen = self.everyone[who]._seen_of(MODEL)
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
        return held.permit.dead_at * MICRO_FLOAT - self.offsets[held.client] < self.now

    # -- what clients do ---------------------------------------------------------------------------------------

    async def set_target(self, who: int, line: str, version: int | None = None) -> None:
        self.current = who
        await self._ask(self.everyone[who].set_target(MODEL, line, version=version))

    async def reserve(self, who: int, needs: tuple[int, ...]) -> list[Held]:
        """Ask for permits; each is checked against the clock rules, and held."""
        self.current = who
        reply = await self._ask(self.everyone[who]._ask(MODEL, needs), needs)
        permits, wait = reply
        if wait.reason is WaitReason.LOST:
            self._agree_to_wait(self.now)
        made = [Held(permit, who, send.moment) for permit, send in zip(permits, self.spec.sends[-len(permits):], strict=False)]  # fmt: skip
        for held, slack in zip(made, [self.slack] * len(made), strict=True):
            offset = self.offsets[who]
            early = round(held.permit.moment_at * MICRO) - offset - held.moment
            late = round(held.permit.dead_at * MICRO) - offset - held.moment - slack
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
        except PermitDead:
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
            call = (lambda client: client.cancel(held.permit)) if unused else (
                lambda client: client.release(held.permit, used))  # fmt: skip
            await self._return(held, 1, call)

    async def _return(self, held: Held, times: int, call: Any) -> None:
        self.current = held.client
        for _ in range(times):
            held.permit.returned = False
            await self._ask(call(self.everyone[held.client]))

    async def rest(self, who: int, seconds: float) -> None:
        self.current = who
        await self._ask(self.everyone[who].rest(MODEL, seconds, "429"))

    async def heed(self, who: int, outcome: Outcome, seconds: float | None, held: Held | None) -> None:
        """Somebody says what a call came to."""
        self.current = who
        permit = None if held is None else held.permit
        await self._ask(self.everyone[who].heed(MODEL, outcome, seconds, permit=permit))

    async def look(self, who: int) -> None:
        """What `snapshot` says must be what is there."""
        self.current = who
        traffic = await self._ask(self.everyone[who]._snapshot(MODEL))
        target = self.spec.target
        if traffic is None or not self.exact() or self.state != "sound" or target is None or target.stopped:
            return
        at = self.redis.asked[-1].at if self.redis.asked else self.now
        sent = {str(limit): len(self.spec.counted(limit.window_seconds, at)) for limit in target.requests}
        latest = max(at, self.spec.sends[-1].moment if self.spec.sends else at)
        for limit in target.tokens:  # what is over by the latest granted moment may be left out already
            most, least = (
                sum(send.tokens for send in self.spec.counted(limit.window_seconds, when)) for when in (at, latest)
            )
            counted = traffic.tokens[str(limit)]
            self._agree(least <= counted <= most, f"the snapshot counts {counted} of {limit}, not {least} to {most}")
        self._agree(traffic.sent == sent, f"the snapshot counts {traffic.sent}, and there are {sent}")
        if target.at_once is not None:
            running = self.spec.running(at)
            self._agree(traffic.at_once == running, f"{traffic.at_once} at once for {running}")

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

    # -- the same on the other side ------------------------------------------------------------------------------

    def exact(self) -> bool:
        """Whether the script must know everything that the specification knows, to the microsecond."""
        target = self.spec.target
        if self.jumped or self.now < self.disturbed_until or target is None:
            return False
        windows = [limit.window_seconds for limit in (*target.requests, *target.tokens)]
        slack = SETTINGS.send_slack(target)
        periods = [micros(window + slack + SETTINGS.slacks(window).transit) for window in windows]
        return self.now - max(periods, default=0) >= self.known_from

    def _follow(self, asked: Asked, needs: tuple[int, ...]) -> None:
        if asked.verb == "reserve":
            if self.jumped:
                self.jumped, self.disturbed_until = False, asked.at + self.memory
            self._follow_reserve(asked, needs)
        elif asked.verb == "back":
            if self.state != "gone":
                for generation, number, used, unused in struct.iter_unpack("<4d", asked.arguments[0]):  # type: ignore[arg-type]
                    self._follow_return(generation, int(number), used, unused)
        elif asked.verb == "target":
            taken, version = struct.unpack("<2d", asked.reply)
            line = asked.arguments[2]
            self._follow_target(asked, taken, version, TrafficTarget.parse(line if isinstance(line, str) else line.decode()))  # fmt: skip
        elif asked.verb == "heed":
            if self.state != "gone":
                self._follow_heed(asked)
        elif asked.verb == "lost":
            live, _, clock, *_ = struct.unpack("<5d", asked.reply)
            self._agree(not live or self.state != "gone", "a lost memory is held to be live")
            self.clock_told = (asked.at, clock)
        elif asked.verb == "rebuild":
            self._follow_rebuild(asked)

    def _follow_reserve(self, asked: Asked, needs: tuple[int, ...]) -> None:
        status, generation, head, _, again, reason, slack, *_ = limiter_module._HEAD.unpack_from(asked.reply)
        self.slack = int(slack)
        if status == 2:
            self._agree(self.spec.target is None, "a target was forgotten")
            return
        if status == LOST:
            self._agree(self.state != "sound", "a sound memory was given up")
            self.state = "gone"
            return
        self._agree(self.state != "gone", "permits from a lost memory")
        self.generation = generation
        grants = list(limiter_module._GRANT.iter_unpack(asked.reply[limiter_module._HEAD.size:]))  # fmt: skip
        exact = self.exact() and self.state == "sound"
        for (number, wait), need in zip(grants, needs, strict=False):
            self._follow_grant(asked.at, int(number), round(wait), need, exact=exact)
        self._agree(head == self.spec.head, f"the script counts {head} sends, and there are {self.spec.head}")
        if exact:
            hint = (None if again < 0 else round(again), WaitReason(int(reason)))
            self._agree_on_the_rest(asked.at, needs[len(grants):], hint, fresh=not grants)  # fmt: skip

    def _agree_to_wait(self, at: int) -> None:
        """What is lost is back as soon as its permits are dead and, without a history, its windows over."""
        noticed = self.noticed.setdefault(self.current, at)
        longest = 0.35 if self.with_history else 0.35 + self.memory / MICRO
        self._agree(at - noticed <= micros(4 * longest), f"the memory is lost for {at - noticed} us")

    def _follow_grant(self, at: int, number: int, wait: int, need: int, *, exact: bool) -> None:
        decision = self.spec.decide(at, need)
        what = f"send {number} is granted in {wait} us, where {decision.reason.name} says {self._in(decision, at)}"
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
        said = f"the next is said to wait {again} us for {reason.name}, where {decision.reason.name} says {soonest}"
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
        if Sign(int(sign)) is Sign.PUT_BACK:
            self.spec.breaker.trip = max(self.spec.breaker.trip, int(trips))
        self.spec.heed(asked.at, Sign(int(sign)), rest / MICRO, known)
        _, failures, trip, _ = struct.unpack("<4d", asked.reply)
        breaker = self.spec.breaker
        if not self.exact() and (failures, trip) != (breaker.failures, breaker.trip):  # it may still rest there
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
        alive = [held for held in self.held if held.sent_at is None and not held.permit.returned and not self._dead(held)]  # fmt: skip
        self._agree(not alive, f"it is rebuilt while {len(alive)} permits are still out")
        moments = asked.arguments[1]
        told_at, clock = self.clock_told
        holder = micros(SETTINGS.call_longest_seconds)
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
            raise Difference(f"step {self.steps} {[(a.verb, a.at) for a in self.redis.asked]}, at {self.now} with {self.spec.target}: {otherwise}")

    # -- loss of memory --------------------------------------------------------------------------------------------

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

    def _gone(self, *, target: bool) -> None:
        self.state = "gone"
        self.noticed.clear()
        self.disturbed_until = max(self.disturbed_until, self.now)
        if not target:
            self.spec.target, self.spec.version, self.spec.rest_until = None, 0.0, 0

    # -- at the door -------------------------------------------------------------------------------------------------

    def judge_the_door(self) -> None:
        """No window at the door may be overfull, whatever happened."""
        arrivals = []
        for held in self.held:
            if held.sent_at is None:
                continue
            ended = held.ended_at if held.ended_at is not None else held.moment + micros(8.0)
            used = held.permit.tokens if held.used is None else min(held.used, held.permit.tokens)
            arrivals.append(Arrival(held.arrived_at / MICRO, max(ended, held.arrived_at + 1) / MICRO, MODEL,
                                    str(len(arrivals)), held.permit.tokens, used))  # fmt: skip
        verdict = judge(arrivals, self.changes, backlog_from=None, backlog_until=None,
                        settle_seconds=SETTLE_SECONDS).models.get(MODEL)  # fmt: skip
        if verdict is not None and verdict.breach_count:
            raise Difference(f"{verdict.breach_count} breaches at the door, first {verdict.breaches[0]}")


__all__ = ["Difference", "Held", "Wait", "World"]
