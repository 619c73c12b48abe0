"""The nightly review on a real log: what it moves, what it leaves alone, and what happens when it dies."""

from __future__ import annotations

import threading
import time

import asyncpg
import psycopg2
import pytest

from router.database import connect, rows
from router.errors import DatabaseError
from router.learning.review import REVIEW_LOCK, ReviewBusy, grade_answers, rank_models, sum_evidence
from router.models.roster import read_roster, sync_roster
from router.settings.router import load_config
from tests.support.queue import without_classification
from tests.support.reviews import Log, shipped_learning

FIRST, SECOND, THIRD = "llama-3.3-70b", "deepseek-v3", "command-r-plus"  # for general, as shipped


@pytest.fixture
def log(database: str) -> Log:
    return Log(database)


def busy_days(log: Log, days: int = 3, calls: int = 200) -> None:
    for day in range(days):
        for model in (FIRST, SECOND, THIRD):
            log.add(model, calls, days_ago=day)


def test_an_empty_log_moves_nothing(log: Log) -> None:
    before = log.rankings()
    review = log.review()
    assert review.moves == ()
    assert any("no call that counts yet" in note for note in review.notes)
    assert log.rankings() == before


def test_one_call_moves_nothing(log: Log) -> None:
    log.add(SECOND, 1)
    before = log.places()
    review = log.review()
    assert (review.calls_summed, review.answers_graded) == (1, 1)
    assert log.places() == before


def test_a_model_that_fails_is_off_its_place_and_bounded(log: Log) -> None:
    busy_days(log)
    log.add(FIRST, 800, outcome="error")
    review = log.review()
    (move,) = [move for move in review.news if move.model == FIRST]
    assert (move.category, move.place_before, move.standing) == ("general", 1, "low")
    assert log.places()[SECOND] == 1
    (row,) = log.query("SELECT * FROM rankings WHERE category = 'general' AND model = %s", FIRST)
    assert row["most_share"] <= shipped_learning().exploration.share
    assert "below the floor" in move.reason


def test_a_model_with_only_failures_keeps_no_first_place(log: Log) -> None:
    log.add(FIRST, 100, outcome="timeout")
    log.add(SECOND, 100)
    log.review()
    assert log.places()[FIRST] > log.places()[SECOND]


def test_run_twice_it_changes_nothing_the_second_time(log: Log) -> None:
    busy_days(log)
    log.add(FIRST, 800, outcome="error")
    log.review()
    rankings, version = log.rankings(), log.version()
    again = log.review()
    assert again.news == ()
    assert again.answers_graded == 0
    assert [{**row, "review": None} for row in log.rankings()] == [
        {**row, "review": None} for row in rankings
    ]
    assert log.version() == version


async def test_workers_hear_of_the_new_order(log: Log) -> None:
    pool = await asyncpg.create_pool(log.url, min_size=1, max_size=1)
    try:
        before = await read_roster(pool)
        busy_days(log)
        log.add(FIRST, 800, outcome="error")
        log.review()
        after = await read_roster(pool)
    finally:
        await pool.close()
    assert after.version > before.version
    assert before.learned == {}
    assert after.places["general"][SECOND] == 1
    assert after.learned["general"][SECOND].quality > after.learned["general"][FIRST].quality
    assert after.learned["general"][FIRST].most_share < 1


def test_failures_that_are_the_operators_do_not_count(log: Log) -> None:
    busy_days(log)
    for outcome in ("rate_limited", "unsent", "abandoned", "lost"):
        log.add(FIRST, 300, outcome=outcome)
    review = log.review()
    assert log.places()[FIRST] == 1
    assert review.news == ()
    assert log.value("SELECT sum(excused) FROM evidence WHERE model = %s", FIRST) == 1200


def test_a_backend_that_is_down_for_all_counts_against_none(log: Log) -> None:
    busy_days(log)
    for model, calls in ((FIRST, 900), (SECOND, 100), (THIRD, 100)):
        log.add(model, calls, seconds=60, outcome="error")
    later = "UPDATE model_calls SET sent_at = sent_at + interval '2 hours' WHERE outcome = 'error'"
    log.query(later)  # no call of before or after stands beside them
    log.review()
    assert log.places()[FIRST] == 1
    assert log.value("SELECT sum(excused) FROM evidence WHERE model = %s", FIRST) == 900


def test_bad_answers_count_though_the_calls_went_well(log: Log) -> None:
    for model in (FIRST, SECOND, THIRD):
        log.add(model, 400, bad_answers=0.4 if model == FIRST else 0.0)
    review = log.review()
    assert review.answers_graded == pytest.approx(3 * 300, rel=0.15)  # a sample of each
    assert log.places()[FIRST] > 2
    assert log.value("SELECT count(*) FROM call_scores WHERE score = 0 AND reasons = '{empty}'") > 0


def test_feedback_moves_a_model_also_for_a_day_that_was_summed_up_long_ago(log: Log) -> None:
    for day in (4, 5):
        for model in (FIRST, SECOND, THIRD):
            log.add(model, 200, days_ago=day)
    log.review()
    assert log.places()[FIRST] == 1
    assert log.value("SELECT count(*) FROM evidence_periods WHERE closed") >= 2
    log.query(
        "SELECT record_feedback(id, CASE WHEN answered_by = %s THEN 0 ELSE 1 END, 'a reader') FROM tasks"
        " WHERE id %% 2 = 0", FIRST,
    )  # fmt: skip
    log.review()
    assert log.places()[FIRST] > 1


def test_slow_and_dear_models_move_down_where_answers_are_alike(log: Log) -> None:
    log.add(FIRST, 400, latency=120, cost=0.05)
    log.add(SECOND, 400, latency=3, cost=0.0005)
    log.add(THIRD, 400)
    log.review()
    places = log.places()
    assert places[SECOND] < places[THIRD] < places[FIRST]


def test_two_reviews_at_once(log: Log) -> None:
    with connect(log.url) as connection:
        rows(connection, "SELECT pg_advisory_lock(%s)", (REVIEW_LOCK,))
        for step in (
            log.review,
            lambda: grade_answers(log.url, shipped_learning()),
            lambda: sum_evidence(log.url, shipped_learning()),
            lambda: rank_models(log.url, shipped_learning(), by="another"),
        ):
            with pytest.raises(ReviewBusy, match="Another review"):
                step()
    log.review()


def test_the_steps_one_by_one_come_to_the_same(log: Log) -> None:
    busy_days(log)
    log.add(FIRST, 800, outcome="error")
    learning = shipped_learning()
    assert grade_answers(log.url, learning) > 0
    assert grade_answers(log.url, learning) == 0
    assert sum_evidence(log.url, learning) == 3 * 600 + 800
    assert sum_evidence(log.url, learning) == 2 * 600 + 800  # the oldest day is closed now
    assert rank_models(log.url, learning, by="a test").news
    assert log.places()[SECOND] == 1


def test_a_review_that_dies_leaves_the_old_ranking_in_force(log: Log) -> None:
    busy_days(log)
    log.add(FIRST, 800, outcome="error")
    log.query(
        "CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'the machine died'; END $$;"
        " CREATE TRIGGER zz_die AFTER UPDATE ON rankings FOR EACH STATEMENT EXECUTE FUNCTION die()"
    )
    before = log.rankings()
    with pytest.raises(DatabaseError, match="the machine died"):
        log.review()
    assert log.rankings() == before
    assert log.query("SELECT * FROM reviews") == []
    log.query("DROP TRIGGER zz_die ON rankings")
    assert log.review().news


def test_a_review_whose_connection_is_cut_leaves_the_old_ranking_in_force(log: Log) -> None:
    busy_days(log)
    log.add(FIRST, 800, outcome="error")
    before = log.rankings()
    with connect(log.url) as blocker:  # the review has to wait for this table, in the middle
        rows(blocker, "LOCK TABLE rankings IN SHARE ROW EXCLUSIVE MODE")
        died: list[Exception] = []

        def review() -> None:
            try:
                log.review()
            except (DatabaseError, psycopg2.Error) as error:
                died.append(error)

        thread = threading.Thread(target=review)
        thread.start()
        deadline = time.monotonic() + 30
        cut = (
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE query LIKE 'LOCK TABLE rankings%%' AND wait_event_type = 'Lock'"
        )
        while not log.query(cut):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        thread.join(30)
    assert died
    assert log.rankings() == before
    assert log.query("SELECT * FROM reviews") == []
    assert log.review().news


def test_a_dry_run_keeps_nothing(log: Log) -> None:
    busy_days(log)
    log.add(FIRST, 800, outcome="error")
    before, version = log.rankings(), log.version()
    review = log.review(dry_run=True)
    assert review.review is None
    assert FIRST in {move.model for move in review.news}
    assert (log.rankings(), log.version()) == (before, version)
    for table in ("reviews", "review_places", "evidence", "evidence_periods", "call_scores"):
        assert log.value(f"SELECT count(*) FROM {table}") == 0, table


def test_undo_restores_and_is_kept_for_some_periods(log: Log) -> None:
    busy_days(log)
    log.add(FIRST, 800, outcome="error")
    before = log.rankings()
    log.review()
    (undone,) = log.query("SELECT * FROM undo_review('an operator')")
    assert undone["undone"] is not None
    assert [{**row, "review": None} for row in log.rankings()] == before
    review = log.review()
    assert log.places()[FIRST] == 1
    assert any("kept as undo" in note for note in review.notes)
    assert log.review(shipped_learning(undo_periods=0)).news
    assert log.places()[FIRST] > 1


def test_nothing_to_undo(log: Log) -> None:
    assert log.query("SELECT * FROM undo_review('an operator')") == [{"review": None, "undone": None}]


def test_a_category_that_vanished_from_config(log: Log) -> None:
    busy_days(log)
    log.add(FIRST, 100, category="poetry")
    log.query("INSERT INTO rankings (category, model, place) VALUES ('poetry', %s, 1)", FIRST)
    review = log.review()
    assert any(note.startswith("poetry: no category of the config") for note in review.notes)
    assert "poetry" not in {move.category for move in review.moves}


def test_a_clock_that_went_back(log: Log) -> None:
    busy_days(log)
    log.add(FIRST, 400, days_ago=-2, outcome="error")  # written when the clock was two days ahead
    log.review()
    assert log.places()[FIRST] > 1
    assert log.review().news == ()


def test_a_fallbacks_calls_tell_nothing_of_a_models_own(log: Log) -> None:
    busy_days(log)
    log.add(FIRST, 800, outcome="error", rank=2)
    assert log.review().news == ()


def test_what_was_learned_outlives_a_sync_until_people_change_the_place(log: Log) -> None:
    busy_days(log)
    log.add(FIRST, 800, outcome="error")
    log.review()
    config = without_classification(load_config())
    with connect(log.url) as connection:
        sync_roster(connection, config)
    assert log.places()[FIRST] > 1
    model = config.models[FIRST]
    changed = model.model_copy(update={"ranks": {**model.ranks, "general": 2}})
    with connect(log.url) as connection:
        sync_roster(connection, config.model_copy(update={"models": {**config.models, FIRST: changed}}))
    assert log.places()[FIRST] == 2
    (row,) = log.query("SELECT * FROM rankings WHERE category = 'general' AND model = %s", FIRST)
    assert (row["most_share"], row["standing"]) == (1, "ranked")


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_million_calls_are_reviewed_in_a_minute(log: Log) -> None:
    models = [row["model"] for row in log.query("SELECT model FROM roster ORDER BY model")]
    for place, model in enumerate(models):
        for category in ("technical", "creative", "general"):
            log.add(
                model, 33_334, category=category, seconds=80_000, days_ago=1, latency=5 + place,
                bad_answers=0.02 * place, outcome="answered",
            )  # fmt: skip
    log.query("ANALYZE")
    began = time.monotonic()
    review = log.review()
    seconds = time.monotonic() - began
    assert review.calls_summed >= 1_000_000
    assert review.news
    assert log.review().news == ()
    assert seconds <= 60
