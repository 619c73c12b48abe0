"""Settings of the limiter: slacks and circuit breaker come from the configuration."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from router.limiter import LimiterSettings
from router.limiter.settings import Slacks
from router.settings.router import TrafficSettings, load_config
from router.traffic import TrafficTarget


def test_limiter_uses_the_configured_values():
    traffic = TrafficSettings(
        second_send_slack=0.05, second_transit_slack=0.1, minute_send_slack=0.2, minute_transit_slack=2.0,
        failure_threshold=7, initial_cooldown_seconds=3, max_cooldown_seconds=30,
    )  # fmt: skip
    settings = LimiterSettings.of(load_config().model_copy(update={"traffic": traffic}))
    assert settings.slacks(1) == Slacks(0.05, 0.1)
    assert settings.slacks(3600) == Slacks(0.2, 2.0)
    assert settings.send_slack(TrafficTarget.parse("9/s, 100/min")) == 0.05
    breaker = settings.breaker
    assert (breaker.failure_threshold, breaker.initial_cooldown_seconds, breaker.max_cooldown_seconds) == (
        7,
        3,
        30,
    )


def test_shipped_configuration_equals_the_defaults():
    assert LimiterSettings.of(load_config()).slacks(60) == LimiterSettings().slacks(60)


def test_slack_of_a_minute_is_not_less_than_of_a_second():
    with pytest.raises(ValidationError, match="minute_send_slack must not be less"):
        TrafficSettings(second_send_slack=0.3)
