"""State of one model as this process knows it from the script's replies."""

from __future__ import annotations

from dataclasses import dataclass, field

from router.background import Broadcast
from router.limiter.codec import MICRO
from router.limiter.permit import WaitReason
from router.traffic import TrafficTarget

FREED_BY_OTHERS = frozenset({WaitReason.CONCURRENCY, WaitReason.HALF_OPEN})  # maybe sooner than predicted
NEVER = float("-inf")


@dataclass(slots=True, eq=False)
class ModelState:
    """Latest state of a model, or of a client with limits, seen by this process.

    Times are in seconds on the limiter's clock.

    A process that saw a higher `generation` or `head` than Redis has detects that Redis lost state; after a
    higher `version` of the target it accepts no older one.
    `clock_offset` is Redis's corrected clock minus the limiter's clock in microseconds, as far as the two are
    known to agree: a lower bound of the time in Redis, whatever Redis's own clock was set to.
    """

    model: str
    key: str  # of the model's hash in Redis
    generation: float = 0.0
    head: float = 0.0
    version: float = 0.0
    target: TrafficTarget | None = None  # of `target_version`, which may be older than `version`
    target_version: float = 0.0
    clock_offset: float | None = None
    failures: float = 0.0
    trips: float = 0.0
    unresolved: float = 0.0  # calls in Redis's rebuilt log of which it does not know whether they were sent
    cooldown_until: float = NEVER
    cooldown_reason: str = ""
    available_at: float | None = None  # when a send looks possible; None if unknown
    available_known_at: float = NEVER
    waiting_for: dict[bool, WaitReason] = field(default_factory=dict)  # of each wait queue's next call
    changes: int = 0
    broadcast: Broadcast = field(default_factory=Broadcast)  # of changes, and of a new `waiting_for`
    client: str | None = None  # of a client's state; `model` describes it then
    followers: set[ModelState] = field(default_factory=set)  # models whose calls wait for the client

    def clock_bound(self, at: float) -> float:
        """Returns the least that Redis's corrected clock can show at `at`; 0 if unknown."""
        return 0.0 if self.clock_offset is None else self.clock_offset + at * MICRO

    def observe_clock(self, clock: float, sent_at: float, received_at: float) -> None:
        """Updates the offset: Redis's corrected clock showed `clock` between these two times."""
        low, high = clock - received_at * MICRO, clock - sent_at * MICRO
        self.clock_offset = low if self.clock_offset is None else min(max(self.clock_offset, low), high)

    def observe_wait(self, again: float | None, reason: float, received_at: float, look_ahead: float) -> None:
        """Records when the next send looks possible, so that no request is made before."""
        if again is None or reason in FREED_BY_OTHERS:
            self.forget_availability()
        elif reason == WaitReason.PRIORITY:  # ask again then: it may be taken
            self.available_at, self.available_known_at = received_at + again, NEVER
        else:
            self.available_at, self.available_known_at = received_at + again - look_ahead, received_at

    def observe_cooldown(self, again: float | None, reason: float, received_at: float) -> None:
        """Records the end of a cool-down."""
        if reason == WaitReason.COOLING_DOWN and again is not None:
            self.cooldown_until = received_at + again

    def forget_availability(self) -> None:
        """Makes the next `wait_until_available` ask Redis."""
        self.available_at, self.available_known_at = None, NEVER

    def changed(self) -> None:
        """Drops predictions made before a change, and wakes everything that waits for the model."""
        self.forget_availability()
        self.changes += 1
        self.broadcast.notify_all()
        for follower in self.followers:
            follower.broadcast.notify_all()
        self.followers.clear()
