"""Faults on demand: for a while a share of a model's calls fails in a chosen way."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

MOST_FAULTS = 100
EVERY_MODEL = "*"

FaultKind = Literal["error", "rate_limit", "overload", "bad_gateway", "hang", "garbage", "slow_drip", "empty"]
KINDS: tuple[FaultKind, ...] = get_args(FaultKind)


class FaultOrder(BaseModel):
    """Body of `POST /faults`: `share` of the calls of `model` (`*`: all) fails for `seconds`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: FaultKind
    model: str = EVERY_MODEL
    share: float = Field(default=1.0, ge=0, le=1)
    seconds: float = Field(default=60.0, gt=0, le=86_400)
    retry_after_seconds: int | None = Field(
        default=1, ge=0, le=86_400
    )  # of rate_limit and overload; null: none


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault that is active until `ends_at` (monotonic seconds)."""

    order: FaultOrder
    ends_at: float


class Faults:
    """The active faults; of several that match a call, the oldest decides."""

    def __init__(self, seed: int = 0) -> None:
        self._faults: list[Fault] = []
        self._dice = random.Random(seed)

    def order(self, order: FaultOrder) -> None:
        """Activates a fault. Raises ValueError if 100 are active already."""
        if len(self.active()) >= MOST_FAULTS:
            raise ValueError(f"{MOST_FAULTS} faults are active already; DELETE /faults first")
        self._faults.append(Fault(order, time.monotonic() + order.seconds))

    def clear(self) -> None:
        """Ends all faults; calls that hang already hang until their client disconnects."""
        self._faults.clear()

    def active(self) -> list[Fault]:
        """The faults that have not ended."""
        now = time.monotonic()
        self._faults = [fault for fault in self._faults if fault.ends_at > now]
        return list(self._faults)

    def pick(self, model: str) -> FaultOrder | None:
        """The fault that applies to this call, if any."""
        if not self._faults:
            return None
        for fault in self.active():
            if fault.order.model in {EVERY_MODEL, model} and self._dice.random() < fault.order.share:
                return fault.order
        return None
