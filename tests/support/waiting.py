"""Waiting for a condition instead of sleeping."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(condition: Callable[[], object], seconds: float = 30.0) -> float:
    """Wait until the condition holds; the seconds it took. AssertionError if it does not in time."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"not so within {seconds:g} s"
        time.sleep(0.02)
    return time.monotonic() - started
