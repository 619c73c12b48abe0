"""Keeping the garbage collector's pauses short in a program that must not be late.

A full collection looks through every object there is. With Airflow, or a classifier's libraries, it stops
the event loop for 100 ms and more, now and then: no permit lives as long, and answers are late. What is
there when the work begins stays, so later collections need not look at it (`gc.freeze`, see
https://docs.python.org/3/library/gc.html).
"""

from __future__ import annotations

import functools
import gc


@functools.cache
def settle() -> None:
    """Leave all that is there now out of later collections, garbage in cycles included; once a process."""
    gc.freeze()
