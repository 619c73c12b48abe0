"""Putting back what Redis lost: a model's target, and its windows rebuilt from its past calls."""

from __future__ import annotations

import asyncio
import logging
import struct
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from router.errors import LimiterUnavailable
from router.limiter.codec import packed_history
from router.limiter.permit import PastCall, WaitReason
from router.limiter.settings import MICRO, LimiterSettings
from router.limiter.state import ModelState

log = logging.getLogger("router.limiter")

History = Callable[[str, float], Awaitable[list[PastCall]]]
Loss = tuple[int, float]  # when by Redis's clock, which may stand still; what generation was lost
KNOWN_SECONDS = 61.0  # a target with a minute's window, set after one with a second's, knows its past too
PutTarget = Callable[[str, ModelState], Awaitable[object]]


class Call(Protocol):
    """One question to the script about a model."""

    async def __call__(self, model: str, verb: str, *arguments: bytes | str) -> Any: ...


class Recovery:
    """Makes a model that Redis forgot ready again, once it is sure that nothing is out that nobody counts."""

    def __init__(
        self, call: Call, put_target: PutTarget, history: History | None, settings: LimiterSettings, name: str
    ) -> None:
        self._call = call
        self._put_target = put_target
        self._history = history
        self._settings = settings
        self._name = name
        self._rebuilding: dict[str, asyncio.Lock] = {}
        self._said: set[str] = set()
        self._noticed: dict[str, tuple[Loss, float]] = {}  # and since when, by our clock

    async def recover(self, model: str, seen: ModelState, reason: WaitReason) -> float | None:
        """Put back what Redis lost: 0 if done, else the seconds to wait; None if only a change can help."""
        lock = self._rebuilding.setdefault(model, asyncio.Lock())
        async with lock:
            if reason is WaitReason.NO_TARGET:
                if seen.target is None:
                    return None
                await self._put_target(model, seen)
            return await self._rebuild(model, seen)

    async def _rebuild(self, model: str, seen: ModelState) -> float:
        asked = time.monotonic()
        ask = struct.pack("<2d", float(seen.generation > 0), self._settings.call_longest_seconds * MICRO)
        reply = await self._call(model, "loss", ask)
        live, lost_for, clock, longest, known, generation = struct.unpack("<6d", reply)
        if live:
            return 0.0
        lost_for = self._own_seconds(model, (round(clock - lost_for), generation), asked) * MICRO
        if known and model not in self._said:
            self._said.add(model)
            log.warning("Redis lost what was sent to %s: nothing is sent until it is counted anew", model)
        out_seconds = self._settings.look_ahead_seconds + self._settings.minute_slacks.send
        calls: list[PastCall] = []
        if self._history is not None:
            longest = max(longest, KNOWN_SECONDS * MICRO)
            calls = await self._past_calls(self._history, model, longest / MICRO)
        elif known:
            out_seconds += longest / MICRO
        still_out = out_seconds - lost_for / MICRO if calls or known else 0.0
        if still_out > 0:
            return still_out
        blind = self._history is None and not known
        clock += (time.monotonic() - asked) * MICRO
        since = clock - longest if calls or known else 0.0
        await self._build(model, seen, calls, clock, since=since, blind=blind)
        return 0.0

    def _own_seconds(self, model: str, loss: Loss, asked: float) -> float:
        """How long we know of this loss: Redis's clock may be set meanwhile, forward or back."""
        known, since = self._noticed.get(model, ((0, 0.0), 0.0))
        if known != loss:
            since = asked
            self._noticed[model] = (loss, since)
        return time.monotonic() - since

    async def _past_calls(self, history: History, model: str, seconds: float) -> list[PastCall]:
        try:
            return await history(model, seconds)
        except Exception as error:
            what = f"Redis lost what was sent to {model}, and the call log cannot say it"
            raise LimiterUnavailable(f"{what}: {error}") from error

    async def _build(
        self, model: str, seen: ModelState, calls: list[PastCall], clock: float, *, since: float, blind: bool
    ) -> None:
        moments, tokens, still_open = packed_history(calls, clock)
        rests = max(0.0, seen.rest_until - time.monotonic())
        ask = struct.pack("<6d", float(blind), since, self._settings.call_longest_seconds * MICRO,
                          seen.generation, rests * MICRO, seen.trip)  # fmt: skip
        await self._call(model, "rebuild", ask, moments, tokens, still_open, self._name, seen.rest_reason)
        if model in self._said:
            self._said.discard(model)
            log.info("What was sent to %s is counted anew: %d calls of the log", model, len(calls))
