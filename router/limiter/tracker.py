"""State of each model in this process: updated from replies and notifications, reported to Redis."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Awaitable, Callable

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
from router.task import CLIENT_PATTERN
from router.traffic import TrafficTarget

TargetSource = Callable[[str], Awaitable[tuple[TrafficTarget, int] | None]]

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)
CLIENT_NAME = re.compile(CLIENT_PATTERN, re.ASCII)
MAX_COOLDOWN_SECONDS = 86_400.0
MAX_REASON_CHARACTERS = 200


class ModelTracker:
    """Holds a `ModelState` per model, and restores in Redis what Redis lost and this process knows.

    Script, settings, clock and side tasks are shared by all parts of a limiter.
    """

    def __init__(
        self, script: RedisScript, settings: LimiterSettings, clock: Clock, *,
        stored_target: TargetSource | None = None, has_log: bool = False, one_slot: bool = False,
    ) -> None:  # fmt: skip
        self.script = script
        self.number = float(int(script.sender[:12], 16) + 1)  # this process in the script's turns
        self.settings = settings
        self._stored_target = stored_target
        self._has_log = has_log
        self._one_slot = one_slot
        self.clock = clock
        self.tasks = SideTasks()
        self._states: dict[str, ModelState] = {}
        self._clients: dict[str, ModelState] = {}
        self._by_key: dict[str, ModelState] = {}

    def state(self, model: str) -> ModelState:
        """Returns the state of a model. Raises InputError for an invalid name."""
        state = self._states.get(model)
        if state is None:
            check_model_name(model)
            state = self._states[model] = self._added(ModelState(model, self._key(model)))
        return state

    def client(self, client: str) -> ModelState:
        """Returns the state of a client's limits. Raises InputError for an invalid name."""
        state = self._clients.get(client)
        if state is None:
            if client and not CLIENT_NAME.fullmatch(client):
                raise InputError(f"{client[:120]!r} is not a valid client: {CLIENT_PATTERN}.")
            named = f"client {client!r}"
            state = self._clients[client] = self._added(
                ModelState(named, self._key(f"client:{client}"), client=client)
            )
        return state

    def by_key(self, key: str) -> ModelState:
        """Returns the state with a key that this tracker made."""
        return self._by_key[key]

    def _key(self, name: str) -> str:
        """Returns the key of a state: one call of the script reads only keys of one slot of a cluster."""
        return f"router:{{router}}:{name}" if self._one_slot else f"router:{{{name}}}"

    def _added(self, state: ModelState) -> ModelState:
        self._by_key[state.key] = state
        return state

    def changed(self, key: str) -> None:
        """Another process changed the model with this key."""
        state = self._by_key.get(key)
        if state is not None:
            state.changed()

    def all_changed(self) -> None:
        """Any model may have changed: notifications were missed."""
        for state in self._by_key.values():
            state.changed()

    def observe(self, state: ModelState, generation: float, version: float) -> None:
        """Records a generation or a target version that is new to this process."""
        if generation > state.generation:
            state.generation, state.head, state.clock_offset = generation, 0.0, None
            if state.cooldown_until > self.clock():
                self.tasks.start(self._restore_cooldown(state), f"restore the cool-down of {state.model}")
        if version > state.version:
            state.version = version
            self.tasks.start(self._learn_target(state), f"learn the target of {state.model}")

    async def set_target(self, state: ModelState, target: TrafficTarget, version: int | None) -> bool:
        """Applies a target; False if a newer version is applied already."""
        packed = pack_target(target, self.settings, state.model if state.client is None else None)
        request = pack_set_target(version, self.settings, has_log=self._has_log)
        sender = self.script.sender
        reply = await self.script.call(state.key, "target", request, packed, str(target), sender)
        applied, version_now = unpack_set_target(reply)
        if applied:
            state.version, state.target, state.target_version = version_now, target, version_now
            state.changed()
        return applied

    async def restore_target(self, state: ModelState) -> bool:
        """Puts back the newest target that this process or the database knows; False if neither knows one.

        This process alone may have missed a change. The database stores only the first version of an
        unchanged target, so that a newer version that was seen applies to it.
        """
        known = None if state.target is None else (state.target, state.target_version)
        if self._stored_target is not None and state.client is None:
            try:
                stored = await self._stored_target(state.model)
            except Exception as error:
                what = f"Redis lost the target of {state.model}, and the database cannot be read"
                raise LimiterUnavailable(f"{what}: {error}", cause="database") from error
            if stored is not None and (known is None or stored[1] > known[1]):
                known = stored
        if known is None:
            return False
        await self.set_target(state, known[0], int(max(known[1], state.version)))
        return True

    async def report(
        self, state: ModelState, verdict: Verdict, reason: str, send: tuple[int, int] | None = None
    ) -> None:
        """Reports a verdict on a model; `send` is the (generation, number) that it is about."""
        now = self.clock()
        verdict = Verdict(verdict.signal, min(verdict.cooldown_seconds, MAX_COOLDOWN_SECONDS))
        reason = reason[:MAX_REASON_CHARACTERS]
        if verdict.cooldown_seconds > 0:  # before the call: it is restored later if Redis is unavailable
            state.cooldown_until = max(state.cooldown_until, now + verdict.cooldown_seconds)
            state.cooldown_reason = reason
        request = pack_outcome(
            verdict, state.generation, state.clock_bound(now),
            send=send, trips=state.trips, breaker=self.settings.breaker,
        )  # fmt: skip
        reply = await self.script.call(state.key, "outcome", request, reason, self.script.sender)
        breaker = unpack_breaker(reply)
        if not breaker.status:
            state.failures, state.trips = breaker.failures, breaker.trips
            state.cooldown_until = self.clock() + breaker.cooldown / MICRO
        state.changed()

    async def snapshot(self, state: ModelState) -> ModelTraffic:
        """Reads target and usage from Redis."""
        line, cooldown_reason, packed = await self.script.call(state.key, "snapshot", b"")
        return unpack_snapshot(state.model, line, cooldown_reason, packed)

    async def restored_snapshot(self, state: ModelState) -> ModelTraffic:
        """Reads the snapshot; a target that Redis lost is put back first."""
        traffic = await self.snapshot(state)
        outdated = traffic.target is None or traffic.version < state.version
        if outdated and await self.restore_target(state):
            traffic = await self.snapshot(state)
        return traffic

    async def _restore_cooldown(self, state: ModelState) -> None:
        verdict = Verdict(Signal.RESTORE, state.cooldown_until - self.clock())
        with contextlib.suppress(LimiterUnavailable):
            await self.report(state, verdict, state.cooldown_reason)

    async def _learn_target(self, state: ModelState) -> None:
        with contextlib.suppress(LimiterUnavailable):
            traffic = await self.snapshot(state)
            if traffic.target and traffic.version >= state.target_version:
                state.target = TrafficTarget.parse(traffic.target)
                state.target_version = traffic.version


def check_model_name(model: str) -> None:
    """Raises InputError for an invalid name of a model."""
    if not MODEL_NAME.fullmatch(model):
        what = f"{model[:120]!r} is not a valid model name"
        raise InputError(f"{what}: letters, digits, '.', '_' and '-', at most 100.")
