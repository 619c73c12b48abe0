"""What this process has seen of each model, what it does when that changes, and what it tells the others."""

from __future__ import annotations

import contextlib
import re
import struct
import time
from collections.abc import Callable, Coroutine
from typing import Any

from router.errors import InputError, LimiterUnavailable
from router.limiter.breaker import BreakerSettings, Signal
from router.limiter.codec import packed_verdict, traffic_of
from router.limiter.recovery import Call
from router.limiter.settings import MICRO
from router.limiter.snapshot import ModelTraffic
from router.limiter.state import ModelState
from router.traffic import TrafficTarget

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)
LONGEST_REST_SECONDS = 86_400.0
LONGEST_REASON = 200

Aside = Callable[[Coroutine[Any, Any, None], str], object]


class ModelTracker:
    """A `ModelState` a model. `changed(model)` is called after a verdict; `aside` runs what goes on alone."""

    def __init__(
        self, call: Call, name: str, breaker: BreakerSettings, changed: Callable[[str], None], aside: Aside
    ) -> None:
        self._call = call
        self._name = name
        self._breaker = breaker
        self._changed = changed
        self._aside = aside
        self._seen: dict[str, ModelState] = {}
        self._keys: dict[str, str] = {}

    def of(self, model: str) -> ModelState:
        """What was seen of the model; InputError if that is no name of one."""
        seen = self._seen.get(model)
        if seen is None:
            self.key(model)
            seen = self._seen[model] = ModelState()
        return seen

    def key(self, model: str) -> str:
        """The key of the model's hash in Redis; InputError if it is no name of a model."""
        key = self._keys.get(model)
        if key is None:
            if not MODEL_NAME.fullmatch(model):
                what = f"{model[:120]!r} is no model name"
                raise InputError(f"{what}: letters, digits, '.', '_' and '-', at most 100.")
            key = self._keys[model] = f"router:{{{model}}}"
        return key

    def remember(self, model: str, seen: ModelState, generation: float, version: float) -> None:
        """A reply shows a generation or a target that is new here."""
        if generation > seen.generation:
            seen.generation, seen.head, seen.anchor = generation, 0.0, None
            if seen.rest_until > time.monotonic():
                self._aside(self._put_rest_back(model, seen), f"put back a rest of {model}")
        if version > seen.version:
            seen.version = version
            self._aside(self._learn_target(model, seen), f"learn the target of {model}")

    async def tell(
        self, model: str, sign: Signal, seconds: float, reason: str, send: tuple[int, int] | None = None
    ) -> None:
        """Rest, doubt or trust the model, for everyone. `send` is generation and number of what was sent."""
        seen, left = self.of(model), time.monotonic()
        seconds, reason = min(seconds, LONGEST_REST_SECONDS), reason[:LONGEST_REASON]
        if seconds > 0:  # also if Redis is away: whoever knows of a rest says so when it is back
            seen.rest_until, seen.rest_reason = max(seen.rest_until, left + seconds), reason
        ask = packed_verdict(seen, left, sign, seconds, send=send, breaker=self._breaker)
        reply = await self._call(model, "outcome", ask, reason, self._name)
        status, failures, trip, resting = struct.unpack("<4d", reply)
        if not status:
            seen.failures, seen.trip, seen.rest_until = failures, trip, time.monotonic() + resting / MICRO
        self._changed(model)

    async def look(self, model: str) -> ModelTraffic:
        """What is in force and in use."""
        line, rest_reason, packed = await self._call(model, "snapshot", b"")
        return traffic_of(model, line, rest_reason, packed)

    async def _put_rest_back(self, model: str, seen: ModelState) -> None:
        with contextlib.suppress(LimiterUnavailable):
            await self.tell(model, Signal.PUT_BACK, seen.rest_until - time.monotonic(), seen.rest_reason)

    async def _learn_target(self, model: str, seen: ModelState) -> None:
        """Keep the target in force at hand, so that it can be put back when Redis lost it."""
        with contextlib.suppress(LimiterUnavailable):
            traffic = await self.look(model)
            if traffic.target:
                seen.target = TrafficTarget.parse(traffic.target)
