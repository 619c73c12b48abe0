"""Weighted fair shares: clients with ready tasks in a lane take turns, by weight."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Mapping

import pytest

from router.database import connect
from router.models.roster import sync_roster
from router.settings import load_config
from router.settings.clients import ClientSettings
from tests.support.queue import Probe, probing

pytestmark = pytest.mark.timeout(180)


async def add(
    probe: Probe, tasks: Mapping[str, int], *, category: str = "general", priority: int = 0
) -> None:
    """Inserts this many tasks of each client, one client after the other, and makes the schedules."""
    for client, number in tasks.items():
        await probe.run(
            "INSERT INTO tasks (prompt, category, priority, client)"
            " SELECT 'p', $1, $2, $3 FROM generate_series(1, $4)",
            category, priority, client, number,
        )  # fmt: skip
    await make_schedules(probe)


async def make_schedules(probe: Probe) -> None:
    await probe.run("SELECT setval('fair_shares_due', 1)")
    await probe.run("SELECT make_schedules_if_due()")


async def weigh(probe: Probe, weights: Mapping[str, float]) -> None:
    for client, weight in weights.items():
        await probe.run("INSERT INTO client_weights VALUES ($1, $2::text::numeric)", client, str(weight))


async def claimed(probe: Probe, number: int, **options: str) -> list[str]:
    """Claims so many tasks. Returns their clients in order; fewer if no task is ready."""
    taken = [await probe.claim(**options) for _ in range(number)]
    return [one.client for one in taken if one]


async def test_clients_take_turns_by_weight_whoever_came_first(probe: Probe) -> None:
    await weigh(probe, {"bob": 3})
    await add(probe, {"flood": 2000, "alice": 100, "bob": 300, "": 100})
    assert Counter(await claimed(probe, 300)) == {"flood": 50, "alice": 50, "": 50, "bob": 150}


async def test_turns_are_spread_evenly(probe: Probe) -> None:
    await weigh(probe, {"heavy": 10})
    await add(probe, {"heavy": 200, "light": 200})
    order = await claimed(probe, 110)
    lights = [number for number, client in enumerate(order) if client == "light"]
    assert len(lights) == 10
    assert max(after - before for before, after in itertools.pairwise(lights)) <= 14


@pytest.mark.parametrize(
    "weights", [{"a": 0.5, "b": 1.5}, {"a": 0.001, "b": 0.003}, {"a": 250, "b": 750}], ids=str
)
async def test_weights_may_be_fractions_and_large(probe: Probe, weights: dict[str, float]) -> None:
    await weigh(probe, weights)
    await add(probe, {"a": 200, "b": 200})
    counted = Counter(await claimed(probe, 200))
    assert abs(counted["a"] - 50) <= 1


async def test_no_turn_is_lost_while_any_client_has_work(probe: Probe) -> None:
    await add(probe, {"flood": 50, "alice": 3, "bob": 1})
    assert Counter(await claimed(probe, 60)) == {"flood": 50, "alice": 3, "bob": 1}
    await add(probe, {"carol": 5})  # of whom no schedule knows
    await probe.run("DELETE FROM fair_schedules")
    await add(probe, {"alice": 5})
    assert len(await claimed(probe, 10)) == 10


async def test_a_client_that_no_schedule_has_yet_is_claimed_when_the_others_have_no_task(
    probe: Probe,
) -> None:
    await add(probe, {"alice": 5, "bob": 5})
    await probe.add(client="carol", category="general")
    assert (await claimed(probe, 11))[-1] == "carol"


async def test_idle_time_gives_no_credit(probe: Probe) -> None:
    await add(probe, {"alice": 400, "bob": 1})
    await claimed(probe, 200)
    await add(probe, {"bob": 400})
    assert Counter(await claimed(probe, 100)) == {"alice": 50, "bob": 50}


async def test_priority_holds_before_fairness(probe: Probe) -> None:
    await add(probe, {"flood": 30}, priority=5)
    await add(probe, {"alice": 5})
    assert await claimed(probe, 35) == ["flood"] * 30 + ["alice"] * 5


async def test_one_client_is_served_in_order_without_a_schedule(probe: Probe) -> None:
    await add(probe, {"": 20})
    assert await probe.value("SELECT count(*) FROM fair_schedules") == 0
    taken = [(await probe.must_claim()).task_id for _ in range(20)]
    assert taken == sorted(taken)


async def test_each_client_is_served_in_order(probe: Probe) -> None:
    await add(probe, {"alice": 20, "bob": 20})
    taken = [await probe.must_claim() for _ in range(40)]
    for client in ("alice", "bob"):
        own = [one.task_id for one in taken if one.client == client]
        assert own == sorted(own)


async def test_a_requeued_task_needs_no_second_turn(probe: Probe) -> None:
    await add(probe, {"alice": 10, "bob": 10})
    taken = await probe.must_claim()
    await probe.unclaim(taken)
    assert (await probe.must_claim()).task_id == taken.task_id


async def test_a_change_of_weights_counts_for_queued_tasks(probe: Probe) -> None:
    await add(probe, {"alice": 300, "bob": 300})
    assert Counter(await claimed(probe, 20)) == {"alice": 10, "bob": 10}
    await weigh(probe, {"bob": 4})
    await make_schedules(probe)
    assert Counter(await claimed(probe, 50)) == {"alice": 10, "bob": 40}


async def test_a_client_that_changes_moves_its_task(probe: Probe) -> None:
    await add(probe, {"alice": 300, "bob": 300})
    await probe.run("UPDATE tasks SET client = 'carol' WHERE client = 'alice'")  # more than an edit locks
    while await probe.value("SELECT apply_edits()"):
        pass
    await make_schedules(probe)
    assert Counter(await claimed(probe, 20)) == {"carol": 10, "bob": 10}
    await probe.run("UPDATE tasks SET client = 'dave' WHERE client = 'bob' AND id % 2 = 0")
    await probe.assert_counts_exact()


# Clients to pass over.


async def test_clients_to_skip_are_passed_over_in_every_place(probe: Probe) -> None:
    await add(probe, {"limited": 2000, "alice": 5, "bob": 5})
    for _ in range(3):  # one that came back, one for another model, one that is long
        await probe.must_claim()
    ids = [row["task_id"] for row in await probe.all("SELECT task_id FROM queue WHERE state = 'claimed'")]
    await probe.run("UPDATE tasks SET client = 'limited' WHERE id = ANY ($1)", ids)
    free = "call_id = NULL, worker = NULL, claimed_at = NULL"
    await probe.run(
        f"UPDATE queue SET state = 'ready', position = requeue_position(), {free} WHERE task_id = $1", ids[0]
    )
    await probe.run(f"UPDATE queue SET state = 'ready', not_by = '{{m2}}', {free} WHERE task_id = $1", ids[1])
    await probe.run(f"UPDATE queue SET state = 'long', {free} WHERE task_id = $1", ids[2])
    taken = []
    while (one := await _claim_skipping(probe, ["limited"])) is not None:
        taken.append(one)
    assert "limited" not in taken
    assert len(taken) >= 7, "all tasks of the others"
    assert await _claim_skipping(probe, []) == "limited"


async def test_a_lane_of_one_client_can_be_skipped(probe: Probe) -> None:
    await add(probe, {"limited": 20})
    assert await _claim_skipping(probe, ["limited"]) is None
    assert await _claim_skipping(probe, ["another"]) == "limited"


async def test_most_clients_can_be_skipped(probe: Probe) -> None:
    await add(probe, {f"c{number}": 3 for number in range(150)})
    skipped = [f"c{number}" for number in range(148)]
    assert Counter([await _claim_skipping(probe, skipped) for _ in range(7)]) == {
        "c148": 3,
        "c149": 3,
        None: 1,
    }


async def _claim_skipping(probe: Probe, clients: list[str]) -> str | None:
    return await probe.value(
        "SELECT client FROM claim_task('m1', '{general}', 'w1', uuidv7(), p_skip_clients => $1)", clients
    )


# Under load.


async def test_claims_of_many_sessions_share_by_weight_without_a_deadlock(
    probe: Probe, database: str
) -> None:
    await weigh(probe, {"heavy": 3})
    await add(probe, {"heavy": 700, "light": 700, "flood": 3000})

    async def session() -> list[str]:
        async with probing(database) as own:
            found = []
            for number in range(125):
                taken = await own.must_claim()
                found.append(taken.client)
                if number % 3 == 0:
                    await own.settle(taken)
            return found

    async def maintenance() -> None:
        async with probing(database) as own:
            for _ in range(30):
                await make_schedules(own)
                await own.run("SELECT compact_counts()")

    *found, _ = await asyncio.gather(*(session() for _ in range(8)), maintenance())
    counted = Counter(client for one in found for client in one)
    assert sum(counted.values()) == 1000
    assert abs(counted["heavy"] - 600) <= 30, counted
    assert abs(counted["light"] - 200) <= 10, counted
    await probe.assert_counts_exact()


async def test_locked_rows_of_one_client_stop_no_other(probe: Probe, database: str) -> None:
    await add(probe, {"alice": 400, "bob": 20})
    async with probing(database) as person:
        await person.run("BEGIN")
        await person.run("SELECT FROM queue WHERE client = 'alice' FOR UPDATE")
        assert Counter(await claimed(probe, 20)) == {"bob": 20}
        await person.run("ROLLBACK")
    assert len(await claimed(probe, 20)) == 20


async def test_locked_rows_of_many_clients_stop_no_other(probe: Probe, database: str) -> None:
    await add(probe, {f"c{number:02}": 3 for number in range(12)})
    async with probing(database) as person:
        await person.run("BEGIN")
        await person.run("SELECT FROM queue WHERE client NOT IN ('c04', 'c09') FOR UPDATE")
        assert Counter(await claimed(probe, 7)) == {"c04": 3, "c09": 3}
        await person.run("ROLLBACK")


async def test_an_edit_of_the_first_tasks_leaves_their_client_its_turns(probe: Probe, database: str) -> None:
    await add(probe, {"alice": 400, "bob": 400})
    async with probing(database) as person:
        await person.run("BEGIN")
        await person.run(
            "UPDATE tasks SET priority = 1"
            " WHERE id IN (SELECT id FROM tasks WHERE client = 'alice' ORDER BY id LIMIT 200)"
        )
        assert Counter(await claimed(probe, 20)) == {"alice": 10, "bob": 10}
        await person.run("ROLLBACK")


async def test_more_clients_than_a_schedule_holds_are_scheduled_in_turn(probe: Probe) -> None:
    await add(probe, {f"c{number:02}": 4 for number in range(10)})
    await probe.run("DELETE FROM fair_schedules")
    served: Counter[str] = Counter()
    for _ in range(5):
        await probe.run("SELECT make_schedule('general', 0::smallint, 4)")
        served.update(await claimed(probe, 4))
    assert set(served.values()) == {2}, served


async def test_schedules_are_made_by_claims_where_no_worker_makes_them(probe: Probe) -> None:
    await add(probe, {"alice": 900})
    await probe.run(
        "INSERT INTO tasks (prompt, category, client)"
        " SELECT 'p', 'general', 'bob' FROM generate_series(1, 900)"
    )
    await probe.run("SELECT setval('fair_shares_due', 1)")
    assert "bob" in await claimed(probe, 880)


async def test_weights_come_from_the_config(database: str) -> None:

    named = {
        "default": ClientSettings(weight=2),
        "alice": ClientSettings(weight=0.5),
        "bob": ClientSettings(),
    }
    with connect(database) as connection:
        sync_roster(connection, load_config().model_copy(update={"clients": named}))
    async with probing(database) as probe:
        found = await probe.all("SELECT client, weight::float8 AS weight FROM client_weights ORDER BY client")
        assert [tuple(row) for row in found] == [("alice", 0.5), ("bob", 2.0), ("default", 2.0)]
        assert await probe.value("SELECT client_weight FROM queue_settings") == 2
    with connect(database) as connection:
        sync_roster(connection, load_config())
    async with probing(database) as probe:
        assert await probe.value("SELECT count(*) FROM client_weights WHERE client <> 'default'") == 0


async def _pages_of_a_claim(probe: Probe) -> int:
    """Pages that a claim reads: a measure of its cost without a clock. The median of five."""
    statement = "EXPLAIN (ANALYZE, BUFFERS) SELECT * FROM claim_task('m1', '{general}', 'w1', uuidv7())"
    pages = []
    for _ in range(5):
        lines = await probe.all(statement)
        hits = [part for row in lines for part in row[0].split() if part.startswith("hit=")]
        pages.append(int(hits[0].removeprefix("hit=")))
    return sorted(pages)[2]


async def test_claims_by_turn_stay_cheap_while_a_snapshot_is_held(probe: Probe, database: str) -> None:
    await add(probe, {"alice": 6000, "bob": 6000, "flood": 20_000})
    fresh = await _pages_of_a_claim(probe)
    async with probing(database) as reader, reader.connection.transaction(isolation="repeatable_read"):
        await reader.value("SELECT count(*) FROM queue")
        await probe.run(
            """CREATE OR REPLACE PROCEDURE drain(n integer) LANGUAGE plpgsql AS $$
            DECLARE id uuid;
            BEGIN
                FOR i IN 1..n LOOP
                    id := uuidv7();
                    PERFORM claim_task('m', '{general}', 'w1', id);
                    PERFORM settle_call(id, 'answered', 'a');
                    COMMIT;
                END LOOP;
            END $$"""
        )
        await probe.run("CALL drain(9000)")
        await make_schedules(probe)
        assert await _pages_of_a_claim(probe) < fresh + 60, "claims scan dead entries"


async def test_a_claim_costs_as_much_with_many_clients(probe: Probe) -> None:
    await add(probe, {"alice": 100, "bob": 100})
    await claimed(probe, 20)
    few = await _pages_of_a_claim(probe)
    await probe.run(
        "INSERT INTO tasks (prompt, category, client)"
        " SELECT 'p', 'general', 'c' || n FROM generate_series(1, 1000) AS n, generate_series(1, 5)"
    )
    await add(probe, {"flood": 20_000})
    await probe.run("VACUUM ANALYZE")
    assert await _pages_of_a_claim(probe) <= few + 15
