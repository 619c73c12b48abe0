"""Daily partitions of the call log, and calls without a partition of their day."""

from __future__ import annotations

import asyncio
import datetime as dt
import random
import time
import uuid

import pytest

from router.task import new_call_id
from tests.support.queue import Probe, Taken, probing

UTC = dt.timezone.utc
DAY_SECONDS = 86_400


def _partition(at_seconds: float) -> str:
    return f"model_calls_{dt.datetime.fromtimestamp(at_seconds, UTC):%Y%m%d}"


async def _partitions(probe: Probe) -> set[str]:
    return {
        row["name"]
        for row in await probe.all(
            "SELECT inhrelid::regclass::text AS name FROM pg_inherits"
            " WHERE inhparent = 'model_calls'::regclass"
        )
    }


async def _claim_at(probe: Probe, at_seconds: float) -> Taken:
    """Claims under a call_id of that time."""
    await probe.add()
    call_id = new_call_id(at_seconds)
    row = await probe.row("SELECT * FROM claim_task('m', '{}', 'w1', $1)", call_id)
    return Taken(call_id, row["task_id"], row["prompt"], row["category"], row["prompt_version"], 1, 512, 0)


async def _home(probe: Probe, call_id: uuid.UUID) -> str:
    return str(
        await probe.value("SELECT tableoid::regclass::text FROM model_calls WHERE call_id = $1", call_id)
    )


async def test_partitions_exist_a_week_ahead(probe: Probe) -> None:
    now = time.time()
    expected = {_partition(now + day * DAY_SECONDS) for day in range(-2, 8)} | {"model_calls_other"}
    assert await _partitions(probe) == expected
    assert await probe.value("SELECT make_call_partitions()") == 0, "made once"
    assert await probe.value("SELECT make_call_partitions(9)") == 2


async def test_a_call_lands_in_the_partition_of_its_day_to_the_millisecond(probe: Probe) -> None:
    midnight = (time.time() // DAY_SECONDS + 1) * DAY_SECONDS
    for at, name in [(midnight - 0.001, _partition(midnight - 1)), (midnight, _partition(midnight))]:
        taken = await _claim_at(probe, at)
        assert await _home(probe, taken.call_id) == name


@pytest.mark.parametrize("zone", ["America/New_York", "Pacific/Apia"])
async def test_partitions_are_utc_days_in_any_session_time_zone(probe: Probe, zone: str) -> None:
    before = await _partitions(probe)
    await probe.run(f"SET TimeZone = '{zone}'")
    assert await probe.value("SELECT make_call_partitions(400)") == 393
    bounds = await probe.all(
        "SELECT c.relname, pg_get_expr(c.relpartbound, c.oid) AS bound FROM pg_class c"
        " JOIN pg_inherits i ON i.inhrelid = c.oid WHERE i.inhparent = 'model_calls'::regclass"
    )
    for row in bounds:
        if row["relname"] in before:
            continue
        first = row["bound"].split("'")[1].replace("-", "")[:12]
        assert int(first, 16) % (DAY_SECONDS * 1000) == 0, row


async def test_a_call_without_a_partition_of_its_day_still_settles(probe: Probe) -> None:
    taken = await _claim_at(probe, time.time() + 30 * DAY_SECONDS)
    assert await _home(probe, taken.call_id) == "model_calls_other"
    assert await probe.settle(taken) == "solved"
    assert await probe.settle(taken) == "solved"


async def test_a_past_call_counts_its_usage_once_it_is_known(probe: Probe) -> None:
    await probe.add()
    await probe.add()
    known, still_open = await probe.claim(), await probe.claim()
    assert known is not None
    assert still_open is not None
    await probe.run("UPDATE model_calls SET reserved_tokens = 900")
    used = "p_answer => 'yes', p_latency_seconds => 0.1, p_prompt_tokens => 30, p_completion_tokens => 12"
    await probe.run(f"SELECT settle_call($1, 'answered', {used})", known.call_id)
    past = await probe.all("SELECT tokens, is_open FROM past_calls('m1', 60) ORDER BY tokens")
    assert [tuple(call) for call in past] == [(42, False), (900, True)]


async def test_a_settlement_locks_only_the_partition_of_its_day(probe: Probe) -> None:
    for _ in range(9):
        await probe.add()
    for _ in range(8):  # often enough for a session to cache a generic plan
        await probe.settle(await probe.must_claim())
    taken = await probe.must_claim()
    async with probe.connection.transaction():
        assert await probe.settle(taken) == "solved"
        locked = await probe.all(
            "SELECT DISTINCT relation::regclass::text AS name FROM pg_locks"
            " WHERE pid = pg_backend_pid() AND relation::regclass::text ~ '^model_calls_(2|other)\\w*$'"
        )
    days = {row["name"] for row in locked if not row["name"].endswith(("_pkey", "_idx"))}
    assert days == {await _home(probe, taken.call_id)}


async def test_a_new_partition_takes_its_calls_from_the_default_one(probe: Probe) -> None:
    # Calls were logged for a month without new partitions.
    at = time.time() + 30 * DAY_SECONDS
    settled, open_, other_day = [await _claim_at(probe, at + n) for n in (0, 1, DAY_SECONDS * 20)]
    await probe.settle(settled)
    assert await probe.value("SELECT make_call_partitions(31)") == 24
    assert await _home(probe, settled.call_id) == _partition(at)
    assert await _home(probe, open_.call_id) == _partition(at + 1)
    assert await _home(probe, other_day.call_id) == "model_calls_other"
    assert await probe.settle(open_) == "solved"
    assert await probe.settle(settled) == "solved"
    assert (await probe.call(settled.call_id))["outcome"] == "answered"


async def test_past_days_in_the_default_partition_get_a_partition(probe: Probe) -> None:
    at = time.time() - 20 * DAY_SECONDS
    taken = await _claim_at(probe, at)
    assert await probe.value("SELECT make_call_partitions()") == 1
    assert await _home(probe, taken.call_id) == _partition(at)
    assert await probe.value("SELECT make_call_partitions()") == 0


async def test_ids_with_an_implausible_time_stay_in_the_default_partition(probe: Probe) -> None:
    chance = random.Random(50)
    # The first 48 bits are milliseconds since 1970; all of these times are after the year 2527.
    far_off = [uuid.UUID(int=chance.getrandbits(128) | 1 << 124) for _ in range(50)]
    await probe.run("INSERT INTO model_calls (call_id, model) SELECT unnest($1::uuid[]), 'm'", far_off)
    await probe.run(
        "INSERT INTO model_calls (call_id, model) VALUES ('00000000-0000-7000-8000-000000000000', 'm')"
    )
    assert await probe.value("SELECT make_call_partitions()") == 0


async def test_a_long_query_on_the_log_blocks_neither_claims_nor_maintenance(
    probe: Probe, database: str
) -> None:
    async with probing(database) as reader:
        transaction = reader.connection.transaction()
        await transaction.start()
        await reader.value(
            "SELECT count(*) FROM model_calls"
        )  # like a dump or a report, holds its locks until it ends
        began = time.monotonic()
        async with probing(database) as house:
            made = asyncio.create_task(house.value("SELECT make_call_partitions(9)"))
            await probe.add()
            taken = await asyncio.wait_for(probe.must_claim(), 5)
            assert await asyncio.wait_for(probe.settle(taken), 5) == "solved"
            assert await asyncio.wait_for(made, 5) == 0, "gives up for now"
        assert time.monotonic() - began < 4
        await transaction.rollback()
    assert await probe.value("SELECT make_call_partitions(9)") == 2


async def test_settling_reads_only_the_partition_of_its_day(probe: Probe) -> None:
    await probe.add()
    taken = await probe.must_claim()
    plan = "\n".join(
        row[0]
        for row in await probe.all(f"EXPLAIN SELECT * FROM model_calls WHERE call_id = '{taken.call_id}'")
    )
    assert plan.count("model_calls_") == plan.count(_partition(time.time())) > 0


async def test_the_time_of_a_call_id_is_its_creation_time(probe: Probe) -> None:
    now = 1_700_000_000.123
    told = await probe.value("SELECT extract(epoch FROM call_time($1))::float8", new_call_id(now))
    assert told == pytest.approx(now, abs=0.0011)
