"""Settings of the limiter: slacks, look-ahead, retries and the circuit breaker."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from router.limiter.breaker import BreakerSettings
from router.settings import RouterConfig
from router.traffic import TrafficTarget

MICRO = 1_000_000
AFTER_TIMEOUT_SECONDS = 10.0  # the backend may work on for a little when the caller has given up


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
                failure_threshold=traffic.failure_threshold,
                initial_cooldown_seconds=traffic.initial_cooldown_seconds,
                max_cooldown_seconds=traffic.max_cooldown_seconds,
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
