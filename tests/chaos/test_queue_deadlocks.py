"""Concurrent operations of every kind on few tasks: no deadlock, and exact counters."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable

import asyncpg

from tests.support.queue import Probe, probing

SECONDS = 6.0

Operation = Callable[[Probe, random.Random], Awaitable[object]]


async def _produce(p: Probe, dice: random.Random) -> None:
    async with p.connection.transaction():
        for _ in range(dice.randint(1, 3)):
            await p.add(category=dice.choice(["technical", "creative", None]), priority=dice.randint(-2, 2))


async def _claim_and_end(p: Probe, dice: random.Random) -> None:
    taken = await p.claim(worker=f"w{dice.randint(0, 3)}")
    if taken is None:
        return
    end = dice.random()
    if end < 0.3:
        await p.unclaim(taken)
    elif end < 0.7:
        await p.settle(taken, dice.choice(["error", "timeout"]))
    elif end < 0.9:
        await p.settle(taken)


_ANY = "(SELECT id FROM tasks ORDER BY random() LIMIT 1)"


async def _one_row(p: Probe, dice: random.Random) -> None:
    change = dice.choice(["status = 'unsolved'", "prompt = prompt || 'x'", "priority = 1 - priority",
                          "category = 'technical'", "status = 'solved'", "status = 'failed'"])  # fmt: skip
    await p.run(f"UPDATE tasks SET {change} WHERE id = {_ANY}")


async def _many_rows(p: Probe, dice: random.Random) -> None:
    # Locked in order of id, because two such statements may otherwise deadlock with each other.
    rows = "(SELECT id FROM tasks ORDER BY id FOR UPDATE)"
    operation = dice.choice(
        [
            "UPDATE tasks SET status = 'unsolved'",
            "UPDATE tasks SET prompt = 'y', category = 'creative'",
            "DELETE FROM tasks",
        ]
    )
    await p.run(f"{operation} WHERE id = ANY (ARRAY{rows})")


async def _truncate(p: Probe, dice: random.Random) -> None:
    if dice.random() < 0.2:
        await p.run("TRUNCATE tasks")
    await asyncio.sleep(0.02)


async def _house(p: Probe, dice: random.Random) -> None:
    await p.run("UPDATE queue SET wake_at = clock_timestamp() WHERE task_id IN (SELECT task_id FROM queue"
                " WHERE state = 'waiting' FOR UPDATE SKIP LOCKED)")  # fmt: skip
    await p.run("SELECT promote_waiting()")
    await p.run("SELECT compact_counts()")
    await p.run("SELECT * FROM task_counts_now")


async def _lose(p: Probe, dice: random.Random) -> None:
    await p.run(
        "UPDATE workers SET lease_until = clock_timestamp() - interval '1 s' WHERE worker = $1",
        f"w{dice.randint(0, 3)}",
    )
    await p.run("SELECT release_lost_claims()")
    await p.run("DELETE FROM workers WHERE released_at IS NOT NULL")


async def _reconcile(p: Probe, dice: random.Random) -> None:
    await p.reconcile()
    await p.run("SELECT make_call_partitions($1)", dice.randint(7, 20))
    if dice.random() < 0.3:
        await p.run("SELECT recount_tasks()")


OPERATIONS: tuple[Operation, ...] = (
    _produce, _produce, _claim_and_end, _claim_and_end, _claim_and_end, _one_row, _one_row, _many_rows,
    _truncate, _house, _lose, _reconcile,
)  # fmt: skip


async def _error_of(operation: Awaitable[object]) -> str | None:
    try:
        await operation
    except asyncpg.PostgresError as error:
        # The lease is expired by _lose of another connection; a lock timeout is retried by workers.
        return None if error.sqlstate in {"RT001", "55P03"} else f"{error!r} {error.as_dict().get('detail')}"
    return None


async def test_concurrent_operations_never_deadlock(probe: Probe, database: str) -> None:
    done: Counter[str] = Counter()
    errors: list[str] = []
    until = time.monotonic() + SECONDS

    async def go(operation: Operation, seed: int) -> None:
        dice = random.Random(seed)
        async with probing(database) as p:
            await p.run("SET deadlock_timeout = '50ms'")
            while time.monotonic() < until and not errors:
                error = await _error_of(operation(p, dice))
                done[operation.__name__] += 1
                if error is not None:
                    errors.append(f"{operation.__name__}: {error}")

    await asyncio.wait_for(
        asyncio.gather(*(go(operation, n) for n, operation in enumerate(OPERATIONS))), SECONDS + 60
    )
    assert not errors, "\n".join(errors)
    assert all(done[operation.__name__] > 5 for operation in OPERATIONS), done
    await probe.assert_counts_exact()
    assert await probe.reconcile() == (0, 0), "queue and tasks differ"
