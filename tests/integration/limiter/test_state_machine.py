"""The real script in the real Redis against the specification of `tests/limiter_spec.py`, in any order.

A difference shows the walk's seed: `take` it again with `Walk.drawn(seed)`. Hypothesis keeps its examples.
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
from tests.support.limiter.random_walk import PALETTES, Walk, walks
from tests.support.limiter.redis import Connection
from tests.support.limiter.world import Held, World

WHO = st.integers(0, 2)
NEEDS = st.lists(st.sampled_from([0, 1, 5, 10, 20]), min_size=1, max_size=6).map(tuple)
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
    """One world in the hands of Hypothesis, which looks for a short way to a difference."""

    connection: Connection

    def __init__(self) -> None:
        super().__init__()
        lines = [line for palette in PALETTES[:5] for line in palette]
        self.world = World(self.connection, SCRIPT, lines)
        self.loop = asyncio.new_event_loop()
        self.run(self.world.set_target(0, lines[0]))

    def run(self, work: Coroutine[Any, Any, Any]) -> None:
        self.loop.run_until_complete(work)

    def recent(self, back: int) -> Held | None:
        return self.world.held[-back] if back <= len(self.world.held) else None

    @rule(who=WHO, needs=NEEDS)
    def reserve(self, who: int, needs: tuple[int, ...]) -> None:
        self.run(self.world.reserve(who, needs))

    @rule(micro=MICROS)
    def time_passes(self, micro: int) -> None:
        self.world.pass_time(micro)

    @rule(beyond=st.sampled_from([-1, 0, 1]))
    def until_the_next_may_leave(self, beyond: int) -> None:
        moment = self.world.spec.decide(self.world.now, 0).moment or self.world.now
        self.world.pass_time(max(0, moment - self.world.now + beyond))

    @rule(back=RECENT, late=st.sampled_from([0, 24_999, 2_000_000]), slow=st.booleans())
    def send(self, back: int, late: int, slow: bool) -> None:
        held = self.recent(back)
        if held is not None:
            self.world.now = max(self.world.now, held.moment) + late
            self.world.send(held, self.world.transit * slow)

    @rule(back=RECENT, used=USED, times=st.integers(1, 2))
    def end(self, back: int, used: int | None, times: int) -> None:
        held = self.recent(back)
        if held is not None:
            self.run(self.world.end(held, used, times))

    @rule(back=RECENT, times=st.integers(1, 2))
    def cancel(self, back: int, times: int) -> None:
        held = self.recent(back)
        if held is not None:
            self.run(self.world.cancel(held, times))

    @rule(back=RECENT, used=USED, unused=st.booleans())
    def somebody_says_it_again(self, back: int, used: int | None, unused: bool) -> None:
        held = self.recent(back)
        if held is not None:
            self.run(self.world.end_again(held, used, unused=unused))

    @rule(who=WHO, index=st.integers(0, 18), age=st.sampled_from([None, -5, 0, 3]))
    def target(self, who: int, index: int, age: int | None) -> None:
        version = None if age is None else max(1, int(self.world.spec.version) + age)
        self.run(self.world.set_target(who, self.world.lines[index % len(self.world.lines)], version))

    @rule(who=WHO, seconds=st.sampled_from([0, 0.3, 2.0]))
    def rest(self, who: int, seconds: float) -> None:
        self.run(self.world.cool_down(who, seconds))

    @rule(
        who=WHO, back=RECENT, outcome=st.sampled_from([Outcome.ANSWERED, Outcome.ERROR, Outcome.RATE_LIMITED])
    )
    def record_outcome(self, who: int, back: int, outcome: Outcome) -> None:
        self.run(self.world.record_outcome(who, outcome, None, self.recent(back)))

    @rule(who=WHO)
    def look(self, who: int) -> None:
        self.run(self.world.look(who))

    @precondition(lambda self: self.world.state == "sound")
    @rule(kind=st.sampled_from(["flush", "key", "kept", "empty"]))
    def lose(self, kind: str) -> None:
        if kind == "flush":
            self.world.flush()
        elif kind == "key":
            self.world.lose_key()
        else:
            self.world.restart(memory=kind)

    @rule(micro=JUMPS)
    def the_clock_is_set(self, micro: int) -> None:
        self.world.jump(micro)
        self.run(self.world.reserve(max(range(3), key=self.world.seen), (0,)))

    @rule(who=WHO)
    def newcomer(self, who: int) -> None:
        now = self.world.generation  # somebody stays who can say how late it is: the others believe Redis
        if sum(generation == now for generation, _ in map(self.world.seen, range(3))) > 1:
            self.world.restart_client(who)

    def teardown(self) -> None:
        self.loop.close()
        self.world.judge_the_door()


def look_for_a_difference(connection: Connection, examples: int, steps: int) -> None:
    Machine.connection = connection
    every = settings(max_examples=examples, stateful_step_count=steps, deadline=None, print_blob=True,
                     suppress_health_check=list(HealthCheck))  # fmt: skip
    run_state_machine_as_test(Machine, settings=every)


def test_walks_of_twelve_thousand_steps_show_no_difference(connection: Connection) -> None:
    steps, permits = walks(connection, SCRIPT, [Walk.drawn(seed) for seed in range(48)])
    assert steps == 12_000
    assert permits > 2_500


def test_hypothesis_finds_no_difference(connection: Connection) -> None:
    look_for_a_difference(connection, examples=30, steps=40)


def test_a_clock_that_is_set_back_while_a_loss_is_waited_for_prolongs_nothing(connection: Connection) -> None:
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


def test_a_loss_while_the_clock_stands_still_is_not_taken_for_the_last_one(connection: Connection) -> None:
    Machine.connection = connection
    state = Machine()
    state.the_clock_is_set(micro=-3_600_000_000)
    state.time_passes(micro=999_999)
    state.the_clock_is_set(micro=-3_600_000_000)
    state.lose(kind="kept")
    state.the_clock_is_set(micro=-3_600_000_000)
    assert state.world.state == "gone", "a permit of the second loss is still out"
    state.teardown()


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_walks_of_a_hundred_thousand_steps_show_no_difference(connection: Connection) -> None:
    steps, _ = walks(connection, SCRIPT, [Walk.drawn(seed) for seed in range(10_000, 10_400)])
    assert steps == 100_000


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_hypothesis_finds_no_difference_in_many_examples(connection: Connection) -> None:
    look_for_a_difference(connection, examples=800, steps=60)
