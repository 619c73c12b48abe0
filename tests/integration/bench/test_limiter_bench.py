"""The limiter benchmark in a tiny form: its guarantees hold at any size."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.limiter import interactive
from bench.limiter.__main__ import Size, run
from bench.limiter.clients import BURST, ONE, PACED, SLACK, THREE
from bench.limiter.rivals import RIVALS, Limits, missing

pytestmark = [pytest.mark.alone, pytest.mark.soak]

pytest.importorskip("matplotlib", reason="bench/ draws with matplotlib: pip install -e '.[bench]'")

TINY = Size(
    rounds=2,
    slice_seconds=0.02,
    clients=40,
    processes=1,
    backend_processes=1,
    waiting_seconds=0.5,
    binding=Limits(100, 1),
    backend=Limits(20, 1),
    backend_windows=2,
    backend_clients=15,
    delay_ms=(5.0, 200.0),
    sends=1500,
    backend_rivals=("limits",),
)
HERE = [rival for rival in RIVALS if missing(rival) is None]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("bench") / "limiter.json"
    run(TINY, file)
    assert file.with_suffix(".png").stat().st_size > 1000
    written: dict[str, Any] = json.loads(file.read_text())
    return written


def test_no_window_at_the_backend_exceeds_the_target(result: dict[str, Any]):
    """Only checked while transit stays within the transit slack on this machine."""
    for kind, name in (("at_once", PACED), ("at_once", BURST), ("delayed", SLACK), ("delayed", PACED)):
        row = result["door"][kind][name]
        assert row["transit_slack_ms"] > 0
        if row["transit_longest_ms"] <= row["transit_slack_ms"]:
            assert (row["too_many"], row["worst_window_ratio"] <= 1) == (0, True), (kind, name)
    assert result["door"]["at_once"][PACED]["sent"] >= TINY.backend.count
    assert result["door"]["delayed"][SLACK]["sent"] >= TINY.backend.count / 2


def test_cost_of_a_permit_is_measured(result: dict[str, Any]):
    assert result["decisions"]["INCRBY"]["per_second"] > 0
    for name in (ONE, THREE):
        row = result["decisions"][name]
        assert 0 < row["of_incrby_lowest"] <= row["of_incrby"] <= row["of_incrby_highest"]
        assert row["round_trips_per_decision"] == pytest.approx(1, abs=0.2)
    binding = result["waiters"]["binding"][BURST]
    assert binding["grants_per_second"] > 0
    assert 0 < binding["round_trips_per_grant"] <= 1
    assert 8 <= result["bytes"][BURST]["bytes"] < 20  # a hash for each model beside 8 bytes a send
    assert 12 <= result["bytes"][BURST]["bytes_with_tokens"] < 30


@pytest.mark.parametrize("rival", RIVALS)
def test_rival_is_measured_or_the_reason_is_given(result: dict[str, Any], rival: str):
    why = missing(rival)
    assert result["left_out"].get(rival) == why
    if why is not None:
        assert rival in why
        pytest.skip(why)
    assert result["decisions"][rival]["per_second"] > 0
    for kind in ("at_once", "delayed"):
        assert rival not in TINY.backend_rivals or result["door"][kind][rival]["sent"] > 0
    assert result["bytes"][rival]["bytes"] > 0
    assert (rival in result["waiters"]["free"]) == (rival != "limits")


def test_goals_are_compared_with_measurements(result: dict[str, Any]):
    assert len(result["aims"]) == 7
    for aim in result["aims"]:
        compared = aim["seen"] >= aim["aim"] if "at least" in aim["what"] else aim["seen"] <= aim["aim"]
        assert aim["reached"] is compared


def test_requests_over_a_drain_are_measured(tmp_path: Path):
    result = interactive.measure(interactive.Size(seconds=6, asks=4, lines=("2/s", "60/min")), tmp_path)
    assert (result["asks"], result["breaches"]) == (4, 0)
    assert 0 <= result["wait_gaps"]["50"] <= result["wait_gaps"]["100"]
    assert set(result["models"]) == {"asked-0", "asked-1", "quiet-0", "quiet-1"}
    assert sum(row["asks"] for row in result["models"].values()) <= 4


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="token-throttle can be installed here")
def test_reason_for_a_rival_names_the_required_python():
    assert "Python 3.12" in str(missing("token-throttle"))
