"""The limiter's values: a permit with its moment, a refusal with its reason, and its settings. No I/O."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field

from router.errors import PermitExpired


class WaitReason(enum.IntEnum):
    """What a model is waiting for; the numbers are those of `limiter.lua`."""

    NOTHING = 0
    WINDOW = 1
    TOKENS = 2
    CONCURRENCY = 3
    STOPPED = 4
    COOLING_DOWN = 5
    TOO_MANY_TOKENS = 6
    REBUILDING = 7
    NO_TARGET = 8
    HALF_OPEN = 9

    @property
    def text(self) -> str:
        return _REASON_TEXTS[self]


_REASON_TEXTS = {
    WaitReason.NOTHING: "nothing",
    WaitReason.WINDOW: "its window of requests is used up, or the pace",
    WaitReason.TOKENS: "its window of tokens is used up",
    WaitReason.CONCURRENCY: "all places at once are taken",
    WaitReason.STOPPED: "its traffic target is 0",
    WaitReason.COOLING_DOWN: "it rests after a refusal",
    WaitReason.TOO_MANY_TOKENS: "the call needs more tokens than a whole window allows",
    WaitReason.REBUILDING: "Redis lost its memory, and what was sent before is being found out",
    WaitReason.NO_TARGET: "it has no traffic target yet",
    WaitReason.HALF_OPEN: "it failed again and again, and one call is trying it out",
}

UNAVAILABLE_REASONS = frozenset(
    {WaitReason.COOLING_DOWN, WaitReason.HALF_OPEN}
)  # the model is not trusted now


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
    send_at: float
    expires_at: float
    returned: bool = field(default=False, repr=False)

    @property
    def wait_seconds(self) -> float:
        """Seconds from now until the moment; 0 once it has come."""
        return max(0.0, self.send_at - time.monotonic())

    @property
    def dead(self) -> bool:
        """True once it is too late to send."""
        return time.monotonic() > self.expires_at

    def check(self) -> None:
        """Raise PermitExpired if it is too late to send; to be called immediately before the socket write."""
        late = time.monotonic() - self.expires_at
        if late > 0:
            raise PermitExpired(
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
