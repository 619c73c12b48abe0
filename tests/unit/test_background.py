"""Objects that exist when the work begins are excluded from later garbage collections."""

from __future__ import annotations

import gc

from router.background import freeze_garbage_collector


def test_existing_objects_are_excluded_from_later_collections() -> None:
    freeze_garbage_collector.cache_clear()
    before = [[number] for number in range(10_000)]
    freeze_garbage_collector()
    try:
        assert gc.get_freeze_count() >= len(before)
        later = [[number] for number in range(10)]
        tracked = len(gc.get_objects())
        freeze_garbage_collector()
        assert len(gc.get_objects()) >= tracked, "only the first call freezes"
        assert later
    finally:
        gc.unfreeze()
