"""People and failures meddle with a running drain: it goes on, and the status names every standstill.

Hands that stop nothing must not slow the drain: locks, poison rows, edits, deletions, new columns. Failures
of services stop it for their own time, and are named within 5 s.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg2
import pytest
import redis
import requests

from router.database import connect
from router.status import Reason, read_status
from tests.support.stack import Solving, say

pytestmark = [pytest.mark.airflow, pytest.mark.alone]

NAMED_SECONDS = 5.0  # within which a standstill is named, and its name is gone
RECOVERY_SECONDS = 10.0  # within which sends go on after a failover
START_SECONDS = 25.0  # of a triggerer
LEAST_THROUGHPUT = 0.9  # of that without hands
WARM_SECONDS = 10.0
SAMPLE_SECONDS = 0.25
POISON = (
    "INSERT INTO tasks (prompt, deadline_at, created_at, priority, max_tokens) VALUES"
    " ('poison', '99999-01-01', '4000-01-01 BC', 32767, 2147483647),"
    " ('poison', 'infinity', '-infinity', -32768, 1), ('poison', '-infinity', '294276-12-31', 0, 2),"
    " ('poison', '1970-01-01', now(), 0, NULL), (' ', NULL, now(), 0, NULL),"
    " (repeat('poison ', 200000), NULL, now(), 0, NULL)"
)


@dataclass(frozen=True)
class Hand:
    """Meddles for a while. `codes`: how the status names the standstill; empty if nothing may stop."""

    name: str
    act: Callable[[Meddling, float], None]
    codes: frozenset[Reason] = frozenset()
    recovery_seconds: float = 0.0

    def __str__(self) -> str:
        return self.name


@dataclass
class Sample:
    """What the status said: the reason of the whole, and those of the models. Read from `at` to `until`."""

    at: float
    until: float
    whole: Reason | None
    models: frozenset[Reason | None]

    def names(self, codes: frozenset[Reason]) -> bool:
        return self.whole in codes or (bool(self.models) and self.models <= codes)


@dataclass
class Meddling:
    """A running drain, and what was done to it: spans of hands in monotonic seconds."""

    solving: Solving
    samples: list[Sample] = field(default_factory=list)
    spans: list[tuple[Hand, float, float]] = field(default_factory=list)

    def run(self, hand: Hand, seconds: float) -> None:
        began = time.monotonic()
        hand.act(self, seconds)
        self.spans.append((hand, began, time.monotonic()))

    def person(self) -> Any:
        """A connection of somebody with a terminal."""
        connection = psycopg2.connect(self.solving.stack.database_url)
        with connection.cursor() as cursor:
            cursor.execute("SET default_transaction_read_only = off")
        connection.commit()
        return closing(connection)


@contextmanager
def watching(meddling: Meddling) -> Iterator[None]:
    """Reads the status over and over, as `router watch` does."""
    ended = threading.Event()

    def watch() -> None:
        stack = meddling.solving.stack
        while not ended.wait(SAMPLE_SECONDS):
            at = time.monotonic()
            with connect(stack.database_url) as connection:
                status = read_status(connection, stack.redis_url)
            whole = status.why_not.code if status.why_not else None
            models = frozenset(model.why_not.code if model.why_not else None for model in status.models)
            meddling.samples.append(Sample(at, time.monotonic(), whole, models))

    thread = threading.Thread(target=watch, name="watch the status")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def hold_rows(meddling: Meddling, seconds: float) -> None:
    with meddling.person() as connection, connection.cursor() as cursor:
        cursor.execute(
            "UPDATE tasks SET max_tokens = 100 WHERE id IN"
            " (SELECT id FROM tasks WHERE status = 'unsolved' AND starts_with(prompt, 'honest')"
            " ORDER BY id LIMIT 20)"
        )
        time.sleep(seconds)
        connection.commit()


def insert_poison(meddling: Meddling, seconds: float) -> None:
    meddling.solving.rows(POISON)
    time.sleep(seconds)


def edit(meddling: Meddling, seconds: float) -> None:
    meddling.solving.rows(
        "UPDATE tasks SET prompt = prompt || ' (edited)' WHERE id IN"
        " (SELECT id FROM tasks WHERE starts_with(prompt, 'honest') ORDER BY random() LIMIT 5)"
    )
    time.sleep(seconds)


def delete(meddling: Meddling, seconds: float) -> None:
    meddling.solving.rows(
        "DELETE FROM tasks WHERE id IN"
        " (SELECT id FROM tasks WHERE starts_with(prompt, 'honest') ORDER BY random() LIMIT 10)"
    )
    time.sleep(seconds)


def set_back(meddling: Meddling, seconds: float) -> None:
    meddling.solving.rows(
        "UPDATE tasks SET status = 'unsolved' WHERE id IN"
        " (SELECT id FROM tasks WHERE status = 'solved' AND starts_with(prompt, 'honest')"
        " ORDER BY random() LIMIT 5)"
    )
    time.sleep(seconds)


def add_column(meddling: Meddling, seconds: float) -> None:
    meddling.solving.rows("ALTER TABLE tasks ADD COLUMN IF NOT EXISTS noted_by_hand text")
    time.sleep(seconds)
    meddling.solving.rows("ALTER TABLE tasks DROP COLUMN IF EXISTS noted_by_hand")


def raise_priorities(meddling: Meddling, seconds: float) -> None:
    meddling.solving.rows("UPDATE tasks SET priority = 1 WHERE status = 'unsolved'")
    time.sleep(seconds)


def demote_redis(meddling: Meddling, seconds: float) -> None:
    with closing(redis.Redis.from_url(meddling.solving.stack.redis_url)) as client:
        client.replicaof("127.0.0.1", "1")
        time.sleep(seconds)
        client.replicaof("NO", "ONE")


def demote_postgres(meddling: Meddling, seconds: float) -> None:
    """As after a failover: sessions end, and new ones reach a server that is read-only for a while."""
    end_sessions = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
        " AND pid <> pg_backend_pid() AND application_name LIKE 'router%'"
    )
    with meddling.person() as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("SELECT quote_ident(current_database())")
            (name,) = cursor.fetchone()
            cursor.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
            cursor.execute(end_sessions)
            time.sleep(seconds)
            cursor.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")


def break_backend(meddling: Meddling, seconds: float) -> None:
    url = f"{meddling.solving.stack.backend_url}/faults"
    order = {"kind": "bad_gateway", "model": "*", "share": 1, "seconds": seconds}
    requests.post(url, json=order, timeout=5).raise_for_status()
    time.sleep(seconds)
    requests.delete(url, timeout=5).raise_for_status()


def kill_triggerer(meddling: Meddling, seconds: float) -> None:
    stack = meddling.solving.stack
    stack.process("triggerer").kill()
    time.sleep(seconds)
    stack.restart("triggerer")


PEOPLE = (
    Hand("an open transaction holds rows", hold_rows),
    Hand("poison rows are inserted", insert_poison),
    Hand("prompts are edited", edit),
    Hand("tasks are deleted", delete),
    Hand("tasks are set back", set_back),
    Hand("a column is added", add_column),
    Hand("all priorities are raised", raise_priorities),
)
FAILURES = (
    Hand("Redis is demoted", demote_redis, frozenset({Reason.REDIS_READ_ONLY}), RECOVERY_SECONDS),
    Hand("Postgres is read-only", demote_postgres, frozenset({Reason.DATABASE_READ_ONLY}), RECOVERY_SECONDS),
    Hand(
        "the backend answers 502", break_backend,
        frozenset({Reason.BACKEND_UNREACHABLE, Reason.BREAKER_OPEN, Reason.HALF_OPEN, Reason.COOLING_DOWN}),
        RECOVERY_SECONDS,
    ),
)  # fmt: skip
KILL = Hand(
    "the triggerer is killed", kill_triggerer,
    frozenset({Reason.NO_WORKER, Reason.LEASE_LOST}), START_SECONDS,
)  # fmt: skip


@pytest.mark.timeout(180)
def test_the_drain_goes_on_under_hands(solving: Solving) -> None:
    plan = [(hand, 1.0) for hand in PEOPLE] + [(hand, NAMED_SECONDS + 3) for hand in FAILURES]
    _drain(solving, tasks=1000, target="1/s", plan=plan, pause_seconds=0.5)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_the_drain_goes_on_under_hands_for_minutes(solving: Solving) -> None:
    plan = [(PEOPLE[0], 30.0), *((hand, 1.0) for hand in PEOPLE[1:]), (FAILURES[0], 10.0), (PEOPLE[1], 1.0)]
    plan += [(FAILURES[1], 10.0), (PEOPLE[2], 1.0), (FAILURES[2], 20.0), (PEOPLE[4], 1.0), (KILL, 8.0)]
    plan += [(hand, 1.0) for hand in PEOPLE]
    _drain(solving, tasks=2000, target="1/s", plan=plan, pause_seconds=3.0)


def _drain(
    solving: Solving, *, tasks: int, target: str, plan: list[tuple[Hand, float]], pause_seconds: float
) -> None:
    solving.set_targets(target)
    began = time.monotonic()
    solving.insert(tasks, "honest")
    solving.until_all_send(began, 60)
    time.sleep(2.0)  # until the pace is steady
    meddling = Meddling(solving)
    warm = time.monotonic()
    with watching(meddling):
        time.sleep(WARM_SECONDS)
        for hand, seconds in plan:
            meddling.run(hand, seconds)
            time.sleep(max(pause_seconds, hand.recovery_seconds))
        until = time.monotonic()
        assert solving.unsolved() > 0, "the backlog ended before the last hand"
    solving.set_targets("20/s")
    solving.until_drained(120)
    try:
        _assert_honest_tasks_are_solved_once(solving)
        _assert_throughput(meddling, warm, until)
        _assert_standstills_are_named(meddling)
    finally:
        solving.rows("DELETE FROM tasks")  # other tests expect that all tasks are solved, and once


def _assert_honest_tasks_are_solved_once(solving: Solving) -> None:
    left = "SELECT id, failure FROM tasks WHERE starts_with(prompt, 'honest') AND status <> 'solved'"
    assert solving.rows(left) == []
    twice = (
        "SELECT c.task_id FROM model_calls c"
        " JOIN tasks t ON t.id = c.task_id AND t.prompt_version = c.prompt_version"
        " WHERE c.settlement = 'solved' AND starts_with(t.prompt, 'honest')"
        " GROUP BY c.task_id, c.prompt_version HAVING count(*) > 1"
    )
    assert solving.rows(twice) == [], "answers of one version of a prompt"
    requests_sent = [arrival.request_id for arrival in solving.arrivals]
    assert len(requests_sent) == len(set(requests_sent)), "a call arrived twice"


def _assert_standstills_are_named(meddling: Meddling) -> None:
    wrong = []
    for hand, began, ended in meddling.spans:
        during = [s for s in meddling.samples if began + NAMED_SECONDS <= s.at and s.until < ended]
        gone = ended + max(NAMED_SECONDS + 1, hand.recovery_seconds - 1)
        after = next((sample for sample in meddling.samples if sample.at >= gone), None)
        unnamed = [sample for sample in during if not sample.names(hand.codes)]
        if hand.codes and (unnamed or not during):
            wrong.append(f"{hand}: {[(s.at - began, s.whole, *s.models) for s in unnamed[:3]]}")
        if hand.codes and (after is None or after.names(hand.codes)):
            wrong.append(f"{hand}: still named {gone - ended:.1f} s after its end")
        if not hand.codes and (seen := [s.whole for s in during if s.whole]):
            wrong.append(f"{hand}: {seen[0]}")
    assert not wrong, json.dumps(wrong, indent=2, default=str)


def _assert_throughput(meddling: Meddling, warm: float, until: float) -> None:
    at = meddling.solving.arrived(warm)
    usual = sum(warm <= t < warm + WARM_SECONDS for t in at) / WARM_SECONDS
    stopped = sorted(
        (began, ended + hand.recovery_seconds) for hand, began, ended in meddling.spans if hand.codes
    )
    seconds, sends, start = 0.0, 0, warm + WARM_SECONDS
    for began, ended in [*stopped, (until, until)]:
        if began > start:
            seconds += began - start
            sends += sum(start <= t < began for t in at)
        start = max(start, ended)
    share = sends / seconds / usual
    say(f"{usual:.1f} sends/s without hands, {share:.1%} of it outside of {len(stopped)} failures' time")
    for hand, began, ended in meddling.spans:
        pace = sum(began <= t < ended for t in at) / (ended - began)
        say(f"  {hand}: {pace:.1f} sends/s in {ended - began:.1f} s")
    assert share >= LEAST_THROUGHPUT
