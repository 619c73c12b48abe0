"""The demo of learning in a short form: a few days on a fast clock, with real parts; what is said of them."""

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
from bench.learning_demo.cast import FAILING, NEWCOMERS
from bench.learning_demo.plot import draw
from bench.learning_demo.report import summary_lines
from bench.learning_demo.script import Script
from bench.learning_demo.story import SIDES, WITH, WITHOUT, Story
from tests.support.waiting import until

ROOT = Path(__file__).parents[3]
WIDTH = 100
# So few calls a day need a model that fails for sure.
SHORT = Script(
    days=3,
    period_seconds=4,
    tasks=270,
    asked=12,
    rate=30,
    trial_prompts=15,
    failing_share=0.6,
    failing_quality=0.0,
)


@pytest.fixture(scope="module")
def told() -> tuple[Story, str]:
    """The story of SHORT, and what a terminal shows of it."""
    console = Console(file=io.StringIO(), width=WIDTH)
    story = play(SHORT, threading.Event(), console)
    assert story is not None
    assert isinstance(console.file, io.StringIO)
    return story, console.file.getvalue()


@pytest.mark.soak
def test_a_model_that_begins_to_fail_is_off_its_first_place_at_the_next_review(
    told: tuple[Story, str],
) -> None:
    story, text = told
    begins = SHORT.failing_days.start
    first_after = {day.number: day.night.first("technical") for day in story.days}
    assert first_after[begins - 1] == FAILING
    assert first_after[begins] != FAILING
    assert story.failing.reviews_until_off == 1
    assert "off its first place at review 1 after that" in text


@pytest.mark.soak
def test_afterwards_it_gets_no_more_than_the_exploration_share(told: tuple[Story, str]) -> None:
    story, _ = told
    share = SHORT.learning().exploration.share
    tasks = sum(task.category == "technical" for task in SHORT.day(1))
    ahead = 4 / tasks  # two calls that a bounded model may save up, and what was ahead
    assert story.failing.shares
    assert max(story.failing.shares) <= share + ahead
    assert min(story.failing.shares_without) > max(story.failing.shares)


@pytest.mark.soak
def test_the_same_prompts_on_both_sides_and_all_of_them_end(told: tuple[Story, str]) -> None:
    story, _ = told
    for day in story.days:
        one, other = (day.sides[side].tasks for side in SIDES)
        assert [task.key for task in one] == [task.key for task in other]
        assert len(one) == SHORT.tasks + SHORT.asked
        asked = [task for task in (*one, *other) if task.asked]
        assert all(task.seconds is not None for task in asked)
    # What is not taught is not learned: the other side keeps the order of the file.
    assert all(len(day.sides[WITHOUT].tasks) for day in story.days)
    assert 0.5 < story.totals(WITHOUT).good < 1
    assert 0.5 < story.totals(WITH).good < 1


@pytest.mark.soak
def test_the_search_says_what_it_found_tried_and_could_not_call(told: tuple[Story, str]) -> None:
    story, text = told
    tried = {line.split()[1] for _, line in story.searched if " lost: " in line or " taken: " in line}
    assert tried >= {newcomer.model for newcomer in NEWCOMERS}
    assert any(line.startswith("unreachable") for _, line in story.searched)
    assert "models found" in text


@pytest.mark.soak
def test_it_can_be_read_in_a_terminal_of_a_hundred_columns(told: tuple[Story, str]) -> None:
    story, text = told
    assert max(map(len, text.splitlines())) <= WIDTH
    for day in story.days:
        assert f"Day {day.number} of {SHORT.days}" in text
    assert all(line.strip() for line in summary_lines(story))


@pytest.mark.soak
def test_the_numbers_and_the_picture(told: tuple[Story, str], tmp_path: Path) -> None:
    story, _ = told
    document = json.loads(json.dumps(story.as_json()))
    assert set(document["sides"]) == {WITH, WITHOUT}
    assert document["failing"]["reviews_until_off"] == 1
    assert len(document["nights"]) == SHORT.days
    draw(story, tmp_path / "learning.svg")
    picture = (tmp_path / "learning.svg").read_text()
    assert picture.lstrip().startswith("<?xml")


@pytest.fixture
def temporary(tmp_path: Path) -> Iterator[Path]:
    """Where the demo keeps its data; PostgreSQL's own user must get there."""
    folder = Path(tempfile.mkdtemp(prefix="router-test-demo-"))
    yield folder
    folder.rmdir()  # fails if anything was left behind


def test_ctrl_c_in_the_middle_of_a_day_leaves_nothing_behind(temporary: Path) -> None:
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
def test_a_wrong_argument_is_refused_in_words(
    wrong: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*wrong])
    assert f"argument {wrong[0]}" in capsys.readouterr().err
