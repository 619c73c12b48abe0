"""Waits for conditions."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(condition: Callable[[], object], seconds: float = 30.0) -> float:
    """Waits until the condition is true and returns the seconds it took. Fails after `seconds`."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"not true within {seconds:g} s"
        time.sleep(0.02)
    return time.monotonic() - started
