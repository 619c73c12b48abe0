"""Property tests of the judge and the ideal against brute-force definitions."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from bench.judge import Arrival, TargetChange, judge
from bench.judge.arrivals import model_log
from bench.judge.ideal import bound, replay_ideal
from router.traffic import TrafficTarget

TICK = 0.05  # seconds; all windows, gaps and latencies drawn here are whole ticks
TICKS_A_SECOND = 20
BACKLOG_FROM, BACKLOG_UNTIL = 40, 240  # ticks
MOST = 300
SECONDS = st.integers(1, 3)
COUNTS = st.integers(1, 3)

Row = tuple[int, int | None, int, int | None]  # at, latency, reserved, used; in ticks and tokens
Draw = tuple[int, int, int]  # latency, reserved, used
History = list[tuple[int, TrafficTarget]]


@st.composite
def targets(draw: st.DrawFn) -> TrafficTarget:
    requests = draw(st.dictionaries(SECONDS, COUNTS, max_size=2))
    tokens = draw(st.dictionaries(SECONDS, st.integers(1, 30), max_size=2))
    at_once = draw(st.none() | COUNTS)
    parts = [f"{count}/{window}s" for window, count in requests.items()]
    parts += [f"{count} tokens/{window}s" for window, count in tokens.items()]
    parts += [] if at_once is None else [f"{at_once} at once"]
    parts += ["burst"] if parts and draw(st.booleans()) else []
    return TrafficTarget.parse(", ".join(parts) or "0")


@st.composite
def histories(draw: st.DrawFn) -> History:
    ticks = draw(st.lists(st.integers(0, 160), min_size=1, max_size=4, unique=True))
    return [(tick, draw(targets())) for tick in sorted(ticks)]


calls = st.tuples(
    st.integers(0, 200), st.none() | st.integers(0, 70), st.integers(0, 12), st.none() | st.integers(0, 15)
)


def as_changes(history: History, model: str = "m") -> list[TargetChange]:
    return [TargetChange(tick / TICKS_A_SECOND, model, target) for tick, target in history]


def as_arrivals(rows: list[Row]) -> list[Arrival]:
    return [
        Arrival(
            at / TICKS_A_SECOND,
            None if latency is None else (at + latency) / TICKS_A_SECOND,
            "m",
            str(number),
            reserved,
            used,
        )
        for number, (at, latency, reserved, used) in enumerate(rows)
    ]


def obeys(index: int, rows: list[Row], target: TrafficTarget) -> bool:
    """The rule for one arrival, literally: count what is in the window, itself included."""
    now = rows[index][0]
    if target.stopped:
        return False
    there = rows[: index + 1]
    for limit in target.requests:
        if sum(1 for row in there if row[0] > now - limit.window_seconds * TICKS_A_SECOND) > limit.count:
            return False
    for budget in target.tokens:
        recent = [row for row in there if row[0] > now - budget.window_seconds * TICKS_A_SECOND]
        if rows[index][2] and sum(counted(row, now) for row in recent) > budget.count:
            return False
    return target.at_once is None or sum(1 for row in there if running(row, now)) <= target.at_once


def running(row: Row, now: int) -> bool:
    at, latency = row[:2]
    return at == now or latency is None or at + latency > now


def counted(row: Row, now: int) -> int:
    _, _, reserved, used = row
    return reserved if running(row, now) or used is None else used


@settings(max_examples=300, deadline=None)
@given(st.lists(calls, max_size=40), histories(), st.sampled_from([0, 5, 20, 70]))
def test_the_judge_finds_exactly_the_breaches_that_brute_force_finds(
    rows: list[Row], history: History, settle: int
):
    numbered = sorted(enumerate(rows), key=lambda pair: pair[1][0])
    ordered = [row for _, row in numbered]
    expected = []
    for index, (number, (at, *_)) in enumerate(numbered):
        ends = [tick + settle for tick, _ in history[1:]] + [10**9]
        allowed = [target for (tick, target), end in zip(history, ends, strict=True) if tick <= at < end]
        if not any(obeys(index, ordered, target) for target in allowed):
            expected.append(str(number))
    verdict = judge(
        as_arrivals(rows),
        as_changes(history),
        backlog_from=None,
        backlog_until=None,
        settle_seconds=settle / TICKS_A_SECOND,
    ).models["m"]
    assert [breach.request_id for breach in verdict.breaches] == expected
    assert (verdict.worst_window_ratio > 1) == bool(expected)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 200), max_size=40), SECONDS, st.integers(1, 8))
def test_checking_each_arrival_covers_every_window(ticks: list[int], seconds: int, count: int):
    window = seconds * TICKS_A_SECOND
    fullest = max(sum(1 for tick in ticks if start <= tick < start + window) for start in range(-window, 201))
    rows = [(tick, 1, 0, None) for tick in ticks]
    changes = as_changes([(0, TrafficTarget.parse(f"{count}/{seconds}s"))])
    verdict = judge(as_arrivals(rows), changes, backlog_from=None, backlog_until=None).models["m"]
    assert verdict.worst_window_ratio == fullest / count


def brute_ideal(history: History, draws: list[Draw], before: list[Row]) -> list[int]:
    """Tick by tick: sends whenever one more send obeys the active target and its gap."""
    sent = sorted(before)
    sends: list[int] = []
    for now in range(BACKLOG_FROM, BACKLOG_UNTIL + 1):
        active = [target for tick, target in history if tick <= now]
        while active and len(sends) < MOST:
            latency, reserved, used = draws[len(sends) % len(draws)]
            gap = round(active[-1].gap_seconds * TICKS_A_SECOND)
            if sent and sent[-1][0] + gap > now:
                break
            if not all(obeys(len(sent), [*sent, (now, latency, least, used)], part)
                       for part, least in one_by_one(active[-1], reserved)):  # fmt: skip
                break
            sent.append((now, latency, reserved, used))
            sends.append(now)
    return sends


def one_by_one(target: TrafficTarget, reserved: int) -> Iterator[tuple[TrafficTarget, int]]:
    """Each token limit alone with what a call needs of it, at most all of it; then the other limits."""
    for budget in target.tokens:
        yield TrafficTarget(tokens=(budget,)), min(reserved, budget.count)
    yield TrafficTarget(requests=target.requests, at_once=target.at_once), reserved


draws_of_calls = st.lists(
    st.tuples(st.integers(1, 70), st.integers(0, 12), st.integers(0, 15)), min_size=1, max_size=5
)
earlier_calls = st.lists(
    st.tuples(st.integers(0, 39), st.integers(1, 90), st.integers(1, 12), st.integers(0, 15)), max_size=4
)


@settings(max_examples=300, deadline=None)
@given(histories(), draws_of_calls, earlier_calls)
def test_the_ideal_sends_exactly_when_brute_force_does(
    history: History, draws: list[Draw], before: list[Row]
):
    expected = brute_ideal(history, draws, before)
    sends = replay_ideal(
        as_changes(history),
        [latency / TICKS_A_SECOND for latency, _, _ in draws],
        BACKLOG_FROM / TICKS_A_SECOND,
        BACKLOG_UNTIL / TICKS_A_SECOND,
        amounts=[(reserved, used, 0, 0) for _, reserved, used in draws],
        before=model_log(as_arrivals(sorted(before))),
        most=MOST,
    )
    assert [round(at * TICKS_A_SECOND, 6) for at in sends] == expected


@settings(max_examples=100, deadline=None)
@given(histories(), draws_of_calls)
def test_the_ideals_sends_breach_nothing_and_use_everything(history: History, draws: list[Draw]):
    changes = as_changes(history)
    latencies = [latency / TICKS_A_SECOND for latency, _, _ in draws]
    sends = replay_ideal(changes, latencies, 0.0, 12.0, amounts=[(1, 1, 0, 0)], most=2000).tolist()
    arrivals = [
        Arrival(at, at + latencies[i % len(latencies)], "m", str(i), 1, 1) for i, at in enumerate(sends)
    ]
    until = sends[-1] if sends else 12.0
    settled = judge(arrivals, changes, backlog_from=0.0, backlog_until=until, settle_seconds=0).models["m"]
    assert settled.breach_count == 0
    assert settled.use == 1.0 or not sends


@settings(max_examples=100, deadline=None)
@given(targets(), targets(), st.integers(1, 20), st.integers(1, 60), st.integers(1, 60))
def test_the_bound_is_the_merge_of_the_models_own_ideals(
    one: TrafficTarget, other: TrafficTarget, tasks: int, one_latency: int, other_latency: int
):
    latency = {"one": one_latency / TICKS_A_SECOND, "other": other_latency / TICKS_A_SECOND}
    changes = {"one": as_changes([(0, one)], "one"), "other": as_changes([(0, other)], "other")}
    if one.stopped and other.stopped:
        return
    sends = sorted(
        (at, model)
        for model, history in changes.items()
        for at in replay_ideal(
            history, [latency[model]], 0.0, 500.0, amounts=[(1, 1, 0, 0)], most=tasks
        ).tolist()
    )
    soonest = bound(
        [*changes["one"], *changes["other"]],
        tasks,
        lambda model, _task: latency[model],
        start=0.0,
        tokens_of=lambda _model, _number: (1, 1),
    )
    assert round(soonest.seconds, 6) == round(max(at + latency[model] for at, model in sends[:tasks]), 6)
