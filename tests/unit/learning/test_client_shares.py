"""A client's weight in the evidence, whatever it sends: the bound holds for any number of clients."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from router.learning.evidence import Evidence, Moments, PeriodStats, decayed
from router.learning.shares import OTHERS, UNBOUNDED, ClientBound, client_shares

COUNTS = st.dictionaries(st.sampled_from([OTHERS, *"abcdefghijklmno"]), st.integers(0, 10**7), min_size=1)
BOUNDS = st.builds(ClientBound, st.floats(0.05, 1), st.sampled_from([0.0, 15.0, 40.0]))
DAYS = 20


def counted(counts: dict[str, int], bound: ClientBound) -> dict[str, float]:
    shares = client_shares(counts, len(counts), bound)
    assert shares.keys() == counts.keys()
    assert all(0 <= share <= 1 for share in shares.values())
    return {client: counts[client] * share for client, share in shares.items()}


@given(counts=COUNTS, bound=BOUNDS)
def test_no_client_weighs_more_than_its_share(counts: dict[str, int], bound: ClientBound) -> None:
    assume(len(counts) > 1)
    weighs = counted(counts, bound)
    most = max(bound.floor, bound.of(len(counts)) * sum(weighs.values()))
    assert all(weight <= most * (1 + 1e-6) for client, weight in weighs.items() if client != OTHERS)
    assert weighs.get(OTHERS) == counts.get(OTHERS)


@given(counts=COUNTS, bound=BOUNDS)
def test_no_more_is_taken_away_than_needed(counts: dict[str, int], bound: ClientBound) -> None:
    """A client below the largest weight that counts keeps all of its observations."""
    weighs = counted(counts, bound)
    largest = max((weight for client, weight in weighs.items() if client != OTHERS), default=0.0)
    for client, count in counts.items():
        if count < largest * (1 - 1e-6):
            assert weighs[client] == count
    if all(count <= bound.of(len(counts)) * sum(counts.values()) for count in counts.values()):
        assert weighs == counts


@given(counts=COUNTS, bound=BOUNDS, more=st.integers(1, 10**7))
def test_a_bounded_client_gains_nothing_by_more(
    counts: dict[str, int], bound: ClientBound, more: int
) -> None:
    flooder = max(counts, key=lambda client: (client != OTHERS, counts[client]))
    before = counted(counts, bound)
    assume(flooder != OTHERS and before[flooder] < counts[flooder] * (1 - 1e-9))
    after = counted({**counts, flooder: counts[flooder] + more}, bound)
    assert after == pytest.approx(before, rel=1e-6)


@given(count=st.integers(0, 10**7), bound=BOUNDS)
def test_a_single_client_is_not_bounded(count: int, bound: ClientBound) -> None:
    assert counted({"": count}, bound) == {"": count}


def calls(client: str, period: int, number: int, answered: int, **grades: float) -> PeriodStats:
    scores = {source: Moments.of(number, number * mean, number * mean**2) for source, mean in grades.items()}
    return PeriodStats(period, number, answered, scores=scores, client=client)


def combined(history: Iterable[PeriodStats], bound: ClientBound) -> Evidence:
    return decayed(history, DAYS - 1, half_life=14, memory=56, change_errors=4, bound=bound)


@given(
    honest=st.tuples(st.integers(1, 12), st.integers(5, 60)),
    flood=st.integers(0, 10**6),
    flooded=st.sets(st.integers(0, DAYS - 1), min_size=1),
    quiet=st.sets(st.integers(0, DAYS - 1), max_size=DAYS - 5),
    share=st.sampled_from([0.1, 0.3, 0.5]),
)
def test_a_flood_of_failures_or_praise_moves_the_evidence_no_more_than_its_share(
    honest: tuple[int, int], flood: int, flooded: set[int], quiet: set[int], share: float
) -> None:
    """Also on days on which only the flooder calls, which a detected change would otherwise leave alone."""
    (clients, each), bound = honest, ClientBound(share)
    fair = [
        calls(f"c{client}", day, each, each, check=0.5)
        for client, day in itertools.product(range(clients), range(DAYS))
        if day not in quiet
    ]
    attack = [calls("mallory", day, flood, 0, check=1.0, feedback=1.0) for day in flooded]
    moved = combined([*fair, *attack], bound)
    most = bound.of(clients + 1)
    assert moved.success.mean >= 1 - most - 1e-6
    assert moved.scores["check"].mean <= 0.5 + 0.5 * most + 1e-6
    assert moved.seen <= clients * each * DAYS / (1 - most) + 1e-6


def test_as_many_calls_as_rank_a_model_always_count() -> None:
    """Otherwise three calls of a second client would take the evidence of the first."""
    history = [calls("batch", day, 1000, 900) for day in range(DAYS)] + [calls("alice", 3, 3, 3)]
    evidence = combined(history, ClientBound(0.3, 40))
    assert 40 <= evidence.seen <= 43 + 1e-6
    assert evidence.success.mean == pytest.approx(0.9, abs=0.01)


def test_ratings_by_an_operator_bound_no_client() -> None:
    rated = [calls("batch", day, 1000, 900) for day in range(DAYS)] + [calls("ann@host", 3, 0, 0)]
    rated[-1] = PeriodStats(3, scores={"feedback": Moments.of(5, 5, 5)}, client="ann@host")
    assert combined(rated, ClientBound(0.3, 40)).seen == 1000 * DAYS


def test_a_change_that_enough_clients_saw_still_drops_older_evidence() -> None:
    history = [
        calls(f"c{client}", day, 50, 50 if day < 15 else 5)
        for client, day in itertools.product(range(5), range(DAYS))
    ]
    assert combined(history, ClientBound(0.3)).forgot_before == 15


def test_without_a_bound_each_call_counts() -> None:
    history = [calls("a", 0, 10**6, 0), calls("b", 0, 10, 10)]
    assert combined(history, UNBOUNDED).seen == 10**6 + 10
