"""Settings of the limiter: slacks and circuit breaker come from the configuration."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from router.limiter import LimiterSettings
from router.limiter.settings import Slacks
from router.settings import InteractiveShare
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


def test_shares_of_a_model_override_those_of_all():
    config = load_config()
    own = config.models["phi-4"].model_copy(update={"interactive": InteractiveShare(reserved=0.1)})
    traffic = TrafficSettings(interactive=InteractiveShare(at_most=0.3))
    models = {**config.models, "phi-4": own}
    settings = LimiterSettings.of(config.model_copy(update={"traffic": traffic, "models": models}))
    assert settings.interactive_share("phi-4") == InteractiveShare(reserved=0.1, at_most=0.3)
    assert settings.interactive_share("gemma-2-27b") == InteractiveShare(at_most=0.3)


@pytest.mark.parametrize("share", [{"reserved": -0.1}, {"reserved": 1}, {"at_most": 0}, {"at_most": 1.1}])
def test_share_that_would_starve_a_class_is_invalid(share: dict[str, float]):
    with pytest.raises(ValidationError):
        InteractiveShare.model_validate(share)


@pytest.mark.parametrize(
    ("line", "reserved", "gap"),
    [
        ("40/min", 0, 60.25 / 40),
        ("40/min", 0.5, 60.25 / 20),
        ("10/s, 300/min", 0, 60.175 / 300),
        ("40/min, burst", 0, 0),
        ("40/min, burst", 0.5, 60.25 / 20),
        ("9k tokens/min, 3 at once", 0.5, 0),
        ("0", 0.5, 0),
    ],
)
def test_batch_calls_are_spread_over_the_padded_window(line: str, reserved: float, gap: float):
    target = TrafficTarget.parse(line)
    share = InteractiveShare(reserved=reserved)
    assert LimiterSettings().batch_gap(target, share) == pytest.approx(gap)
