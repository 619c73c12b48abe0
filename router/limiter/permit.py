"""The limiter's values: a permit with its moment, a refusal with its reason, and its settings. No I/O."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field

from router.errors import PermitDead


class WaitReason(enum.IntEnum):
    """What a model is waiting for; the numbers are those of `limiter.lua`."""

    NOTHING = 0
    WINDOW = 1
    TOKENS = 2
    AT_ONCE = 3
    STOPPED = 4
    RESTING = 5
    TOO_LARGE = 6
    LOST = 7
    NO_TARGET = 8
    PROBING = 9

    @property
    def text(self) -> str:
        return _REASON_TEXTS[self]


_REASON_TEXTS = {
    WaitReason.NOTHING: "nothing",
    WaitReason.WINDOW: "its window of requests is used up, or the pace",
    WaitReason.TOKENS: "its window of tokens is used up",
    WaitReason.AT_ONCE: "all places at once are taken",
    WaitReason.STOPPED: "its traffic target is 0",
    WaitReason.RESTING: "it rests after a refusal",
    WaitReason.TOO_LARGE: "the call needs more tokens than a whole window allows",
    WaitReason.LOST: "Redis lost its memory, and what was sent before is being found out",
    WaitReason.NO_TARGET: "it has no traffic target yet",
    WaitReason.PROBING: "it failed again and again, and one call is trying it out",
}

RESTS = frozenset({WaitReason.RESTING, WaitReason.PROBING})  # the model is not trusted now


@dataclass(slots=True, eq=False)
class Permit:
    """The limiter's leave to send one call at one moment, on this machine's monotonic clock.

    The moment counts from when Redis's reply arrived and the death from when the question left, so that
    neither a slow nor a stalled reply makes a send early or late.
    """

    model: str
    tokens: int
    number: int
    generation: int
    moment_at: float
    dead_at: float
    returned: bool = field(default=False, repr=False)

    @property
    def wait_seconds(self) -> float:
        """Seconds from now until the moment; 0 once it has come."""
        return max(0.0, self.moment_at - time.monotonic())

    @property
    def dead(self) -> bool:
        """True once it is too late to send."""
        return time.monotonic() > self.dead_at

    def check(self) -> None:
        """Raise PermitDead if it is too late to send; to be called immediately before the socket write."""
        late = time.monotonic() - self.dead_at
        if late > 0:
            raise PermitDead(
                f"The permit of {self.model} died {late * 1000:.0f} ms ago: reserve another one."
            )


@dataclass(frozen=True, slots=True)
class Wait:
    """No permit now: why, and in how many seconds to ask again; None if only a change can help. Is false."""

    model: str
    reason: WaitReason
    again_seconds: float | None

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class PastCall:
    """A call of the log, for a limiter that lost its memory.

    `age_seconds_latest` is how long ago it was sent, counted as late as it could have been; `tokens` are
    those it used, or the reserved ones while that is not known; `open` says that it may still be in flight.
    """

    age_seconds_latest: float
    tokens: int = 0
    open: bool = False
