"""The limiter's values: a permit with its moment, a refusal with its reason, and its settings. No I/O."""

from __future__ import annotations

import enum
import math
import time
from dataclasses import dataclass, field

from router.errors import PermitDead
from router.limiter.breaker import BreakerSettings
from router.settings.router import RouterConfig
from router.traffic import TrafficTarget

MICRO = 1_000_000
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


FREED_BY_OTHERS = frozenset({WaitReason.AT_ONCE, WaitReason.PROBING})  # sooner than their moment says


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
    breaker: BreakerSettings = field(default_factory=BreakerSettings)

    @classmethod
    def of(cls, config: RouterConfig) -> LimiterSettings:
        """The same for every process of one configuration: whoever sets a target packs them into it."""
        longest = max((model.timeout_seconds for model in config.models.values()), default=180.0)
        traffic = config.traffic
        return cls(
            minute_slacks=Slacks(traffic.minute_send_slack, traffic.minute_transit_slack),
            second_slacks=Slacks(traffic.second_send_slack, traffic.second_transit_slack),
            call_longest_seconds=longest + AFTER_TIMEOUT_SECONDS,
            breaker=BreakerSettings(
                failures_borne=traffic.failures_borne,
                first_rest_seconds=traffic.first_rest_seconds,
                longest_rest_seconds=traffic.longest_rest_seconds,
            ),
        )

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
    those it used, or the reserved ones while that is not known; `open` says that it may still be in flight.
    """

    age_seconds_latest: float
    tokens: int = 0
    open: bool = False


@dataclass(slots=True)
class Seen:
    """What this process has seen of a model: by it a limiter that lost its memory is found out.

    `anchor` is Redis's kept clock minus this process's monotonic clock, as far as both are known to agree:
    it says how late it can be at most in Redis, whatever Redis's own clock was set to. In microseconds.
    """

    generation: float = 0.0
    head: float = 0.0
    version: float = 0.0
    target: TrafficTarget | None = None
    anchor: float | None = None
    failures: float = 0.0
    trip: float = 0.0
    rest_until: float = 0.0  # on the monotonic clock
    rest_reason: str = ""
    near_at: float | None = None  # when a send looks possible, on the monotonic clock; None: nobody knows
    near_known_at: float = 0.0

    def claim(self, left: float) -> float:
        """What Redis's kept clock shows at the soonest when the question leaves at `left`; 0 if unknown."""
        return 0.0 if self.anchor is None else self.anchor + left * MICRO

    def heard(self, now: float, left: float, arrived: float) -> None:
        """A reply says that Redis's kept clock showed `now` between these two moments."""
        low, high = now - arrived * MICRO, now - left * MICRO
        self.anchor = low if self.anchor is None else min(max(self.anchor, low), high)

    def hint(self, again: float | None, reason: float, arrived: float, look_ahead: float) -> None:
        """Keep when the next send looks possible, so that nobody need ask before."""
        if again is None or reason in FREED_BY_OTHERS:
            self.near_at, self.near_known_at = None, 0.0
        else:
            self.near_at, self.near_known_at = arrived + again - look_ahead, arrived
        if reason == WaitReason.RESTING and again is not None:
            self.rest_until = arrived + again


@dataclass(frozen=True, slots=True)
class ModelTraffic:
    """What a model's limiter holds now; counts are by limit, e.g. `{"120/min": 96}`, slacks included.

    `failures` are those in a row; `trip` is how often in a row the breaker opened, 0 if it is closed.
    `refused` counts the 429s since `refused_since_seconds` ago, the last of them `refused_seconds` ago.
    """

    model: str
    target: str | None
    sent: dict[str, int]
    tokens: dict[str, int]
    at_once: int
    next_seconds: float | None
    waiting_for: WaitReason
    resting_seconds: float
    rest_reason: str | None
    failures: int = 0
    trip: int = 0
    refused: int = 0
    refused_since_seconds: float | None = None
    refused_seconds: float | None = None

    @property
    def breaker(self) -> str:
        """`closed`, `open`, or `half-open`: one call at a time is let through to try the model out."""
        if not self.trip:
            return "closed"
        return "open" if self.resting_seconds > 0 else "half-open"

    @property
    def quota_warning(self) -> str | None:
        """What the 429s of the last hour mean; None if there were none."""
        if not self.refused or self.refused_since_seconds is None or self.refused_seconds is None:
            return None
        since, last = _span(self.refused_since_seconds), _span(self.refused_seconds)
        return (
            f"{self.refused:,} of its calls refused (429) in the last {since}, the latest {last} ago: its "
            "traffic target is above what the provider allows; lower it, or have the quota raised."
        )


def _span(seconds: float) -> str:
    """A time for people: `40 s`, `12 min`."""
    return f"{seconds:.0f} s" if seconds < _MINUTES_FROM_SECONDS else f"{seconds / 60:.0f} min"


_MINUTES_FROM_SECONDS = 120
