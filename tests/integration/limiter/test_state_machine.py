"""Compares the script on a real Redis with `tests/support/limiter/specification.py`, in random order.

A mismatch names the seed: repeat it with `take(Walk.random(seed), ...)`. Hypothesis stores its examples.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from local.redis import RedisServer
from router.limiter.limiter import SCRIPT
from router.task import Outcome
from tests.support.limiter.random_walk import (
    COSTS,
    INTERACTIVE_LINES,
    PALETTES,
    SPENT,
    TOKENS,
    Walk,
    interactive_walk,
    walks,
)
from tests.support.limiter.redis import Connection
from tests.support.limiter.world import IssuedPermit, World

WHO = st.integers(0, 2)
NEEDS = st.lists(st.tuples(st.sampled_from(TOKENS), st.sampled_from(COSTS)), min_size=1, max_size=6).map(
    tuple
)
MONEY = st.sampled_from(SPENT)
USED = st.sampled_from([None, 0, 3, 10, 25])
MICROS = st.sampled_from([0, 1, 1_000, 24_999, 25_000, 60_000, 250_000, 999_999, 1_060_000, 9_000_000])
JUMPS = st.sampled_from([-3_600_000_000, -500_000, -1, 400_000, 3_600_000_000])
RECENT = st.integers(1, 6)


@pytest.fixture(scope="module")
def connection(redis_server: RedisServer) -> Iterator[Connection]:
    opened = Connection(redis_server)
    yield opened
    opened.close()


class Machine(RuleBasedStateMachine):
    """World driven by Hypothesis, which shrinks a mismatch to few steps."""

    connection: Connection
    interactive = False
    lines = [line for palette in PALETTES[:5] for line in palette]  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.connection, SCRIPT, self.lines, waits=self.interactive)
        self.loop = asyncio.new_event_loop()
        self.run(self.world.set_target(0, self.lines[0]))

    def run(self, work: Coroutine[Any, Any, Any]) -> None:
        self.loop.run_until_complete(work)

    def recent(self, back: int) -> IssuedPermit | None:
        return self.world.held[-back] if back <= len(self.world.held) else None

    @rule(who=WHO, needs=NEEDS)
    def reserve(self, who: int, needs: tuple[tuple[int, int], ...]) -> None:
        self.run(self.world.reserve(who, needs))

    @rule(micro=MICROS)
    def time_passes(self, micro: int) -> None:
        self.world.pass_time(micro)

    @rule(beyond=st.sampled_from([-1, 0, 1]))
    def until_the_next_may_leave(self, beyond: int) -> None:
        send_at = self.world.spec.decide(self.world.now, 0).send_at or self.world.now
        self.world.pass_time(max(0, send_at - self.world.now + beyond))

    @rule(back=RECENT, late=st.sampled_from([0, 24_999, 2_000_000]), slow=st.booleans())
    def send(self, back: int, late: int, slow: bool) -> None:
        held = self.recent(back)
        if held is not None:
            self.world.now = max(self.world.now, held.send_at) + late
            self.world.send(held, self.world.transit * slow)

    @rule(back=RECENT, used=USED, times=st.integers(1, 2), spent=MONEY)
    def end(self, back: int, used: int | None, times: int, spent: int | None) -> None:
        held = self.recent(back)
        if held is not None:
            self.run(self.world.end(held, used, times, spent))

    @rule(back=RECENT, times=st.integers(1, 2))
    def cancel(self, back: int, times: int) -> None:
        held = self.recent(back)
        if held is not None:
            self.run(self.world.cancel(held, times))

    @rule(back=RECENT, used=USED, unused=st.booleans())
    def release_again(self, back: int, used: int | None, unused: bool) -> None:
        held = self.recent(back)
        if held is not None:
            self.run(self.world.end_again(held, used, unused=unused))

    @rule(who=WHO, index=st.integers(0, 27), age=st.sampled_from([None, -5, 0, 3]))
    def target(self, who: int, index: int, age: int | None) -> None:
        version = None if age is None else max(1, int(self.world.spec.version) + age)
        self.run(self.world.set_target(who, self.world.lines[index % len(self.world.lines)], version))

    @rule(who=WHO, seconds=st.sampled_from([0, 0.3, 2.0]))
    def cool_down(self, who: int, seconds: float) -> None:
        self.run(self.world.cool_down(who, seconds))

    @rule(
        who=WHO, back=RECENT, outcome=st.sampled_from([Outcome.ANSWERED, Outcome.ERROR, Outcome.RATE_LIMITED])
    )
    def record_outcome(self, who: int, back: int, outcome: Outcome) -> None:
        self.run(self.world.record_outcome(who, outcome, None, self.recent(back)))

    @rule(who=WHO)
    def snapshot(self, who: int) -> None:
        self.run(self.world.check_snapshot(who))

    @precondition(lambda self: self.world.state == "sound")
    @rule(kind=st.sampled_from(["flush", "key", "kept", "empty"]))
    def lose(self, kind: str) -> None:
        if kind == "flush":
            self.world.flush()
        elif kind == "key":
            self.world.lose_key()
        else:
            self.world.restart(state=kind)

    @rule(micro=JUMPS)
    def the_clock_is_set(self, micro: int) -> None:
        self.world.jump(micro)
        self.run(self.world.reserve(max(range(3), key=self.world.seen), (0,)))

    @rule(who=WHO)
    def new_client(self, who: int) -> None:
        now = self.world.generation  # one client with a clock bound must stay
        if sum(generation == now for generation, _ in map(self.world.seen, range(3))) > 1:
            self.world.restart_client(who)

    def teardown(self) -> None:
        self.loop.close()
        self.world.judge_arrivals()


class InteractiveMachine(Machine):
    """With interactive calls and calls that wait; its clocks are not set."""

    interactive = True
    lines = [line for lines in INTERACTIVE_LINES for line in lines]  # noqa: RUF012
    the_clock_is_set = None  # type: ignore[assignment]

    @rule(who=WHO, count=st.integers(0, 3))
    def ask(self, who: int, count: int) -> None:
        self.run(self.world.reserve(who, (0,) * count, interactive=True))

    @rule(who=WHO)
    def peek(self, who: int) -> None:
        self.run(self.world.peek(who))


def look_for_a_mismatch(
    connection: Connection, examples: int, steps: int, kind: type[Machine] = Machine
) -> None:
    Machine.connection = connection
    every = settings(max_examples=examples, stateful_step_count=steps, deadline=None, print_blob=True,
                     suppress_health_check=list(HealthCheck))  # fmt: skip
    run_state_machine_as_test(kind, settings=every)


def test_random_walks_of_12_000_steps_match_the_specification(connection: Connection) -> None:
    steps, permits = walks(connection, SCRIPT, [Walk.random(seed) for seed in range(48)])
    assert steps == 12_000
    assert permits > 2_500


def test_random_walks_with_interactive_calls_match_the_specification(connection: Connection) -> None:
    steps, permits = walks(connection, SCRIPT, [interactive_walk(seed) for seed in range(40)])
    assert steps == 10_000
    assert permits > 800


def test_hypothesis_finds_no_mismatch_with_interactive_calls(connection: Connection) -> None:
    look_for_a_mismatch(connection, examples=15, steps=40, kind=InteractiveMachine)


def test_hypothesis_finds_no_mismatch(connection: Connection) -> None:
    look_for_a_mismatch(connection, examples=30, steps=40)


def test_clock_set_back_during_recovery_delays_nothing(connection: Connection) -> None:
    Machine.connection = connection
    state = Machine()
    state.the_clock_is_set(micro=-3_600_000_000)
    state.lose(kind="kept")
    state.target(age=None, index=14, who=0)
    state.the_clock_is_set(micro=-3_600_000_000)
    state.until_the_next_may_leave(beyond=-1)
    state.the_clock_is_set(micro=400_000)
    assert state.world.state == "sound"
    state.teardown()


def test_second_loss_at_the_same_clock_reading_is_a_new_one(connection: Connection) -> None:
    Machine.connection = connection
    state = Machine()
    state.the_clock_is_set(micro=-3_600_000_000)
    state.time_passes(micro=999_999)
    state.the_clock_is_set(micro=-3_600_000_000)
    state.lose(kind="kept")
    state.the_clock_is_set(micro=-3_600_000_000)
    assert state.world.state == "gone", "a permit of the second loss is still valid"
    state.teardown()


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_random_walks_of_100_000_steps_match_the_specification(connection: Connection) -> None:
    steps, _ = walks(connection, SCRIPT, [Walk.random(seed) for seed in range(10_000, 10_400)])
    assert steps == 100_000


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_hypothesis_finds_no_mismatch_in_many_examples(connection: Connection) -> None:
    look_for_a_mismatch(connection, examples=800, steps=60)
