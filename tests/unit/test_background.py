"""What is there when the work begins is left out of later garbage collections."""

from __future__ import annotations

import gc

from router.background import freeze_garbage_collector


def test_a_full_collection_looks_only_at_what_came_later() -> None:
    freeze_garbage_collector.cache_clear()
    before = [[number] for number in range(10_000)]
    freeze_garbage_collector()
    try:
        assert gc.get_freeze_count() >= len(before)
        later = [[number] for number in range(10)]
        looked_at = len(gc.get_objects())
        freeze_garbage_collector()
        assert len(gc.get_objects()) >= looked_at, "it is done once: a second time nothing is left out"
        assert later
    finally:
        gc.unfreeze()
