"""The limiter's values: a permit with its moment, a refusal with its reason, and its settings. No I/O."""

from __future__ import annotations

import enum
import math
import time
from dataclasses import dataclass, field

from router.errors import PermitDead
from router.settings import RouterConfig
from router.traffic import TrafficTarget

AFTER_TIMEOUT_SECONDS = 10.0  # the backend may work on for a little when the caller has given up


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
}


@dataclass(frozen=True, slots=True)
class Slacks:
    """Seconds that a send may be late: at the socket (`send`), and on the way to the backend (`transit`)."""

    send: float
    transit: float


@dataclass(frozen=True, slots=True)
class LimiterSettings:
    """How the limiter behaves. All times in seconds.

    Slacks are given for windows of a second and of a minute; in between they grow with the logarithm of the
    window, beyond a minute they stay. `call_longest_seconds` is how long a call may go on at the backend when
    nobody reports its end. `ask_again_seconds` is the net under a wake-up that Redis could not deliver.
    """

    look_ahead_seconds: float = 0.25
    minute_slacks: Slacks = Slacks(send=0.100, transit=0.150)
    second_slacks: Slacks = Slacks(send=0.025, transit=0.035)
    call_longest_seconds: float = 190.0
    ask_again_seconds: float = 2.0
    hint_seconds: float = 1.0
    retry_base_seconds: float = 0.05
    retry_cap_seconds: float = 1.0
    most_in_one_ask: int = 250

    @classmethod
    def of(cls, config: RouterConfig) -> LimiterSettings:
        """The same for every process of one configuration: whoever sets a target packs them into it."""
        longest = max((model.timeout_seconds for model in config.models.values()), default=180.0)
        return cls(call_longest_seconds=longest + AFTER_TIMEOUT_SECONDS)

    def slacks(self, window_seconds: float) -> Slacks:
        """The slacks of a window of this length."""
        share = min(1.0, max(0.0, math.log(max(window_seconds, 1.0)) / math.log(60.0)))
        low, high = self.second_slacks, self.minute_slacks
        return Slacks(
            send=low.send + share * (high.send - low.send),
            transit=low.transit + share * (high.transit - low.transit),
        )

    def send_slack(self, target: TrafficTarget) -> float:
        """How long after its moment a permit may still be used: the slack of the target's shortest window."""
        windows = [limit.window_seconds for limit in (*target.requests, *target.tokens)]
        return min((self.slacks(window).send for window in windows), default=self.minute_slacks.send)


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
    the reserved ones where its use is not known; `open` says that it may still be in flight.
    """

    age_seconds_latest: float
    tokens: int = 0
    open: bool = False


@dataclass(frozen=True, slots=True)
class ModelTraffic:
    """What a model's limiter holds now; counts are by limit, e.g. `{"120/min": 96}`, slacks included."""

    model: str
    target: str | None
    sent: dict[str, int]
    tokens: dict[str, int]
    at_once: int
    next_seconds: float | None
    waiting_for: WaitReason
    resting_seconds: float
    rest_reason: str | None
