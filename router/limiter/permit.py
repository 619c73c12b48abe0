"""Values of the limiter: permit, wait and its reason, past call. No I/O."""

from __future__ import annotations

import enum
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from router.errors import PermitExpired

Clock = Callable[[], float]  # monotonic seconds


class WaitReason(enum.IntEnum):
    """Limit that a model's next send waits for; the numbers are those of `limiter.lua`."""

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
    UNAVAILABLE = 10
    PRIORITY = 11
    BUDGET = 12
    TOO_EXPENSIVE = 13
    CLIENT = (
        14  # a limit of the client; in the script only: a Wait has the reason itself, and names the client
    )

    @property
    def text(self) -> str:
        return _REASON_TEXTS[self]


_REASON_TEXTS = {
    WaitReason.NOTHING: "nothing",
    WaitReason.WINDOW: "request window used up, or paced",
    WaitReason.TOKENS: "token window used up",
    WaitReason.CONCURRENCY: "concurrency limit reached",
    WaitReason.STOPPED: "traffic target is 0",
    WaitReason.COOLING_DOWN: "cooling down after a 429 or 503, or repeated failures",
    WaitReason.TOO_MANY_TOKENS: "the call needs more tokens than a whole window allows",
    WaitReason.REBUILDING: "rebuilding rate-limit state after a Redis restart",
    WaitReason.NO_TARGET: "no traffic target set",
    WaitReason.HALF_OPEN: "circuit half-open: one probe in flight",
    WaitReason.UNAVAILABLE: "Redis is unavailable",
    WaitReason.PRIORITY: "the next send is kept: interactive requests go first, up to their share",
    WaitReason.BUDGET: "budget used up",
    WaitReason.TOO_EXPENSIVE: "the call may cost more than the whole budget",
    WaitReason.CLIENT: "a limit of the client is used up",
}

NEVER_FITS = frozenset({WaitReason.TOO_MANY_TOKENS, WaitReason.TOO_EXPENSIVE})
UNAVAILABLE_REASONS = frozenset({WaitReason.COOLING_DOWN, WaitReason.HALF_OPEN})  # the model itself failed


class ClientSend(NamedTuple):
    """The send in the log of the client's limits: `number` in its `generation` of the state with this key."""

    key: str
    generation: int
    number: int


@dataclass(slots=True, eq=False)
class Permit:
    """Permission to send one call between `send_at` and `expires_at`, both on `clock`.

    `send_at` counts from the arrival of Redis's reply and `expires_at` from when the request left, so that a
    slow reply makes no send early and none late. `number` is the send's in its `generation` of the log.
    `call_id` identifies the call in the call log. `client_send` is that of a client with limits.
    """

    model: str
    tokens: int
    cost: int  # millionths of a US dollar
    number: int
    generation: int
    send_at: float
    expires_at: float
    clock: Clock = field(default=time.monotonic, repr=False)
    returned: bool = field(default=False, repr=False)
    call_id: uuid.UUID | None = field(default=None, repr=False)
    client_send: ClientSend | None = field(default=None, repr=False)

    @property
    def wait_seconds(self) -> float:
        """Seconds until `send_at`; 0 once it has passed."""
        return max(0.0, self.send_at - self.clock())

    @property
    def expired(self) -> bool:
        """True once it is too late to send."""
        return self.clock() > self.expires_at

    def check(self) -> None:
        """Raises PermitExpired if it is too late to send. Call it immediately before the socket write."""
        late = self.clock() - self.expires_at
        if late > 0:
            raise PermitExpired(
                f"The permit of {self.model} expired {late * 1000:.0f} ms ago: reserve another one."
            )


@dataclass(frozen=True, slots=True)
class Wait:
    """Denied reservation, which is false: its reason, and the seconds until the next try makes sense.

    `again_seconds` is None if only a change can help, e.g. of a target of 0. `client` is set if the limit is
    one of the client. A permit may be granted up to
    `ahead_seconds` before that.
    """

    model: str
    reason: WaitReason
    again_seconds: float | None
    ahead_seconds: float = 0.0
    client: str | None = None

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class PastCall:
    """A call of the call log, from which a model's windows are rebuilt.

    `age_seconds_latest` is the age of the send, assuming the latest time it can have had. `tokens` are those
    used, or the reserved ones while the usage is unknown; so is `cost`, in millionths of a US dollar. An
    `open` call may still be in flight; by `call_id` its slot is freed when it ends, or if it was never sent.
    """

    age_seconds_latest: float
    tokens: int = 0
    open: bool = False
    call_id: uuid.UUID | None = None
    cost: int = 0


@dataclass(frozen=True, slots=True)
class CallEnd:
    """End of a call in the call log: `tokens` used and `cost` (None: unknown), or never `sent`."""

    call_id: uuid.UUID
    tokens: int | None = None
    sent: bool = True
    cost: int | None = None
