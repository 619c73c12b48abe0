"""Background helpers: garbage collection, clean-up that a cancellation does not interrupt."""

from __future__ import annotations

import asyncio
import gc
import sys
from typing import Any

import pytest

from router import background
from router.background import cancel_and_wait, child_process, freeze_garbage_collector, run_to_end


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


SLOW_END = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2), exit()));"


@pytest.mark.parametrize("started", [True, False], ids=["running", "starting"])
async def test_repeated_cancellation_does_not_interrupt_the_end_of_a_child(
    monkeypatch: pytest.MonkeyPatch, started: bool
) -> None:
    monkeypatch.setattr(background, "CANCEL_AGAIN_SECONDS", 0.001)
    children: list[asyncio.subprocess.Process] = []
    start, ready = asyncio.create_subprocess_exec, asyncio.Event()

    async def starting(*command: str, **options: Any) -> asyncio.subprocess.Process:
        children.append(await start(*command, **options))
        return children[0]

    async def supervise() -> None:
        command = f"{SLOW_END} print('ready', flush=True); time.sleep(60)"
        async with child_process(
            sys.executable, "-c", command, terminate_seconds=30.0, stdout=asyncio.subprocess.PIPE
        ) as child:
            assert child.stdout is not None
            await child.stdout.readline()
            ready.set()
            await child.wait()

    monkeypatch.setattr(asyncio, "create_subprocess_exec", starting)
    supervisor = asyncio.create_task(supervise())
    await (ready.wait() if started else asyncio.sleep(0.001))
    await cancel_and_wait(supervisor)
    assert supervisor.cancelled()
    assert [child.returncode is not None for child in children] == [True]


async def test_run_to_end_returns_the_result_and_raises_the_error() -> None:
    async def fail() -> None:
        raise ValueError("failed")

    assert await run_to_end(asyncio.sleep(0, "done"), "work") == "done"
    with pytest.raises(ValueError, match="failed"):
        await run_to_end(fail(), "work")
