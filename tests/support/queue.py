"""Helpers for tests of the queue: a connection that inserts, claims, settles and counts tasks."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg

from router.settings.router import RouterConfig
from router.task import new_call_id

CATEGORIES = ("technical", "creative", "general")

# Expected counters, counted from the tables.
BY_CLIENT = """
SELECT client, sum(unsolved)::bigint AS unsolved, sum(solved)::bigint AS solved,
       sum(failed)::bigint AS failed
  FROM (SELECT client, count(*) AS unsolved, 0 AS solved, 0 AS failed FROM queue GROUP BY 1
        UNION ALL
        SELECT usable_client(client), 0, count(*) FILTER (WHERE status = 'solved'),
               count(*) FILTER (WHERE is_failed(status::text, interactive)) FROM tasks GROUP BY 1) AS parts
 GROUP BY client
"""
COUNTED = """
SELECT category, sum(unsolved)::bigint AS unsolved, sum(solved)::bigint AS solved,
       sum(failed)::bigint AS failed
  FROM (SELECT category, count(*) AS unsolved, 0 AS solved, 0 AS failed FROM queue GROUP BY 1
        UNION ALL
        SELECT resolve_category(category), 0, count(*) FILTER (WHERE status = 'solved'),
               count(*) FILTER (WHERE is_failed(status::text, interactive)) FROM tasks GROUP BY 1) AS parts
 GROUP BY category
"""


def without_classification(config: RouterConfig) -> RouterConfig:
    """The config with `classify_tasks: false`."""
    assert config.classification is not None
    classification = config.classification.model_copy(update={"classify_tasks": False})
    return config.model_copy(update={"classification": classification})


@dataclass(frozen=True)
class Taken:
    """A claimed task, as claim_task returned it."""

    call_id: uuid.UUID
    task_id: int
    prompt: str
    category: str
    prompt_version: int
    attempt: int
    max_tokens: int
    reserved_tokens: int
    client: str = ""


class Probe:
    """One connection to a migrated database."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self.connection = connection

    async def run(self, statement: str, *arguments: Any) -> None:
        await self.connection.execute(statement, *arguments)

    async def value(self, statement: str, *arguments: Any) -> Any:
        return await self.connection.fetchval(statement, *arguments)

    async def row(self, statement: str, *arguments: Any) -> asyncpg.Record:
        found = await self.connection.fetchrow(statement, *arguments)
        assert found is not None, f"no row: {statement}"
        return found

    async def all(self, statement: str, *arguments: Any) -> list[asyncpg.Record]:
        return list(await self.connection.fetch(statement, *arguments))

    async def add(self, prompt: str | None = "a prompt", **columns: Any) -> int:
        """Inserts one task with these columns. Returns its id."""
        names = ["prompt", *columns]
        places = ", ".join(f"${n + 1}" for n in range(len(names)))
        statement = f"INSERT INTO tasks ({', '.join(names)}) VALUES ({places}) RETURNING id"
        return int(await self.value(statement, prompt, *columns.values()))

    async def task(self, task_id: int) -> asyncpg.Record:
        return await self.row("SELECT * FROM tasks WHERE id = $1", task_id)

    async def queued(self, task_id: int) -> asyncpg.Record | None:
        return await self.connection.fetchrow("SELECT * FROM queue WHERE task_id = $1", task_id)

    async def call(self, call_id: uuid.UUID) -> asyncpg.Record:
        return await self.row("SELECT * FROM model_calls WHERE call_id = $1", call_id)

    async def claim(self, *categories: str, worker: str = "w1", model: str = "m1") -> Taken | None:
        """Claims one task of these categories in this order, or of any category."""
        call_id = new_call_id(time.time())
        row = await self.connection.fetchrow(
            "SELECT * FROM claim_task($1, $2, $3, $4)", model, list(categories), worker, call_id
        )
        if row is None:
            return None
        fields = dict(row)
        fields.pop("deadline_at")
        fields.pop("request")
        return Taken(call_id=call_id, **fields)

    async def must_claim(self, *categories: str, worker: str = "w1", model: str = "m1") -> Taken:
        taken = await self.claim(*categories, worker=worker, model=model)
        assert taken is not None, "nothing was ready"
        return taken

    async def settle(
        self, taken: Taken, outcome: str = "answered", answer: str | None = "an answer", **more: Any
    ) -> str:
        if outcome != "answered":
            answer = None
        names = "".join(f", p_{name} => ${n + 4}" for n, name in enumerate(more))
        return str(
            await self.value(
                f"SELECT settle_call($1, $2, $3{names})", taken.call_id, outcome, answer, *more.values()
            )
        )  # fmt: skip

    async def unclaim(self, taken: Taken) -> bool:
        return bool(await self.value("SELECT unclaim($1)", taken.call_id))

    async def fallback_call(self, task_id: int, rank: int, *, version: int | None = None) -> Taken:
        """Logs a call next to the claim, as the fallback does."""
        task = await self.task(task_id)
        call_id = new_call_id(time.time())
        version = task["prompt_version"] if version is None else version
        await self.run(
            "INSERT INTO model_calls (call_id, task_id, prompt_version, model, category, role, rank)"
            " VALUES ($1, $2, $3, $4, 'general', 'fallback', $5)",
            call_id, task_id, version, f"rank-{rank}", rank,
        )  # fmt: skip
        return Taken(call_id, task_id, task["prompt"], "general", version, 0, 0, 0)

    async def wake(self) -> None:
        """Ends the delay of every retry, also for the model that failed it, and promotes them."""
        await self.run(
            "UPDATE queue SET wake_at = clock_timestamp() - interval '1 s',"
            " not_by_until = clock_timestamp() - interval '1 s' WHERE state = 'waiting'"
        )
        await self.run("SELECT promote_waiting()")

    async def lose_lease(self, worker: str = "w1") -> int:
        """Expires this worker's lease and releases its claims. Returns how many."""
        await self.run(
            "UPDATE workers SET lease_until = clock_timestamp() - interval '1 s' WHERE worker = $1", worker
        )
        return int(await self.value("SELECT release_lost_claims()"))

    async def reconcile(self) -> tuple[int, int]:
        """Reconciles all ids. Returns how many queue rows were added and removed."""
        added = removed = 0
        after: int | None = -(2**62)
        while after is not None:
            step = await self.row("SELECT * FROM reconcile($1, 500)", after)
            added, removed, after = added + step["added"], removed + step["removed"], step["next_after"]
        return added, removed

    async def client_counts(self) -> dict[str, tuple[int, int, int]]:
        """Counters by client."""
        return _table(await self.all("SELECT * FROM client_counts_now"))

    async def counts(self) -> dict[str, tuple[int, int, int]]:
        """Returns category -> (unsolved, solved, failed) from the counters, without zeros."""
        return _table(await self.all("SELECT * FROM task_counts_now"))

    async def assert_counts_exact(self) -> None:
        """Asserts that the counters equal the counted tasks before and after compaction."""
        counted = _table(await self.all(COUNTED))
        by_client = _table(await self.all(BY_CLIENT))
        assert (await self.counts(), await self.client_counts()) == (counted, by_client)
        await self.run("SELECT compact_counts()")
        assert await self.value("SELECT count(*) FROM task_count_deltas") == 0
        assert (await self.counts(), await self.client_counts()) == (counted, by_client)

    async def advance_low_watermark(
        self, category: str = "general", priority: int = 0, *, came_back: bool = False
    ) -> None:
        """Runs one step; the second step publishes the candidate if no transaction blocks it."""
        await self.run("SELECT advance_low_watermark($1, $2::smallint, $3)", category, priority, came_back)

    async def low_watermark(
        self, category: str = "general", priority: int = 0, *, came_back: bool = False
    ) -> int:
        return int(
            await self.value("SELECT low_watermark($1, $2::smallint, $3)", category, priority, came_back)
        )


def _table(rows: list[asyncpg.Record]) -> dict[str, tuple[int, int, int]]:
    table = {row[0]: (row["unsolved"], row["solved"], row["failed"]) for row in rows}
    return {name: numbers for name, numbers in table.items() if any(numbers)}


@asynccontextmanager
async def probing(url: str) -> AsyncIterator[Probe]:
    """Opens a Probe on a separate connection."""
    connection = await asyncpg.connect(url)
    try:
        yield Probe(connection)
    finally:
        await connection.close()
