"""Several processes with wrong clocks and changing targets, judged by kernel timestamps of arrivals."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.limiter.soak import MIN_USAGE, Outcome, Soak, print_outcome, run


def holds(outcome: Outcome) -> None:
    print_outcome(outcome)
    assert outcome.arrived == outcome.sent, "datagrams were lost in transit, so the run proves nothing"
    assert outcome.verdict.breach_count == 0


@pytest.mark.alone
@pytest.mark.parametrize(
    "late",
    [
        pytest.param(False, id="in time", marks=pytest.mark.soak),
        pytest.param(True, id="one in a hundred late"),
    ],
)
def test_no_window_is_exceeded_in_a_short_run(late: bool, tmp_path: Path) -> None:
    outcome = run(Soak(4, 300, 3, late, change_seconds=(0.7, 1.5), minute_bursts=True), tmp_path)
    holds(outcome)
    assert outcome.sent > 200
    assert sum(outcome.died.values()) > 0 or not late


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("late", [False, True], ids=["in time", "one in a hundred late"])
def test_no_window_is_exceeded_in_a_million_sends(late: bool, tmp_path: Path) -> None:
    """Thirteen minutes of 1,500 sends per second, which two idle cores can carry."""
    outcome = run(Soak(late=late), tmp_path)
    holds(outcome)
    assert outcome.sent > 1_000_000
    for model, least in MIN_USAGE.items():
        verdict = outcome.verdict.models[model]
        died = outcome.died[model] / max(1, verdict.ideal_sends)
        assert (verdict.use or 0) >= least - died
