"""A short form of the learning demo: three days on a fast clock, with real services."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from bench.learning_demo.__main__ import main, play
from bench.learning_demo.report import draw, summary_lines
from bench.learning_demo.scenario import CANDIDATES, FAILING, Scenario
from bench.learning_demo.story import SIDES, WITH, WITHOUT, Story
from tests.support.waiting import until

ROOT = Path(__file__).parents[3]
WIDTH = 100
# With so few calls a day the failure has to be certain.
SHORT = Scenario(
    days=3,
    period_seconds=4,
    tasks=270,
    interactive=12,
    rate=30,
    trial_prompts=15,
    failing_share=0.6,
    failing_quality=0.0,
)


@pytest.fixture(scope="module")
def played() -> tuple[Story, str]:
    """The story of SHORT and its terminal output."""
    console = Console(file=io.StringIO(), width=WIDTH)
    story = play(SHORT, threading.Event(), console)
    assert story is not None
    assert isinstance(console.file, io.StringIO)
    return story, console.file.getvalue()


@pytest.mark.soak
def test_a_failing_model_loses_its_first_rank_at_the_next_review(
    played: tuple[Story, str],
) -> None:
    story, text = played
    begins = SHORT.failing_days.start
    first_after = {day.number: day.night.first("technical") for day in story.days}
    assert first_after[begins - 1] == FAILING
    assert first_after[begins] != FAILING
    assert story.failing["reviews_until_off"] == 1
    assert "off the first rank at review 1 after that" in " ".join(text.split())


@pytest.mark.soak
def test_a_failing_model_gets_no_more_than_the_exploration_share(played: tuple[Story, str]) -> None:
    story, _ = played
    share = SHORT.learning().exploration.share
    tasks = sum(task.category == "technical" for task in SHORT.day(1))
    ahead = 4 / tasks  # two calls that a bounded model may save up, and calls ahead
    failing = story.failing
    assert failing["shares"]
    assert max(failing["shares"]) <= share + ahead
    assert min(failing["shares_without"]) > max(failing["shares"])


@pytest.mark.soak
def test_both_sides_end_all_of_the_same_prompts(played: tuple[Story, str]) -> None:
    story, _ = played
    for day in story.days:
        one, other = (day.sides[side].tasks for side in SIDES)
        assert [task.key for task in one] == [task.key for task in other]
        assert len(one) == SHORT.tasks + SHORT.interactive
        asked = [task for task in (*one, *other) if task.interactive]
        assert all(task.seconds is not None for task in asked)
    assert all(len(day.sides[WITHOUT].tasks) for day in story.days)
    assert 0.5 < story.totals(WITHOUT)["good"] < 1
    assert 0.5 < story.totals(WITH)["good"] < 1


@pytest.mark.soak
def test_discovery_reports_found_tried_and_unreachable_models(played: tuple[Story, str]) -> None:
    story, text = played
    tried = {line.split()[1] for _, line in story.discovery if " lost: " in line or " taken: " in line}
    assert tried >= {candidate.model for candidate in CANDIDATES}
    assert any(line.startswith("unreachable") for _, line in story.discovery)
    assert "models found" in text


@pytest.mark.soak
def test_the_output_fits_a_terminal_of_a_hundred_columns(played: tuple[Story, str]) -> None:
    story, text = played
    assert max(map(len, text.splitlines())) <= WIDTH
    for day in story.days:
        assert f"Day {day.number} of {SHORT.days}" in text
    assert all(line.strip() for line in summary_lines(story))


@pytest.mark.soak
def test_the_results_are_written_as_json_and_as_a_picture(played: tuple[Story, str], tmp_path: Path) -> None:
    story, _ = played
    document = json.loads(json.dumps(story.as_json()))
    assert set(document["sides"]) == {WITH, WITHOUT}
    assert document["failing"]["reviews_until_off"] == 1
    assert len(document["nights"]) == SHORT.days
    draw(story, tmp_path / "learning.svg")
    picture = (tmp_path / "learning.svg").read_text()
    assert picture.lstrip().startswith("<?xml")


@pytest.fixture
def temporary(tmp_path: Path) -> Iterator[Path]:
    """The demo's data folder, which PostgreSQL's own user has to reach."""
    folder = Path(tempfile.mkdtemp(prefix="router-test-demo-"))
    yield folder
    folder.rmdir()  # fails if anything was left behind


def test_ctrl_c_during_a_day_leaves_no_process_or_file_behind(temporary: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(temporary), "COLUMNS": str(WIDTH)}
    command = [sys.executable, "-m", "bench.learning_demo", "--days", "3", "--tasks", "3000"]
    shown = []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as demo:
        assert demo.stdout is not None
        try:
            for line in demo.stdout:
                shown.append(line)
                if "Day 1 of 3" in line:
                    break
            parts = psutil.Process(demo.pid).children(recursive=True)
            assert len(parts) >= 4
            demo.send_signal(signal.SIGINT)
            shown.append(demo.stdout.read())
            assert demo.wait(30) == 0, "".join(shown)
        finally:
            demo.kill()
    assert "Traceback" not in "".join(shown)
    until(lambda: not any(part.is_running() for part in parts), 10)


@pytest.mark.parametrize("wrong", [("--days", "2"), ("--days", "61"), ("--tasks", "0")])
def test_an_invalid_argument_is_named(wrong: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*wrong])
    assert f"argument {wrong[0]}" in capsys.readouterr().err
