"""A small form of the comparison bench: both flows on real services."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import side_by_side
from bench.old_vs_new import losses, main
from bench.old_vs_new_plot import draw
from bench.schedules import OldShape
from bench.side_by_side import Bench, Parts, Result, measure, prompts
from local.postgres import PostgresServer
from local.redis import RedisServer
from models_backend.answers import compose_answer
from router.database import connect, rows

TASKS = 60
SMALL = Bench(tasks=TASKS, time_scale=60.0, old=OldShape(workers=5, batch=4, limit_seconds=200.0))


@pytest.fixture(scope="module")
def result(
    postgres: PostgresServer, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Result:
    return measure("even", SMALL, Parts(postgres, redis_server, tmp_path_factory.mktemp("bench")))


@pytest.mark.soak
def test_both_flows_solve_every_task_with_one_call_each(result: Result, postgres: PostgresServer):
    for database in ("old_even", "new_even"):
        with connect(postgres.url(database)) as connection:
            found = rows(connection, "SELECT status, count(*) AS tasks FROM tasks GROUP BY 1")
        assert found == [{"status": "solved", "tasks": TASKS}]
    assert result.old.calls == result.new.calls == TASKS
    assert result.old.answered[-1] == result.new.answered[-1] == TASKS


def test_both_flows_keep_to_the_same_concurrency(result: Result):
    assert result.old.most_at_once <= SMALL.old.at_once
    assert result.new.most_at_once <= SMALL.old.at_once


def test_the_old_flow_matches_its_simulation_and_nothing_beats_the_lower_bound(result: Result):
    assert result.old_runs == result.old_simulated.runs > 1
    assert result.old.seconds >= result.old_simulated.seconds * 0.999
    drawn = side_by_side.drawn_latencies("even", TASKS, SMALL.seed)
    assert result.new.seconds >= max(sum(drawn) / SMALL.old.at_once, *drawn) * 0.999
    assert result.gain == pytest.approx(result.share * result.ideal_gain)


@pytest.mark.soak
def test_the_plot_is_written(result: Result, tmp_path: Path):
    draw([result], SMALL.old.at_once, tmp_path / "small.png")
    assert (tmp_path / "small.png").read_bytes().startswith(b"\x89PNG")


def test_the_stand_in_answers_every_prompt_of_the_bench():
    texts = prompts(600, seed=1)
    assert len(set(texts)) == 600
    assert all(compose_answer(side_by_side.ENDPOINT, text, seed=1).text.strip() for text in texts)


def test_the_shares_of_the_old_flows_time_add_up_to_one():
    assert sum(losses("lognormal", Bench(tasks=1000))["shares"].values()) == pytest.approx(1.0)


def test_the_old_flows_losses_are_computed_without_a_run(capsys: pytest.CaptureFixture[str]):
    assert main(["--computed", "--json", "--tasks", "500", "--shapes", "even"]) == 0
    found = json.loads(capsys.readouterr().out)["even"]
    assert found["gain_without"]["slowest of ten"] > 1.3
    assert found["over_quota"]["calls_a_task"] > 1
