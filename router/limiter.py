"""Who may send to a model, and when: exact where the provider counts, for any number of processes.

In any window of a model's traffic target, at the backend's door, there are no more than the target's
requests, tokens and calls at once. One script call in Redis (`limiter.lua`) decides all of it together and
answers with a moment. How and why: docs/limiter.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import struct
import time
from array import array
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import redis.asyncio

from router.errors import InputError, LimiterError, LimiterUnavailable
from router.line import Batch, Line
from router.permits import (
    LimiterSettings,
    ModelTraffic,
    PastCall,
    Permit,
    Slacks,
    Wait,
    WaitReason,
)
from router.redis_script import REDIS_ERRORS, RedisScript
from router.traffic import LARGEST_COUNT, TrafficTarget

__all__ = [
    "History",
    "LimiterSettings",
    "ModelTraffic",
    "PastCall",
    "Permit",
    "Slacks",
    "TrafficLimiter",
    "Wait",
    "WaitReason",
]

History = Callable[[str, float], Awaitable[list[PastCall]]]

CHANNEL = "router:traffic"
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)
LONGEST_REST_SECONDS = 86_400.0
_SCRIPT = Path(__file__).with_name("limiter.lua").read_text(encoding="utf-8")
_MICRO = 1_000_000
_LOST = 1  # the script's status; 0 is a decision, 2 is no target
_MEMORY = frozenset({WaitReason.LOST, WaitReason.NO_TARGET})
_HEAD = struct.Struct("<7d")
_GRANT = struct.Struct("<2d")
_MOST_TRIES = 3


@dataclass(slots=True)
class _Seen:
    """What this process has seen of a model: by it a limiter that lost its memory is found out."""

    generation: float = 0.0
    head: float = 0.0
    version: float = 0.0
    target: TrafficTarget | None = None
    near_at: float | None = None  # when a send looks possible, on the monotonic clock; None: nobody knows
    near_known_at: float = 0.0


class TrafficLimiter:
    """Exact permits for models, decided in Redis on Redis's clock.

    `history(model, seconds)` gives a model's past calls when Redis lost its memory; without it a model that
    was seen before stands still for its longest window, and one that nobody saw starts at once.
    The client should have a `socket_timeout`: a question that hangs is bounded by it alone.
    """

    def __init__(
        self,
        redis: redis.asyncio.Redis,
        history: History | None = None,
        *,
        settings: LimiterSettings | None = None,
    ) -> None:
        self._redis = redis
        self._history = history
        self.settings = settings or LimiterSettings()
        self._script = RedisScript(redis, _SCRIPT)
        self._seen: dict[str, _Seen] = {}
        self._keys: dict[str, str] = {}
        self._lines: dict[str, Line] = {}
        self._returns: dict[str, Batch[bytes]] = {}
        self._rebuilding: dict[str, asyncio.Lock] = {}
        self._side_tasks: set[asyncio.Task[Any]] = set()
        self._listener: asyncio.Task[None] | None = None
        self._listening = asyncio.Event()
        self._name = f"{id(self):x}-{time.monotonic_ns():x}"

    async def __aenter__(self) -> TrafficLimiter:  # noqa: PYI034 - typing.Self is 3.11
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Give back what is under way and end all tasks; the Redis client stays the caller's."""
        for line in self._lines.values():
            await line.close()
        while self._side_tasks:
            await asyncio.gather(*self._side_tasks, return_exceptions=True)
        for batch in self._returns.values():
            await batch.close()
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.gather(self._listener, return_exceptions=True)
            self._listener = None

    # -- targets ------------------------------------------------------------------------------------------

    async def set_target(
        self, model: str, target: TrafficTarget | str, *, version: int | None = None
    ) -> bool:
        """Put a target in force from the next decision on; False if a newer version is in force already.

        `version` is when the target was read, in microseconds of the reader's database clock; without one it
        is later than whatever is in force.
        """
        target = TrafficTarget.parse(target) if isinstance(target, str) else target
        ask = struct.pack("<2d", version or 0, self.settings.call_longest_seconds * _MICRO)
        reply = await self._call(model, "target", ask, self._packed(target), str(target), self._name)
        taken, in_force = struct.unpack("<2d", reply)
        if taken:
            seen = self._seen_of(model)
            seen.version, seen.target = in_force, target
            self._changed(model)
        return bool(taken)

    def _packed(self, target: TrafficTarget) -> bytes:
        send = self.settings.send_slack(target)
        limits: list[float] = []
        for limit in (*target.requests, *target.tokens):
            period = limit.window_seconds + send + self.settings.slacks(limit.window_seconds).transit
            limits += (limit.count, round(period * _MICRO))
        head = (
            0.0,
            float(target.stopped),
            round(target.gap_seconds * _MICRO),
            round(send * _MICRO),
            -1 if target.at_once is None else target.at_once,
            len(target.requests),
            len(target.tokens),
        )
        return struct.pack(f"<{len(head) + len(limits)}d", *head, *limits)

    # -- permits ------------------------------------------------------------------------------------------

    async def reserve(
        self, model: str, tokens: int = 0, *, holder_seconds: float | None = None
    ) -> Permit | Wait:
        """A permit whose moment is at most the look-ahead away, or why not and when to ask again.

        One round trip. `tokens` bounds what the call can use; `holder_seconds` is the longest it can take.
        """
        _check_tokens(tokens)
        permits, wait = await self._ask(model, (tokens,), holder_seconds)
        return permits[0] if permits else wait

    async def acquire(self, model: str, tokens: int = 0, *, timeout_seconds: float | None = None) -> Permit:
        """Stand in line for a permit and return at its moment.

        LimiterError if `timeout_seconds` pass first, or if a whole window has not that many tokens.
        """
        _check_tokens(tokens)
        line = self._line(model)
        if timeout_seconds is None:
            return await line.stand(tokens)
        standing = asyncio.ensure_future(line.stand(tokens))
        try:
            done, _ = await asyncio.wait({standing}, timeout=timeout_seconds)
        except asyncio.CancelledError:
            await _ended(standing)
            self._give_back_if_granted(standing)
            raise
        if not done:
            await _ended(standing)
        if standing.cancelled():
            why = line.waiting_for.text
            raise LimiterError(f"No permit for {model} within {timeout_seconds:g} s: {why}. Ask again later.")
        return standing.result()

    async def until_near(self, model: str) -> None:
        """Return as soon as a send looks possible within the look-ahead; reserves nothing, rarely asks."""
        line, seen = self._line(model), self._seen_of(model)
        while True:
            pokes = line.pokes
            if time.monotonic() - seen.near_known_at > self.settings.hint_seconds:
                await self._peek(model)
            near_in = None if seen.near_at is None else seen.near_at - time.monotonic()
            if pokes != line.pokes:
                seen.near_known_at = 0.0  # the reply may be older than the change
            elif near_in is not None and near_in <= 0:
                return
            else:
                net = self.settings.hint_seconds
                await line.bell.wait(net if near_in is None else min(net, near_in))

    async def release(self, permit: Permit, tokens: int | None = None) -> None:
        """The call ended: its place is free, its reservation becomes the `tokens` it used. Idempotent."""
        if tokens is not None:
            _check_tokens(tokens)
        await self._return(permit, -1 if tokens is None else tokens, unused=False)

    async def cancel(self, permit: Permit) -> None:
        """The permit was not used, and nothing was sent by it: it is given back whole. Idempotent."""
        await self._return(permit, 0, unused=True)

    async def rest(self, model: str, seconds: float, reason: str) -> None:
        """Nobody may send to the model for `seconds` (at most a day); 0 ends a rest."""
        ask = struct.pack("<d", min(seconds, LONGEST_REST_SECONDS))
        await self._call(model, "rest", ask, reason[:200], self._name)
        self._changed(model)

    def waiting(self, model: str) -> int:
        """How many in this process stand in line for the model."""
        line = self._lines.get(model)
        return line.waiting if line is not None else 0

    async def snapshot(self, models: Iterable[str]) -> dict[str, ModelTraffic]:
        """What is in force and in use, model by model. Reserves nothing."""
        return {model: await self._snapshot(model) for model in models}

    # -- asking -------------------------------------------------------------------------------------------

    async def _ask(
        self, model: str, tokens: tuple[int, ...], holder_seconds: float | None = None
    ) -> tuple[list[Permit], Wait]:
        """As many permits as there are now for these tokens, in order, and what the next one waits for."""
        for _ in range(_MOST_TRIES):
            permits, wait = await self._ask_once(model, "reserve", tokens, holder_seconds)
            if wait.reason not in _MEMORY:
                return permits, wait
            again = await self._recover(model, wait.reason)
            if again is None or again > 0:
                return [], Wait(model, WaitReason.NO_TARGET if again is None else WaitReason.LOST, again)
        return [], Wait(model, WaitReason.LOST, self.settings.retry_base_seconds)

    async def _ask_once(
        self, model: str, verb: str, tokens: tuple[int, ...], holder_seconds: float | None
    ) -> tuple[list[Permit], Wait]:
        seen = self._seen_of(model)
        holder = self.settings.call_longest_seconds if holder_seconds is None else holder_seconds
        fixed = (seen.generation, seen.head, self.settings.look_ahead_seconds * _MICRO, holder * _MICRO)
        left = time.monotonic()
        reply = await self._call(model, verb, struct.pack(f"<{4 + len(tokens)}d", *fixed, *tokens))
        arrived = time.monotonic()
        status, generation, head, version, again, reason, slack = _HEAD.unpack_from(reply)
        if status:
            seen.near_at = None
            return [], Wait(model, WaitReason.LOST if status == _LOST else WaitReason.NO_TARGET, None)
        self._remember(model, seen, (generation, head, version))
        death = left + slack / _MICRO
        permits = [
            Permit(model, need, int(number), int(generation), arrived + wait / _MICRO, death + wait / _MICRO)
            for (number, wait), need in zip(_GRANT.iter_unpack(reply[_HEAD.size :]), tokens, strict=False)
        ]
        return permits, self._next(model, seen, again, WaitReason(int(reason)), arrived)

    def _next(self, model: str, seen: _Seen, again: float, reason: WaitReason, arrived: float) -> Wait:
        """What the next one waits for; also kept as the hint by which `until_near` need not ask."""
        seconds = None if again < 0 else again / _MICRO
        if reason is WaitReason.AT_ONCE or seconds is None:  # a release may come before
            seen.near_at, seen.near_known_at = None, 0.0
        else:
            seen.near_at = arrived + seconds - self.settings.look_ahead_seconds
            seen.near_known_at = arrived
        return Wait(model, reason, seconds)

    async def _peek(self, model: str) -> None:
        """Learn when a send looks possible."""
        seen = self._seen_of(model)
        again: float | None = self.settings.retry_cap_seconds
        with contextlib.suppress(LimiterUnavailable):
            await self._hear()
            _, wait = await self._ask_once(model, "peek", (0,), None)
            if wait.reason not in _MEMORY:
                return
            again = await self._recover(model, wait.reason)
        seen.near_at = None if again is None else time.monotonic() + again
        seen.near_known_at = time.monotonic() if again is None or again > 0 else 0.0

    def _remember(self, model: str, seen: _Seen, told: tuple[float, float, float]) -> None:
        generation, head, version = told
        if generation > seen.generation:
            seen.generation, seen.head = generation, head
        elif generation == seen.generation and head > seen.head:
            seen.head = head
        if version > seen.version:
            seen.version = version
            self._aside(self._learn_target(model), f"learn the target of {model}")

    async def _learn_target(self, model: str) -> None:
        """Keep the target in force at hand, so that it can be put back when Redis lost it."""
        with contextlib.suppress(LimiterUnavailable):
            traffic = await self._snapshot(model)
            if traffic.target:
                self._seen_of(model).target = TrafficTarget.parse(traffic.target)

    async def _return(self, permit: Permit, used: float, *, unused: bool) -> None:
        if permit.returned:
            return
        item = struct.pack("<4d", permit.generation, permit.number, used, float(unused))
        batch = self._returns.get(permit.model)
        if batch is None:
            batch = Batch(
                lambda items: self._return_all(permit.model, items),
                most=500,
                name=f"returns of {permit.model}",
            )
            self._returns[permit.model] = batch
        await batch.put(item)
        permit.returned = True

    async def _return_all(self, model: str, items: list[bytes]) -> None:
        await self._call(model, "back", b"".join(items), self._name)
        line = self._lines.get(model)
        starved = line is not None and line.waiting_for in (WaitReason.TOKENS, WaitReason.AT_ONCE)
        if starved or self._seen_of(model).near_at is None:
            self._changed(model)

    def _give_back(self, permit: Permit) -> None:
        self._aside(self._cancel_quietly(permit), f"give back a permit of {permit.model}")

    async def _cancel_quietly(self, permit: Permit) -> None:
        with contextlib.suppress(LimiterUnavailable):  # it stays counted, which is safe
            await self.cancel(permit)

    def _give_back_if_granted(self, standing: asyncio.Future[Permit]) -> None:
        if not standing.cancelled() and standing.exception() is None:
            self._give_back(standing.result())

    # -- memory -------------------------------------------------------------------------------------------

    async def _recover(self, model: str, reason: WaitReason) -> float | None:
        """Put back what Redis lost: 0 if done, else the seconds to wait; None if only a change can help."""
        lock = self._rebuilding.setdefault(model, asyncio.Lock())
        async with lock:
            seen = self._seen_of(model)
            if reason is WaitReason.NO_TARGET:
                if seen.target is None:
                    return None
                await self.set_target(model, seen.target, version=int(seen.version))
            return await self._rebuild(model, seen)

    async def _rebuild(self, model: str, seen: _Seen) -> float:
        asked = time.monotonic()
        ask = struct.pack("<2d", float(seen.generation > 0), self.settings.call_longest_seconds * _MICRO)
        reply = await self._call(model, "lost", ask)
        live, lost_for, clock, longest, known = struct.unpack("<5d", reply)
        if live:
            return 0.0
        out_seconds = self.settings.look_ahead_seconds + self.settings.minute_slacks.send
        calls: list[PastCall] = []
        if self._history is not None:
            calls = await self._past_calls(self._history, model, longest / _MICRO)
        elif known:
            out_seconds += longest / _MICRO
        still_out = out_seconds - lost_for / _MICRO if calls or known else 0.0
        if still_out > 0:
            return still_out
        blind = self._history is None and not known
        clock += (time.monotonic() - asked) * _MICRO
        since = clock - longest if calls else 0.0
        await self._build(model, seen, calls, clock, since=since, blind=blind)
        return 0.0

    async def _past_calls(self, history: History, model: str, seconds: float) -> list[PastCall]:
        try:
            return await history(model, seconds)
        except Exception as error:
            what = f"Redis lost what was sent to {model}, and the call log cannot say it"
            raise LimiterUnavailable(f"{what}: {error}") from error

    async def _build(
        self, model: str, seen: _Seen, calls: list[PastCall], clock: float, *, since: float, blind: bool
    ) -> None:
        calls = sorted(calls, key=lambda call: -call.age_seconds_latest)
        moments = array("d", (clock - max(0.0, call.age_seconds_latest) * _MICRO for call in calls))
        tokens = struct.pack(f"<{len(calls)}I", *(call.tokens for call in calls))
        still_open = bytes(call.open for call in calls)
        longest = self.settings.call_longest_seconds * _MICRO
        ask = struct.pack("<4d", float(blind), since, longest, seen.generation)
        await self._call(model, "rebuild", ask, moments.tobytes(), tokens, still_open, self._name)

    # -- Redis --------------------------------------------------------------------------------------------

    async def _call(self, model: str, verb: str, *arguments: bytes | str) -> Any:
        return await self._script.call(self._keys.get(model) or self._key(model), verb, *arguments)

    def _key(self, model: str) -> str:
        if not MODEL_NAME.fullmatch(model):
            raise InputError(
                f"{model[:120]!r} is no model name: letters, digits, '.', '_' and '-', at most 100."
            )
        key = self._keys[model] = f"router:{{{model}}}"
        return key

    def _seen_of(self, model: str) -> _Seen:
        seen = self._seen.get(model)
        if seen is None:
            self._key(model)
            seen = self._seen[model] = _Seen()
        return seen

    def _line(self, model: str) -> Line:
        line = self._lines.get(model)
        if line is None:
            self._key(model)

            async def ask(tokens: list[int]) -> tuple[list[Permit], Wait]:
                await self._hear()
                return await self._ask(model, tuple(tokens))

            line = self._lines[model] = Line(model, ask, self._give_back, self.settings)
        return line

    def _aside(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._side_tasks.add(task)
        task.add_done_callback(self._side_tasks.discard)

    async def _snapshot(self, model: str) -> ModelTraffic:
        line, rest_reason, packed = await self._call(model, "snapshot", b"")
        target = TrafficTarget.parse(line.decode()) if line else None
        status, *numbers = struct.unpack(f"<{len(packed) // 8}d", packed)
        if status or target is None:
            why = WaitReason.NO_TARGET if target is None else WaitReason.LOST
            return ModelTraffic(model, line.decode() or None, {}, {}, 0, None, why, 0.0, None)
        again, reason, at_once, resting, *counts = numbers
        limits = [*target.requests, *target.tokens] if not target.stopped else []
        by_limit = {str(limit): int(count) for limit, count in zip(limits, counts, strict=True)}
        sent = {str(limit): by_limit[str(limit)] for limit in target.requests}
        tokens = {str(limit): by_limit[str(limit)] for limit in target.tokens}
        return ModelTraffic(
            model=model,
            target=str(target),
            sent=sent,
            tokens=tokens,
            at_once=int(at_once),
            next_seconds=None if again < 0 else again / _MICRO,
            waiting_for=WaitReason(int(reason)),
            resting_seconds=resting / _MICRO,
            rest_reason=rest_reason.decode() or None if resting > 0 else None,
        )

    # -- hearing of changes -------------------------------------------------------------------------------

    def _changed(self, model: str) -> None:
        seen = self._seen_of(model)
        seen.near_at, seen.near_known_at = None, 0.0
        line = self._lines.get(model)
        if line is not None:
            line.poke()

    async def _hear(self) -> None:
        """Begin to listen for changes made elsewhere; the first time, wait until they are heard (bounded)."""
        if self._listener is not None and not self._listener.done():
            return
        self._listener = asyncio.create_task(self._listen(), name="limiter listens for changes")
        waiting = asyncio.ensure_future(self._listening.wait())
        await asyncio.wait({waiting}, timeout=self.settings.ask_again_seconds)
        waiting.cancel()

    async def _listen(self) -> None:
        while True:
            with contextlib.suppress(*REDIS_ERRORS):
                async with self._redis.pubsub(ignore_subscribe_messages=True) as channel:
                    await channel.subscribe(CHANNEL)
                    self._listening.set()
                    for model in self._lines:
                        self._changed(model)  # what was said before the subscription was not heard
                    while True:
                        message = await channel.get_message(timeout=30.0)
                        if message is not None:
                            self._heard(message["data"])
            self._listening.clear()
            await asyncio.sleep(self.settings.retry_cap_seconds)

    def _heard(self, data: bytes | str) -> None:
        text = data.decode(errors="replace") if isinstance(data, bytes) else data
        key, _, speaker = text.partition(" ")
        model = key[len("router:{") : -1]
        if speaker != self._name and model in self._lines:
            self._changed(model)


def _check_tokens(tokens: int) -> None:
    if not 0 <= tokens <= LARGEST_COUNT:
        raise InputError(f"{tokens} is no number of tokens: 0 to {LARGEST_COUNT:,}.")


async def _ended(standing: asyncio.Future[Any]) -> None:
    standing.cancel()
    await asyncio.wait({standing})
