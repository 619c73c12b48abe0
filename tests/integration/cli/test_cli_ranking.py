"""`router ranking`, `router review` and `router feedback` on a real PostgreSQL."""

from __future__ import annotations

import pytest

from tests.support.command_line import CommandLine
from tests.support.reviews import Log

FIRST, SECOND = "llama-3.3-70b", "deepseek-v3"


@pytest.fixture
def router(database: str) -> CommandLine:
    return CommandLine({"ROUTER_DATABASE_URL": database})


@pytest.fixture
def log(database: str) -> Log:
    """A log in which the first model for general fails."""
    made = Log(database)
    made.add(FIRST, 100, days_ago=1)
    made.add(SECOND, 100, days_ago=1)
    made.add(SECOND, 100)
    made.add(FIRST, 300, outcome="error")
    return made


def test_a_dry_run_a_review_and_its_undo(router: CommandLine, log: Log) -> None:
    dry = router("review", "--dry-run")
    assert dry.code == 0, dry.err
    assert "Dry run" in dry.out
    assert log.places()[FIRST] == 1
    done = router("review", "--json", "--by", "an operator").json
    assert done["calls_summed"] == 600
    assert {move["model"] for move in done["moves"]} >= {FIRST, SECOND}
    assert "no changes" in router("review").out
    (newest, before) = router("ranking", "--history", "--json", "--category", "general").json
    assert (newest["moves"], before["by"]) == ([], "an operator")
    moved = {move["model"]: move for move in before["moves"]}
    assert (moved[FIRST]["place_before"], moved[FIRST]["standing"]) == (1, "low")
    assert moved[FIRST]["evidence"]["success"] < 0.4
    undone = router("ranking", "undo", "--json").json
    assert undone["undone"] == before["review"]
    assert log.places()[FIRST] == 1
    assert f"undo of {before['review']}" in router("ranking", "--history").out
    again = router("ranking", "undo")
    assert again.code == 1
    assert "no review to undo" in again.err.lower()


def test_the_ranking_is_shown_and_explained(router: CommandLine, log: Log) -> None:
    assert "as configured" in router("ranking").out
    unranked = router("ranking", "explain", FIRST, "general")
    assert "No review has ranked it" in unranked.out
    router("review")
    order = router("ranking", "--category", "general", "--json").json
    assert list(order) == ["general"]
    assert order["general"][0]["model"] == SECOND
    shown = router("ranking").out
    assert "share" in shown
    assert "below" in shown  # the table may wrap between words
    explained = router("ranking", "explain", FIRST, "general")
    for words in ("rank 10 of 10", "below the floor", "answered", "dropped after a change", "at most"):
        assert words in explained.out, explained.out
    assert router("ranking", "explain", SECOND, "general", "--json").json["evidence"]["success"] > 0.9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ranking", "--category", "poetry"), "There is no category 'poetry'"),
        (("ranking", "explain", "llama-3.3-7b", "general"), "did you mean 'llama-3.3-70b'?"),
        (("ranking", "explain", FIRST, "genral"), "did you mean 'general'?"),
        (("feedback", "999999", "good"), "Task 999999 has no model's answer"),
        (("feedback", "1", "great"), "Invalid verdict 'great'"),
        (("feedback", "1", "1.5"), "Invalid verdict '1.5'"),
        (("feedback", "1", "nan"), "Invalid verdict 'nan'"),
    ],
)  # fmt: skip
def test_invalid_arguments_are_reported(
    router: CommandLine, log: Log, arguments: tuple[str, ...], words: str
) -> None:
    result = router(*arguments)
    assert result.code == 1
    assert words in result.err


def test_feedback_is_recorded_for_the_answering_model(router: CommandLine, log: Log) -> None:
    task = log.value("SELECT min(id) FROM tasks WHERE answered_by = %s", SECOND)
    assert SECOND in router("feedback", task, "good", "--by", "a reader").out
    assert router("feedback", task, "0.25", "--by", "a reader").code == 0
    (row,) = log.query("SELECT score, scored_by FROM call_scores WHERE source = 'feedback'")
    assert row == {"score": 0.25, "scored_by": "a reader"}


def test_a_missing_config_is_reported(router: CommandLine, log: Log, tmp_path: object) -> None:
    (tmp_path / "learning.yaml").write_text("categories: {poetry: {cost: 1}}")  # type: ignore[operator]
    environment = {**router.environment, "ROUTER_CONFIG": str(tmp_path)}
    assert "models.yaml does not exist" in CommandLine(environment)("review").err
