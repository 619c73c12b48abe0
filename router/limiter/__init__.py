"""Admits calls to a model: exact rolling windows of requests and tokens, concurrency, circuit breaker."""

from typing import TYPE_CHECKING

from lazy_loader import attach

if TYPE_CHECKING:
    from router.limiter.inspection import read_limiter as read_limiter
    from router.limiter.inspection import seconds_until_applied as seconds_until_applied
    from router.limiter.limiter import TrafficLimiter as TrafficLimiter
    from router.limiter.permit import UNAVAILABLE_REASONS as UNAVAILABLE_REASONS
    from router.limiter.permit import PastCall as PastCall
    from router.limiter.permit import Permit as Permit
    from router.limiter.permit import Wait as Wait
    from router.limiter.permit import WaitReason as WaitReason
    from router.limiter.recovery import History as History
    from router.limiter.script import redis_client as redis_client
    from router.limiter.settings import AFTER_TIMEOUT_SECONDS as AFTER_TIMEOUT_SECONDS
    from router.limiter.settings import LimiterSettings as LimiterSettings
    from router.limiter.settings import Slacks as Slacks
    from router.limiter.snapshot import ModelTraffic as ModelTraffic
else:
    __getattr__, __dir__, __all__ = attach(
        __name__,
        submod_attrs={
            "inspection": ["read_limiter", "seconds_until_applied"],
            "limiter": ["TrafficLimiter"],
            "permit": ["PastCall", "Permit", "UNAVAILABLE_REASONS", "Wait", "WaitReason"],
            "recovery": ["History"],
            "script": ["redis_client"],
            "settings": ["AFTER_TIMEOUT_SECONDS", "LimiterSettings", "Slacks"],
            "snapshot": ["ModelTraffic"],
        },
    )
