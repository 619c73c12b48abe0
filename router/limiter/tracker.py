"""State of each model in this process: updated from replies and notifications, reported to Redis."""

from __future__ import annotations

import contextlib
import re

from router.errors import InputError, LimiterUnavailable
from router.limiter.breaker import Signal, Verdict
from router.limiter.codec import (
    MICRO,
    pack_outcome,
    pack_set_target,
    pack_target,
    unpack_breaker,
    unpack_set_target,
    unpack_snapshot,
)
from router.limiter.permit import Clock
from router.limiter.script import RedisScript
from router.limiter.settings import LimiterSettings
from router.limiter.snapshot import ModelTraffic
from router.limiter.state import ModelState
from router.limiter.tasks import SideTasks
from router.traffic import TrafficTarget

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)
MAX_COOLDOWN_SECONDS = 86_400.0
MAX_REASON_CHARACTERS = 200


class ModelTracker:
    """Holds a `ModelState` per model, and puts back into Redis what Redis lost and this process knows."""

    def __init__(
        self, script: RedisScript, settings: LimiterSettings, tasks: SideTasks, clock: Clock
    ) -> None:
        self._script = script
        self._settings = settings
        self._tasks = tasks
        self._clock = clock
        self._states: dict[str, ModelState] = {}
        self._by_key: dict[str, ModelState] = {}

    def state(self, model: str) -> ModelState:
        """Returns the state of a model. Raises InputError for an invalid name."""
        state = self._states.get(model)
        if state is None:
            if not MODEL_NAME.fullmatch(model):
                what = f"{model[:120]!r} is not a valid model name"
                raise InputError(f"{what}: letters, digits, '.', '_' and '-', at most 100.")
            state = self._states[model] = ModelState(model, f"router:{{{model}}}")
            self._by_key[state.key] = state
        return state

    def changed(self, key: str) -> None:
        """Another process changed the model with this key."""
        state = self._by_key.get(key)
        if state is not None:
            state.changed()

    def all_changed(self) -> None:
        """Any model may have changed: notifications were missed."""
        for state in self._states.values():
            state.changed()

    def observe(self, state: ModelState, generation: float, version: float) -> None:
        """Records a generation or a target version that is new to this process."""
        if generation > state.generation:
            state.generation, state.head, state.clock_offset = generation, 0.0, None
            if state.cooldown_until > self._clock():
                self._tasks.start(self._restore_cooldown(state), f"restore the cool-down of {state.model}")
        if version > state.version:
            state.version = version
            self._tasks.start(self._learn_target(state), f"learn the target of {state.model}")

    async def set_target(self, state: ModelState, target: TrafficTarget, version: int | None) -> bool:
        """Applies a target; False if a newer version is applied already."""
        packed = pack_target(target, self._settings)
        request = pack_set_target(version, self._settings)
        sender = self._script.sender
        reply = await self._script.call(state.key, "target", request, packed, str(target), sender)
        applied, version_now = unpack_set_target(reply)
        if applied:
            state.version, state.target = version_now, target
            state.changed()
        return applied

    async def restore_target(self, state: ModelState) -> bool:
        """Puts back the target that this process knows; False if it knows none."""
        if state.target is None:
            return False
        await self.set_target(state, state.target, int(state.version))
        return True

    async def report(
        self, state: ModelState, verdict: Verdict, reason: str, send: tuple[int, int] | None = None
    ) -> None:
        """Reports a verdict on a model; `send` is the (generation, number) that it is about."""
        now = self._clock()
        verdict = Verdict(verdict.signal, min(verdict.cooldown_seconds, MAX_COOLDOWN_SECONDS))
        reason = reason[:MAX_REASON_CHARACTERS]
        if verdict.cooldown_seconds > 0:  # before the call: if Redis is away, it is restored later
            state.cooldown_until = max(state.cooldown_until, now + verdict.cooldown_seconds)
            state.cooldown_reason = reason
        request = pack_outcome(
            verdict, state.generation, state.clock_bound(now),
            send=send, trips=state.trips, breaker=self._settings.breaker,
        )  # fmt: skip
        reply = await self._script.call(state.key, "outcome", request, reason, self._script.sender)
        breaker = unpack_breaker(reply)
        if not breaker.status:
            state.failures, state.trips = breaker.failures, breaker.trips
            state.cooldown_until = self._clock() + breaker.cooldown / MICRO
        state.changed()

    async def snapshot(self, state: ModelState) -> ModelTraffic:
        """Reads target and usage from Redis."""
        line, cooldown_reason, packed = await self._script.call(state.key, "snapshot", b"")
        return unpack_snapshot(state.model, line, cooldown_reason, packed)

    async def _restore_cooldown(self, state: ModelState) -> None:
        verdict = Verdict(Signal.RESTORE, state.cooldown_until - self._clock())
        with contextlib.suppress(LimiterUnavailable):
            await self.report(state, verdict, state.cooldown_reason)

    async def _learn_target(self, state: ModelState) -> None:
        with contextlib.suppress(LimiterUnavailable):
            traffic = await self.snapshot(state)
            if traffic.target:
                state.target = TrafficTarget.parse(traffic.target)
