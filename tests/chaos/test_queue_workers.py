"""Worker processes on one queue, some of them killed: every task is solved and recorded once."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.support.queue import Probe, Taken, probing

PROCESSES = 16
TASKS = 5000
KILLS = 12
LEASE_SECONDS = 1.0


def _work(url: str, name: str, seed: int, log: Path) -> None:
    asyncio.run(_solve_forever(url, name, random.Random(seed), log))


async def _solve_forever(url: str, name: str, dice: random.Random, log: Path) -> None:
    """Claims tasks, logs each claim, and solves, solves twice, fails or releases it."""
    async with probing(url) as queue, probing(url) as maintenance:
        await queue.run("SELECT heartbeat($1)", name)
        beating = asyncio.create_task(_maintain(maintenance, name), name="maintenance")
        with log.open("a", buffering=1) as notes:
            while True:
                taken = await queue.claim(worker=name, model=name)
                if taken is None:
                    await asyncio.sleep(0.02)
                    continue
                notes.write(f"{taken.task_id} {taken.call_id}\n")
                await _end(queue, taken, dice)
                assert not beating.done(), beating.exception()


async def _end(queue: Probe, taken: Taken, dice: random.Random) -> None:
    chance = dice.random()
    if chance < 0.1:
        await queue.unclaim(taken)
    elif chance < 0.2:
        await queue.settle(taken, "error", error="chaos")
    else:
        await queue.settle(taken, answer=str(taken.call_id))
        if chance < 0.25:
            await queue.settle(taken, answer="sent twice")


async def _maintain(maintenance: Probe, name: str) -> None:
    while True:
        await maintenance.run("SELECT heartbeat($1)", name)
        await maintenance.run("SELECT promote_waiting()")
        await maintenance.run("SELECT release_lost_claims()")
        await maintenance.run("SELECT compact_counts()")
        await asyncio.sleep(0.2)


@pytest.mark.timeout(120)
async def test_killed_workers_lose_no_task_and_record_no_answer_twice(
    probe: Probe, database: str, tmp_path: Path
) -> None:
    await probe.run(
        "UPDATE queue_settings SET max_attempts = 50, retry_base_seconds = 0.05, retry_cap_seconds = 0.2,"
        " another_model_seconds = 0.2,"
        " lease_seconds = $1",
        LEASE_SECONDS,
    )
    await probe.run(
        f"INSERT INTO tasks (prompt, priority) SELECT 'p', n % 3 FROM generate_series(1, {TASKS}) AS n"
    )
    dice = random.Random(11)
    context = multiprocessing.get_context("spawn")
    numbers = iter(range(1000))
    processes: list[BaseProcess] = []

    def start() -> None:
        n = next(numbers)
        process = context.Process(target=_work, args=(database, f"w{n}", n, tmp_path / f"w{n}.log"))
        process.start()
        processes.append(process)

    try:
        for _ in range(PROCESSES):
            start()
        killed = 0
        deadline = time.monotonic() + 80
        while (left := await probe.value("SELECT count(*) FROM tasks WHERE status <> 'solved'")) > 0:
            assert time.monotonic() < deadline, f"{left} tasks are left"
            await asyncio.sleep(0.15)
            alive = [process for process in processes if process.is_alive()]
            if killed < KILLS and left < TASKS * (1 - killed / (KILLS + 4)):
                victim = dice.choice(alive)
                assert victim.pid is not None
                os.kill(victim.pid, signal.SIGKILL)
                killed += 1
                start()
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()

    assert killed >= 3
    await _assert_each_task_was_solved_once(probe)
    _assert_claims_are_unique(tmp_path)


async def _assert_each_task_was_solved_once(probe: Probe) -> None:
    assert (
        await probe.value("SELECT count(*) FROM tasks WHERE status = 'solved' AND answer_rank = 3") == TASKS
    )
    assert await probe.value("SELECT count(*) FROM queue") == 0
    solving = await probe.all(
        "SELECT task_id, count(*) AS n FROM model_calls WHERE settlement = 'solved' GROUP BY 1"
    )
    assert len(solving) == TASKS
    assert {row["n"] for row in solving} == {1}, "a task was recorded twice"
    assert await probe.value("SELECT count(*) FROM tasks WHERE answer <> answer_call_id::text") == 0
    await probe.assert_counts_exact()


def _assert_claims_are_unique(folder: Path) -> None:
    notes = Counter(
        line.split()[1]
        for log in folder.glob("*.log")
        for line in log.read_text().splitlines()
        if " " in line
    )
    assert len(notes) > TASKS
    assert set(notes.values()) == {1}
