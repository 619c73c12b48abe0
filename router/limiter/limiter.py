"""Who may send to a model, and when: exact where the provider counts, for any number of processes.

In any window of a model's traffic target, at the backend's door, there are no more than the target's
requests, tokens and calls at once. One script call in Redis (`limiter.lua`) decides all of it together and
answers with a moment. How and why: docs/limiter.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import Coroutine, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import redis.asyncio

from router.errors import InputError, LimiterError, LimiterUnavailable
from router.limiter.breaker import Signal
from router.limiter.codec import packed_target
from router.limiter.notifications import Notifications
from router.limiter.permit import UNAVAILABLE_REASONS, PastCall, Permit, Wait, WaitReason
from router.limiter.recovery import History, Recovery
from router.limiter.releases import Releases
from router.limiter.script import RedisScript
from router.limiter.settings import MICRO, LimiterSettings, Slacks
from router.limiter.snapshot import ModelTraffic
from router.limiter.state import FREED_BY_OTHERS, ModelState
from router.limiter.tracker import ModelTracker
from router.limiter.waiters import WaitQueue
from router.task import Outcome
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

T = TypeVar("T")
_SCRIPT = Path(__file__).with_name("limiter.lua").read_text(encoding="utf-8")
_LOST = 1  # the script's status; 0 is a decision, 2 is no target
_HEAD = struct.Struct("<10d")
_GRANT = struct.Struct("<2d")
_QUESTION = struct.Struct("<6d")
_MEMORY = frozenset({WaitReason.REBUILDING, WaitReason.NO_TARGET})
_FREED = FREED_BY_OTHERS | {WaitReason.TOKENS}
_MOST_TRIES = 3


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
        self.settings = settings or LimiterSettings()
        self._script = RedisScript(redis, _SCRIPT)
        self._name = f"{id(self):x}-{time.monotonic_ns():x}"
        self._changes = Notifications(redis, self._name, self._heard, self.settings)
        self._recovery = Recovery(self._call, self._put_target_back, history, self.settings, self._name)
        self._sightings = ModelTracker(
            self._call, self._name, self.settings.breaker, self._changed, self._aside
        )
        self._seen_of = self._sightings.of
        self._lines: dict[str, WaitQueue] = {}
        self._returns = Releases(self._send_back)
        self._snapshots: dict[str, asyncio.Task[ModelTraffic]] = {}
        self._side_tasks: set[asyncio.Task[Any]] = set()

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
        await self._returns.close()
        await self._changes.close()
        await self._script.close()

    # -- targets ------------------------------------------------------------------------------------------

    async def set_target(
        self, model: str, target: TrafficTarget | str, *, version: int | None = None
    ) -> bool:
        """Put a target in force from the next decision on; False if a newer version is in force already.

        `version` is when the target was read, in microseconds of the reader's database clock; without one it
        is later than whatever is in force.
        """
        target = TrafficTarget.parse(target) if isinstance(target, str) else target
        ask = struct.pack("<2d", version or 0, self.settings.call_longest_seconds * MICRO)
        packed = packed_target(target, self.settings)
        reply = await self._call(model, "target", ask, packed, str(target), self._name)
        taken, in_force = struct.unpack("<2d", reply)
        if taken:
            seen = self._seen_of(model)
            seen.version, seen.target = in_force, target
            self._changed(model)
        return bool(taken)

    async def _put_target_back(self, model: str, seen: ModelState) -> None:
        if seen.target is not None:
            await self.set_target(model, seen.target, version=int(seen.version))

    # -- permits ------------------------------------------------------------------------------------------

    async def reserve(
        self, model: str, tokens: int = 0, *, holder_seconds: float | None = None
    ) -> Permit | Wait:
        """A permit whose moment is at most the look-ahead away, or why not and when to ask again.

        One round trip. `tokens` bounds what the call can use; `holder_seconds` is the longest it can take.
        """
        _check_tokens(tokens)
        permits, again, reason = await self._ask_once(model, "reserve", (tokens,), holder_seconds)
        if reason >= WaitReason.REBUILDING and not permits and reason != WaitReason.HALF_OPEN:
            permits, wait = await self._ask(model, (tokens,), holder_seconds)
            return permits[0] if permits else wait
        return permits[0] if permits else Wait(model, WaitReason(int(reason)), again)

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

    async def wait_until_available(self, model: str) -> None:
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

    async def wait_until_unavailable(self, model: str) -> None:
        """Return once those who wait for a permit hear that the model rests or is doubted; asks nothing."""
        line = self._line(model)
        replies = line.replies
        while line.replies == replies or line.waiting_for not in UNAVAILABLE_REASONS:
            await line.bell.wait(self.settings.hint_seconds)

    async def release(self, permit: Permit, tokens: int | None = None) -> None:
        """The call ended: its place is free, its reservation becomes the `tokens` it used. Idempotent."""
        if tokens is not None:
            _check_tokens(tokens)
        await self._returns.put(permit, -1 if tokens is None else tokens, unused=False)

    async def cancel(self, permit: Permit) -> None:
        """The permit was not used, and nothing was sent by it: it is given back whole. Idempotent."""
        await self._returns.put(permit, 0, unused=True)

    async def cool_down(self, model: str, seconds: float, reason: str) -> None:
        """Nobody may send to the model for `seconds`, at most a day; 0 ends a rest and closes the breaker."""
        await self._sightings.tell(model, Signal.REST, seconds, reason)

    async def record_outcome(
        self,
        model: str,
        outcome: Outcome,
        retry_after_seconds: float | None = None,
        *,
        why: str = "",
        permit: Permit | None = None,
    ) -> None:
        """Tell what a call came to, so that the model is rested, doubted or trusted again, by everyone.

        `permit` is the call's own: what was sent before the breaker opened says nothing about the probes.
        A success of a model that nobody doubts, and a call that was given up, cost no round trip.
        """
        verdict = self.settings.breaker.verdict(outcome, retry_after_seconds)
        seen = self._seen_of(model)
        doubted = seen.failures or seen.trip
        if verdict is None or (verdict.sign in {Signal.GOOD, Signal.NOTHING} and not doubted):
            return
        send = None if permit is None else (permit.generation, permit.number)
        reason = f"{outcome.value}: {why}"
        await self._sightings.tell(model, verdict.sign, verdict.rest_seconds, reason, send)

    def queue_length(self, model: str) -> int:
        """How many in this process stand in line for the model."""
        line = self._lines.get(model)
        return line.waiting if line is not None else 0

    async def snapshot(self, models: Iterable[str]) -> dict[str, ModelTraffic]:
        """What is in force and in use, model by model. Reserves nothing."""
        return {model: await self._snapshot(model) for model in models}

    async def shared_snapshot(self, model: str) -> ModelTraffic:
        """The snapshot of one model; all who look in the same moment share one."""
        looking = self._snapshots.get(model)
        if looking is None:
            looking = self._aside(self._snapshot(model), f"router look at {model}")
            self._snapshots[model] = looking
            looking.add_done_callback(lambda _: self._snapshots.pop(model))
        return await asyncio.shield(looking)

    # -- asking -------------------------------------------------------------------------------------------

    async def _ask(
        self, model: str, tokens: tuple[int, ...], holder_seconds: float | None = None
    ) -> tuple[list[Permit], Wait]:
        """As many permits as there are now for these tokens, in order, and what the next one waits for."""
        for _ in range(_MOST_TRIES):
            permits, again, number = await self._ask_once(model, "reserve", tokens, holder_seconds)
            reason = WaitReason(int(number))
            if reason not in _MEMORY:
                return permits, Wait(model, reason, again)
            again = await self._recovery.recover(model, self._seen_of(model), reason)
            if again is None or again > 0:
                return [], Wait(
                    model, WaitReason.NO_TARGET if again is None else WaitReason.REBUILDING, again
                )
        return [], Wait(model, WaitReason.REBUILDING, self.settings.retry_base_seconds)

    async def _ask_once(
        self, model: str, verb: str, tokens: tuple[int, ...], holder_seconds: float | None
    ) -> tuple[list[Permit], float | None, float]:
        """The permits there are, and what the next one waits for: seconds, and the number of a WaitReason."""
        seen = self._seen_of(model)
        settings = self.settings
        holder = settings.call_longest_seconds if holder_seconds is None else holder_seconds
        left = 0.0

        def question() -> bytes:
            nonlocal left
            left = time.monotonic()
            form = _QUESTION if len(tokens) == 1 else struct.Struct(f"<{5 + len(tokens)}d")
            look = settings.look_ahead_seconds * MICRO
            return form.pack(seen.generation, seen.claim(left), seen.head, look, holder * MICRO, *tokens)

        reply = await self._script.ask(self._sightings.key(model), verb, question)
        arrived = time.monotonic()
        status, generation, head, version, wait, reason, slack, now, failures, trip = _HEAD.unpack_from(reply)
        if status:
            seen.near_at = None
            return [], None, WaitReason.REBUILDING if status == _LOST else WaitReason.NO_TARGET
        if generation != seen.generation or version > seen.version:
            self._sightings.remember(model, seen, generation, version)
        if head > seen.head and generation == seen.generation:
            seen.head = head
        seen.heard(now, left, arrived)
        seen.failures, seen.trip = failures, trip
        again = None if wait < 0 else wait / MICRO
        seen.hint(again, reason, arrived, settings.look_ahead_seconds)
        if len(reply) == _HEAD.size:
            return [], again, reason
        death, of = left + slack / MICRO, int(generation)
        permits = [
            Permit(model, need, int(number), of, arrived + wait / MICRO, death + wait / MICRO)
            for (number, wait), need in zip(_GRANT.iter_unpack(reply[_HEAD.size :]), tokens, strict=False)
        ]
        return permits, again, reason

    async def _peek(self, model: str) -> None:
        """Learn when a send looks possible."""
        seen = self._seen_of(model)
        again: float | None = self.settings.retry_cap_seconds
        with contextlib.suppress(LimiterUnavailable):
            await self._changes.hear()
            _, _, reason = await self._ask_once(model, "peek", (0,), None)
            if reason not in _MEMORY:
                return
            again = await self._recovery.recover(model, seen, WaitReason(int(reason)))
        seen.near_at = None if again is None else time.monotonic() + again
        seen.near_known_at = time.monotonic() if again is None or again > 0 else 0.0

    async def _send_back(self, model: str, items: bytes) -> None:
        _, told = struct.unpack("<2d", await self._call(model, "release", items, self._name))
        line = self._lines.get(model)
        starved = line is not None and line.waiting_for in _FREED
        if told or starved or self._seen_of(model).near_at is None:  # Redis told only the others
            self._changed(model)

    def _give_back(self, permit: Permit) -> asyncio.Task[None]:
        return self._aside(self._cancel_quietly(permit), f"give back a permit of {permit.model}")

    async def _cancel_quietly(self, permit: Permit) -> None:
        with contextlib.suppress(LimiterUnavailable):  # it stays counted, which is safe
            await self.cancel(permit)

    def _give_back_if_granted(self, standing: asyncio.Future[Permit]) -> None:
        if not standing.cancelled() and standing.exception() is None:
            self._give_back(standing.result())

    # -- Redis --------------------------------------------------------------------------------------------

    async def _call(self, model: str, verb: str, *arguments: bytes | str) -> Any:
        return await self._script.call(self._sightings.key(model), verb, *arguments)

    def _line(self, model: str) -> WaitQueue:
        line = self._lines.get(model)
        if line is None:
            self._sightings.key(model)

            async def ask(tokens: list[int]) -> tuple[list[Permit], Wait]:
                await self._changes.hear()
                return await self._ask(model, tuple(tokens))

            line = self._lines[model] = WaitQueue(model, ask, self._give_back, self.settings)
        return line

    def _aside(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        task = asyncio.create_task(work, name=name)
        self._side_tasks.add(task)
        task.add_done_callback(self._side_tasks.discard)
        return task

    async def _snapshot(self, model: str) -> ModelTraffic:
        return await self._sightings.look(model)

    def _changed(self, model: str) -> None:
        seen = self._seen_of(model)
        seen.near_at, seen.near_known_at = None, 0.0
        line = self._lines.get(model)
        if line is not None:
            line.poke()

    def _heard(self, key: str | None) -> None:
        for model in list(self._lines):
            if key is None or key == self._sightings.key(model):
                self._changed(model)


def _check_tokens(tokens: int) -> None:
    if not 0 <= tokens <= LARGEST_COUNT:
        raise InputError(f"{tokens} is no number of tokens: 0 to {LARGEST_COUNT:,}.")


async def _ended(standing: asyncio.Future[Any]) -> None:
    standing.cancel()
    await asyncio.wait({standing})
