"""Settings of the limiter: slacks, look-ahead, retries and the circuit breaker."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from router.limiter.breaker import BreakerSettings
from router.settings import InteractiveShare, RouterConfig
from router.traffic import TrafficTarget

AFTER_TIMEOUT_SECONDS = 10.0  # the backend may keep working for a while after the client's timeout


@dataclass(frozen=True, slots=True)
class Slacks:
    """Seconds that a send may be late: at the socket (`send`), and on the way to the backend (`transit`)."""

    send: float
    transit: float


@dataclass(frozen=True, slots=True)
class LimiterSettings:
    """Behavior of the limiter. All times in seconds.

    Slacks are given for windows of a second and of a minute. Between the two they grow with the logarithm of
    the window; beyond a minute they are constant. `max_call_seconds` is how long a call may run at the
    backend if its end is never reported. `fallback_poll_seconds` bounds the delay of a notification that
    Redis could not deliver. With `free_broken_slots`, the slot of a call whose connection broke is free at
    once.
    """

    look_ahead_seconds: float = 0.25
    minute_slacks: Slacks = Slacks(send=0.100, transit=0.150)
    second_slacks: Slacks = Slacks(send=0.025, transit=0.035)
    max_call_seconds: float = 190.0
    fallback_poll_seconds: float = 2.0
    hint_seconds: float = 1.0
    retry_base_seconds: float = 0.05
    retry_cap_seconds: float = 1.0
    max_permits_per_request: int = 250
    free_broken_slots: bool = False
    interactive: InteractiveShare = field(default_factory=InteractiveShare)
    interactive_of: Mapping[str, InteractiveShare] = field(default_factory=dict)  # model -> its own
    breaker: BreakerSettings = field(default_factory=BreakerSettings)

    @classmethod
    def of(cls, config: RouterConfig) -> LimiterSettings:
        """Returns the settings of a configuration.

        All processes need the same ones: a target is stored with the slacks of the process that sets it.
        """
        longest = max((model.timeout_seconds for model in config.models.values()), default=180.0)
        traffic = config.traffic
        return cls(
            minute_slacks=Slacks(traffic.minute_send_slack, traffic.minute_transit_slack),
            second_slacks=Slacks(traffic.second_send_slack, traffic.second_transit_slack),
            max_call_seconds=longest + AFTER_TIMEOUT_SECONDS,
            free_broken_slots=traffic.free_broken_slots,
            interactive=traffic.interactive,
            interactive_of={
                name: traffic.interactive.model_copy(update=model.interactive.model_dump(exclude_unset=True))
                for name, model in config.models.items()
                if model.interactive is not None
            },
            breaker=BreakerSettings(
                failure_threshold=traffic.failure_threshold,
                initial_cooldown_seconds=traffic.initial_cooldown_seconds,
                max_cooldown_seconds=traffic.max_cooldown_seconds,
            ),
        )

    def slacks(self, window_seconds: float) -> Slacks:
        """Returns the slacks of a window."""
        share = min(1.0, max(0.0, math.log(max(window_seconds, 1.0)) / math.log(60.0)))
        low, high = self.second_slacks, self.minute_slacks
        return Slacks(
            send=low.send + share * (high.send - low.send),
            transit=low.transit + share * (high.transit - low.transit),
        )

    def send_slack(self, target: TrafficTarget) -> float:
        """Returns how long after its send time a permit is valid: the slack of the shortest window."""
        windows = [limit.window_seconds for limit in target.windows]
        return min((self.slacks(window).send for window in windows), default=self.minute_slacks.send)

    def interactive_share(self, model: str) -> InteractiveShare:
        """Returns what interactive requests may have of a model's rate."""
        return self.interactive_of.get(model, self.interactive)

    def batch_gap(self, target: TrafficTarget, share: InteractiveShare) -> float:
        """Returns the seconds between batch calls that are spread evenly over the padded windows.

        They are paced so while somebody asks, and always if a share is reserved. 0 if they are not.
        """
        if target.burst and not share.reserved:
            return 0.0
        send = self.send_slack(target)
        gaps = (
            (limit.window_seconds + send + self.slacks(limit.window_seconds).transit) / limit.count
            for limit in target.requests
            if limit.count
        )
        return max(gaps, default=0.0) / (1 - share.reserved)
