"""Faults on demand: for a while, a share of a model's calls goes wrong in a chosen way."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

MOST_FAULTS = 100
EVERY_MODEL = "*"

FaultKind = Literal["error", "rate_limit", "overload", "hang", "garbage", "slow_drip", "empty"]
KINDS: tuple[FaultKind, ...] = get_args(FaultKind)


class FaultOrder(BaseModel):
    """What `POST /faults` takes: `share` of the calls of `model` (`*` for all) fails for `seconds`."""

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
    """An order in force until `ends_at` (monotonic seconds)."""

    order: FaultOrder
    ends_at: float


class Faults:
    """The faults in force; of several that fit a call, the one ordered first decides."""

    def __init__(self, seed: int = 0) -> None:
        self._faults: list[Fault] = []
        self._dice = random.Random(seed)

    def order(self, order: FaultOrder) -> None:
        """Put an order in force now. ValueError when 100 are in force already."""
        if len(self.in_force()) >= MOST_FAULTS:
            raise ValueError(f"{MOST_FAULTS} faults are in force already; DELETE /faults first")
        self._faults.append(Fault(order, time.monotonic() + order.seconds))

    def clear(self) -> None:
        """End them all; calls that hang already go on hanging until their client leaves."""
        self._faults.clear()

    def in_force(self) -> list[Fault]:
        """What still runs; what has ended is forgotten."""
        now = time.monotonic()
        self._faults = [fault for fault in self._faults if fault.ends_at > now]
        return list(self._faults)

    def pick(self, model: str) -> FaultOrder | None:
        """The fault that strikes this call, if one does."""
        if not self._faults:
            return None
        for fault in self.in_force():
            if fault.order.model in {EVERY_MODEL, model} and self._dice.random() < fault.order.share:
                return fault.order
        return None
