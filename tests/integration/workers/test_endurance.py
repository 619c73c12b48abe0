"""The engine with locks, errors and a read-only Postgres: every loop goes on and no task is lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg2
import pytest

from local.postgres import PostgresServer
from router.settings import Addresses
from router.workers.engine import Engine
from tests.integration.workers.test_worker import (  # noqa: F401 - fixtures
    MODELS,
    addresses,
    ask,
    backend,
    config,
    insert,
    running,
    server,
    solved,
    until,
    working,
)

pytestmark = pytest.mark.timeout(180)

# functions that a worker process calls all the time
FUNCTIONS = ("claim_task", "settle_call", "heartbeat", "worker_state")
_SIGNATURE = """
SELECT pg_get_functiondef(p.oid) AS definition, pg_get_function_arguments(p.oid) AS arguments,
       pg_get_function_result(p.oid) AS result, p.proretset AS many,
       (SELECT string_agg(a.name, ', ') FROM unnest(p.proargnames) WITH ORDINALITY AS a (name, place)
         WHERE coalesce(p.proargmodes[place::integer], 'i') = 'i') AS names,
       (SELECT string_agg(a.name, ', ') FROM unnest(p.proargnames) WITH ORDINALITY AS a (name, place)
         WHERE p.proargmodes[place::integer] = 'o') AS results
  FROM pg_proc p WHERE p.proname = %s"""
TRANSIENT = (
    "25006", "40001", "40P01", "42703", "42P01", "42501", "53100", "53300", "53400", "55P03", "55006",
    "57014", "57P01", "57P02", "57P03", "08006", "08000", "0A000", "F0000",
)  # fmt: skip
PERMANENT = ("22P02", "22021", "22008", "23514", "23502", "54000", "P0001", "XX000", "XX001")


def _make_failing(addresses: Addresses) -> None:  # noqa: F811
    """Replaces the functions by ones that raise the error of the table `faults` twice each, then work."""
    statements = ["CREATE TABLE faults (name text PRIMARY KEY, state text, times integer)"]
    for name in FUNCTIONS:
        (real,) = ask(addresses, _SIGNATURE, name)
        call = f"RETURN real_{name}({real['names']})"
        if real["many"]:
            call = f"RETURN QUERY SELECT * FROM real_{name}({real['names']})"
        elif real["results"]:
            call = f"SELECT * INTO {real['results']} FROM real_{name}({real['names']})"
        statements += [
            real["definition"].replace(name, f"real_{name}").replace("%", "%%"),
            f"DROP FUNCTION {name}",
            f"CREATE SEQUENCE calls_of_{name}",
            (
                f"CREATE FUNCTION {name}({real['arguments']}) RETURNS {real['result']} LANGUAGE plpgsql AS $$"
                " #variable_conflict use_column\n"
                f"DECLARE fault faults; BEGIN SELECT * INTO fault FROM faults f WHERE f.name = '{name}';"
                f" IF nextval('calls_of_{name}') <= fault.times THEN"
                " RAISE EXCEPTION 'injected' USING ERRCODE = fault.state; END IF;"
                f" {call}; END $$"
            ),
        ]
    for statement in statements:
        ask(addresses, statement)


def _fail(addresses: Addresses, state: str) -> None:  # noqa: F811
    for name in FUNCTIONS:
        ask(addresses, f"ALTER SEQUENCE calls_of_{name} RESTART")
    ask(addresses, "DELETE FROM faults")
    ask(addresses, "INSERT INTO faults SELECT unnest(%s::text[]), %s, 2", list(FUNCTIONS), state)


def _count(addresses: Addresses, status: str) -> int:  # noqa: F811
    return int(ask(addresses, "SELECT count(*) AS n FROM tasks WHERE status = %s", status)[0]["n"])


COMMON = {"25006", "40P01", "42703", "55P03", "57P01", "08006", "23514", "XX001"}


@pytest.mark.parametrize(
    "states",
    [
        pytest.param(COMMON, id="common"),
        pytest.param({*TRANSIENT, *PERMANENT} - COMMON, id="others", marks=pytest.mark.soak),
    ],
)
async def test_every_loop_goes_on_after_every_error_of_postgres(
    addresses: Addresses,  # noqa: F811
    states: set[str],
) -> None:
    async with running(addresses, config()) as engine, working(engine) as workers:
        _make_failing(addresses)
        for state in sorted(states.intersection(TRANSIENT)):
            before = solved(addresses)
            _fail(addresses, state)
            insert(addresses, 8)
            await until(lambda before=before: solved(addresses) == before + 8)
        for state in sorted(states.intersection(PERMANENT)):
            before = solved(addresses) + _count(addresses, "failed")
            _fail(addresses, state)
            insert(addresses, 8)
            await until(lambda before=before: solved(addresses) + _count(addresses, "failed") == before + 8)
        assert _count(addresses, "failed") <= 2 * len(PERMANENT), "only those whose result was refused"
        failures = ask(addresses, "SELECT DISTINCT failure FROM tasks WHERE status = 'failed'")
        assert all(
            "could not be stored: Postgres rejected a value: injected" in f["failure"] for f in failures
        )
        assert not any(worker.done() for worker in workers)
        await until(engine.may_send)  # the last failures of the heartbeat may not be over
    paid = ask(
        addresses, "SELECT task_id FROM model_calls WHERE outcome = 'answered' GROUP BY 1 HAVING count(*) > 1"
    )
    assert not paid, "an answer was asked for twice"


@contextmanager
def _open_transaction(addresses: Addresses, statement: str) -> Iterator[Any]:  # noqa: F811
    person = psycopg2.connect(addresses.database_url)
    person.cursor().execute(statement)
    try:
        yield person
    finally:
        person.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE tasks SET max_tokens = 100 WHERE id <= 40",
        "SELECT FROM tasks WHERE id <= 40 FOR UPDATE",
        "UPDATE tasks SET priority = 1 WHERE id <= 130",
    ],
)
async def test_a_forgotten_transaction_stops_only_its_own_tasks(
    addresses: Addresses,  # noqa: F811
    statement: str,
) -> None:
    insert(addresses, 150)
    async with running(addresses, config()) as engine:
        name = engine.queue.worker
        with _open_transaction(addresses, statement) as person:
            async with working(engine):
                free = "id > 130" if "130" in statement else "id > 40"
                done = f"SELECT count(*) AS n FROM tasks WHERE status = 'solved' AND {free}"
                total = 20 if "130" in statement else 110
                await until(lambda: ask(addresses, done)[0]["n"] == total, 60)
                await asyncio.sleep(2 * config().worker.lease_seconds)
                assert engine.queue.worker == name, "the lease was lost"
                assert engine.may_send()
                person.commit()
                await until(lambda: solved(addresses) == 150, 60)
    assert not ask(addresses, "SELECT FROM model_calls WHERE outcome = 'lost'")


async def test_a_lock_of_the_whole_table_pauses_and_loses_nothing(addresses: Addresses) -> None:  # noqa: F811
    insert(addresses, 200)
    async with running(addresses, config()) as engine, working(engine):
        name = engine.queue.worker
        await until(lambda: solved(addresses) > 10)
        with _open_transaction(addresses, "LOCK TABLE tasks IN ACCESS EXCLUSIVE MODE") as person:
            await asyncio.sleep(4)
            person.commit()
        await until(lambda: solved(addresses) == 200)
        assert engine.queue.worker == name


async def test_work_goes_on_after_postgres_was_read_only_with_open_sessions(
    addresses: Addresses,  # noqa: F811
    postgres: PostgresServer,
) -> None:
    insert(addresses, 600)

    def read_only(value: str) -> None:
        administrator = psycopg2.connect(postgres.url("postgres"))
        administrator.autocommit = True
        with administrator.cursor() as cursor:
            cursor.execute("SET default_transaction_read_only = off")
            cursor.execute(f"ALTER SYSTEM SET default_transaction_read_only = {value}")
            cursor.execute("SELECT pg_reload_conf()")
        administrator.close()

    settings = config(**dict.fromkeys(MODELS, "1200/min"))
    async with running(addresses, settings) as engine, working(engine):
        await until(lambda: solved(addresses) > 10)
        read_only("on")
        try:
            await asyncio.sleep(5)  # longer than the lease
            stopped_at = solved(addresses)
        finally:
            read_only("off")
        assert await until(lambda: solved(addresses) > stopped_at, 10) < 10
        await until(lambda: solved(addresses) == 600, 60)
    twice = "SELECT FROM model_calls WHERE outcome = 'answered' GROUP BY task_id HAVING count(*) > 1"
    assert len(ask(addresses, twice)) <= 2, "answers in flight were thrown away"


class _FaultError(RuntimeError):
    """An error that no part of the router expects."""


async def test_unexpected_errors_are_logged_once_and_end_no_loop(
    addresses: Addresses,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = True

    def breaking(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        async def sometimes(*arguments: Any, **more: Any) -> Any:
            if broken:
                raise _FaultError(name)
            return await real(*arguments, **more)

        monkeypatch.setattr(owner, name, sometimes)

    async with running(addresses, config()) as engine:
        for name in ("claim", "run_maintenance", "reconcile_step", "claim_uncategorized"):
            breaking(engine.queue, name)
        breaking(engine, "_update_shares")
        with caplog.at_level(logging.WARNING):
            async with working(engine):
                insert(addresses, 20)
                await asyncio.sleep(3)
                assert solved(addresses) == 0
                broken = False
                await until(lambda: solved(addresses) == 20)
    logged = [record.getMessage() for record in caplog.records if "unexpected error" in record.getMessage()]
    assert len(logged) == len(set(logged)), "each is logged once"
    assert any("llama-3.1-8b" in line for line in logged)
    assert any("maintenance" in line for line in logged)


async def test_an_unexpected_error_of_a_call_counts_as_an_attempt(
    addresses: Addresses,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    insert(addresses, 1)

    def broken(*_arguments: Any, **_more: Any) -> Any:
        raise _FaultError("a prompt that the client of the backend does not understand")

    monkeypatch.setattr("router.workers.pull_loop.send_permitted", broken)
    async with running(addresses, config()) as engine:
        ask(addresses, "UPDATE queue_settings SET max_attempts = 2")
        async with working(engine):
            await until(lambda: _count(addresses, "failed") == 1, 30)
    failure = ask(addresses, "SELECT failure FROM tasks")[0]["failure"]
    assert "unexpected error: a prompt that" in failure


async def test_a_lease_is_renewed_while_the_pool_is_used_up(addresses: Addresses) -> None:  # noqa: F811
    async with running(addresses, config()) as engine:
        name = engine.queue.worker
        sleeping = [
            asyncio.create_task(engine.pool.fetchval("SELECT pg_sleep(5)"))
            for _ in range(engine.config.worker.pool_connections)
        ]
        began = time.monotonic()
        await asyncio.gather(*sleeping)
        assert time.monotonic() - began >= 5
        assert engine.queue.worker == name
        await _renewed(engine)
    assert not ask(addresses, "SELECT FROM workers WHERE released_at IS NOT NULL AND worker <> %s", name)


async def _renewed(engine: Engine) -> None:
    assert await engine.queue.heartbeat(), "the lease had expired"
