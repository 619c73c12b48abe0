"""The nightly review of a call log in Postgres: changes, unchanged rankings, and crashes."""

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
from router.task import Outcome
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


def test_an_empty_log_changes_nothing(log: Log) -> None:
    before = log.rankings()
    review = log.review()
    assert review.ranked == ()
    assert any("no evidence yet" in note for note in review.notes)
    assert log.rankings() == before


def test_one_call_changes_nothing(log: Log) -> None:
    log.add(SECOND, 1)
    before = log.places()
    review = log.review()
    assert (review.calls_summed, review.answers_graded) == (1, 1)
    assert log.places() == before


def test_a_failing_model_loses_its_rank_and_is_bounded(log: Log) -> None:
    busy_days(log)
    log.add(FIRST, 800, outcome="error")
    review = log.review()
    (change,) = [change for change in review.changes if change.model == FIRST]
    assert (change.category, change.place_before, change.standing) == ("general", 1, "low")
    assert log.places()[SECOND] == 1
    (row,) = log.query("SELECT * FROM rankings WHERE category = 'general' AND model = %s", FIRST)
    assert row["most_share"] <= shipped_learning().exploration.share
    assert "below the floor" in change.reason


def test_a_model_with_only_failures_is_not_first(log: Log) -> None:
    log.add(FIRST, 100, outcome="timeout")
    log.add(SECOND, 100)
    log.review()
    assert log.places()[FIRST] > log.places()[SECOND]


def test_a_second_review_changes_nothing(log: Log) -> None:
    busy_days(log)
    log.add(FIRST, 800, outcome="error")
    log.review()
    rankings, version = log.rankings(), log.version()
    again = log.review()
    assert again.changes == ()
    assert again.answers_graded == 0
    assert [{**row, "review": None} for row in log.rankings()] == [
        {**row, "review": None} for row in rankings
    ]
    assert log.version() == version


async def test_workers_read_the_new_ranking(log: Log) -> None:
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


@pytest.mark.parametrize("outcome", [one.value for one in Outcome if not one.is_evidence])
def test_outcomes_that_are_not_the_models_do_not_count(log: Log, outcome: str) -> None:
    """Of the quota, the prompt, the backend or the client: as many calls as there are others move nothing."""
    busy_days(log)
    log.add(FIRST, 600, outcome=outcome)
    assert log.review().changes == ()
    assert log.places()[FIRST] == 1
    assert log.value("SELECT sum(excused) FROM evidence WHERE model = %s", FIRST) == 600


@pytest.mark.parametrize(("first", "other"), [("error", "answered"), ("answered", "error")])
def test_calls_to_a_named_model_do_not_count(log: Log, first: str, other: str) -> None:
    """Neither failures that a client causes, nor prompts that only this model answers."""
    busy_days(log)
    log.add(FIRST, 800, outcome=first, role="named")
    log.add(SECOND, 800, outcome=other, role="named")
    review = log.review()
    assert (review.changes, review.calls_summed) == ((), 3 * 3 * 200)
    graded = "SELECT count(*) FROM call_scores JOIN model_calls USING (call_id) WHERE role = 'named'"
    assert log.value(graded) == 0


@pytest.mark.parametrize("flood", [500, 5_000])
def test_one_clients_failures_weigh_no_more_than_its_share(log: Log, flood: int) -> None:
    for client in ("ann", "bob", "cem", "dora"):
        for model in (FIRST, SECOND, THIRD):
            log.add(model, 100, client=client)
    log.add(FIRST, flood, client="mallory", outcome="error")
    log.review()
    (row,) = log.query("SELECT evidence FROM review_places WHERE model = %s AND category = 'general'", FIRST)
    share = shipped_learning().max_client_share
    assert row["evidence"]["calls"] == pytest.approx(400 / (1 - share), abs=1)
    (mallory,) = log.query("SELECT calls, answered FROM evidence WHERE client = 'mallory'")
    assert (mallory["calls"], mallory["answered"]) == (flood, 0)


def test_each_client_has_an_equal_part_of_the_graded_answers(log: Log) -> None:
    for client, calls in (("ann", 2000), ("bob", 500), ("cem", 30)):
        log.add(FIRST, calls, client=client)
    log.review()
    found = log.query(
        "SELECT c.client, count(*) AS n FROM call_scores JOIN model_calls c USING (call_id) GROUP BY 1"
    )
    graded = {row["client"]: row["n"] for row in found}
    assert graded["cem"] == 30
    assert graded["ann"] == pytest.approx(135, rel=0.3)
    assert graded["bob"] == pytest.approx(135, rel=0.3)


def test_small_clients_share_a_row_of_evidence(log: Log) -> None:
    for number in range(30):
        log.add(FIRST, 5 + number, client=f"c{number}")
    log.review()
    found = {r["client"]: r["calls"] for r in log.query("SELECT client, calls FROM evidence")}
    assert (len(found), found["*"], sum(found.values())) == (21, sum(range(5, 15)), 30 * 5 + sum(range(30)))


def test_feedback_counts_once_per_client_and_task(log: Log) -> None:
    """The last rating of a client counts, also where an earlier answer of the task had another model."""
    log.add(FIRST, 1)
    log.add(SECOND, 1)
    (first,) = log.query("SELECT id, answer_call_id AS call FROM tasks WHERE answered_by = %s", FIRST)
    (second,) = log.query("SELECT id, answer_call_id AS call FROM tasks WHERE answered_by = %s", SECOND)
    for by, score in (("ann", 1.0), ("ann", 0.0), ("bob", 1.0)):
        log.query("SELECT record_feedback(%s, %s::real, %s)", first["id"], score, by)
    log.query("UPDATE model_calls SET task_id = %s WHERE call_id = %s", first["id"], second["call"])
    log.query("UPDATE tasks SET answer_call_id = %s, answered_by = %s WHERE id = %s",
              second["call"], SECOND, first["id"])  # fmt: skip
    assert log.value("SELECT record_feedback(%s, 0.5::real, 'ann')", first["id"]) == SECOND
    found = log.query("SELECT call_id::text, rater, score FROM call_scores WHERE source = 'feedback'")
    assert sorted((row["call_id"], row["rater"], row["score"]) for row in found) == sorted(
        [(first["call"], "bob", 1.0), (second["call"], "ann", 0.5)]
    )
    log.review()
    rated = "SELECT model, client, scores -> 'feedback' -> 0 AS n FROM evidence WHERE scores ? 'feedback'"
    assert {(r["model"], r["client"], r["n"]) for r in log.query(rated)} == {
        (FIRST, "bob", 1), (SECOND, "ann", 1),
    }  # fmt: skip


def test_an_outage_of_the_backend_does_not_count(log: Log) -> None:
    busy_days(log)
    for model, calls in ((FIRST, 900), (SECOND, 100), (THIRD, 100)):
        log.add(model, calls, seconds=60, outcome="error")
    later = "UPDATE model_calls SET sent_at = sent_at + interval '2 hours' WHERE outcome = 'error'"
    log.query(later)  # apart from all other calls
    log.review()
    assert log.places()[FIRST] == 1
    assert log.value("SELECT sum(excused) FROM evidence WHERE model = %s", FIRST) == 900


def test_bad_answers_of_successful_calls_count(log: Log) -> None:
    for model in (FIRST, SECOND, THIRD):
        log.add(model, 400, bad_answers=0.4 if model == FIRST else 0.0)
    review = log.review()
    assert review.answers_graded == pytest.approx(3 * 300, rel=0.15)  # a sample of each
    assert log.places()[FIRST] > 2
    assert log.value("SELECT count(*) FROM call_scores WHERE score = 0 AND reasons = '{empty}'") > 0


def test_feedback_counts_for_days_that_were_summed_up_before(log: Log) -> None:
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


def test_slow_and_costly_models_move_down_if_answers_are_alike(log: Log) -> None:
    log.add(FIRST, 400, latency=120, cost=0.05)
    log.add(SECOND, 400, latency=3, cost=0.0005)
    log.add(THIRD, 400)
    log.review()
    places = log.places()
    assert places[SECOND] < places[THIRD] < places[FIRST]


def test_concurrent_reviews_are_refused(log: Log) -> None:
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


def test_single_steps_give_the_same_result(log: Log) -> None:
    busy_days(log)
    log.add(FIRST, 800, outcome="error")
    learning = shipped_learning()
    assert grade_answers(log.url, learning) > 0
    assert grade_answers(log.url, learning) == 0
    assert sum_evidence(log.url, learning) == 3 * 600 + 800
    assert sum_evidence(log.url, learning) == 2 * 600 + 800  # the oldest day is closed now
    assert rank_models(log.url, learning, by="a test").changes
    assert log.places()[SECOND] == 1


def test_a_failed_review_leaves_the_old_ranking_active(log: Log) -> None:
    busy_days(log)
    log.add(FIRST, 800, outcome="error")
    log.query(
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'crashed'; END $$;"
        " CREATE TRIGGER zz_fail AFTER UPDATE ON rankings FOR EACH STATEMENT EXECUTE FUNCTION fail()"
    )
    before = log.rankings()
    with pytest.raises(DatabaseError, match="crashed"):
        log.review()
    assert log.rankings() == before
    assert log.query("SELECT * FROM reviews") == []
    log.query("DROP TRIGGER zz_fail ON rankings")
    assert log.review().changes


def test_a_lost_connection_leaves_the_old_ranking_active(log: Log) -> None:
    busy_days(log)
    log.add(FIRST, 800, outcome="error")
    before = log.rankings()
    with connect(log.url) as blocker:  # the review has to wait for this table, in the middle
        rows(blocker, "LOCK TABLE rankings IN SHARE ROW EXCLUSIVE MODE")
        errors: list[Exception] = []

        def review() -> None:
            try:
                log.review()
            except (DatabaseError, psycopg2.Error) as error:
                errors.append(error)

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
    assert errors
    assert log.rankings() == before
    assert log.query("SELECT * FROM reviews") == []
    assert log.review().changes


def test_a_dry_run_stores_nothing(log: Log) -> None:
    busy_days(log)
    log.add(FIRST, 800, outcome="error")
    before, version = log.rankings(), log.version()
    review = log.review(dry_run=True)
    assert review.review is None
    assert FIRST in {change.model for change in review.changes}
    assert (log.rankings(), log.version()) == (before, version)
    for table in ("reviews", "review_places", "evidence", "evidence_periods", "call_scores"):
        assert log.value(f"SELECT count(*) FROM {table}") == 0, table


def test_undo_restores_the_ranking_for_some_periods(log: Log) -> None:
    busy_days(log)
    log.add(FIRST, 800, outcome="error")
    before = log.rankings()
    log.review()
    (undone,) = log.query("SELECT * FROM undo_review('an operator')")
    assert undone["undone"] is not None
    assert [{**row, "review": None} for row in log.rankings()] == before
    review = log.review()
    assert log.places()[FIRST] == 1
    assert any("after undo" in note for note in review.notes)
    assert log.review(shipped_learning(undo_periods=0)).changes
    assert log.places()[FIRST] > 1


def test_undo_without_a_review_does_nothing(log: Log) -> None:
    assert log.query("SELECT * FROM undo_review('an operator')") == [{"review": None, "undone": None}]


def test_a_category_removed_from_the_config_is_left_unchanged(log: Log) -> None:
    busy_days(log)
    log.add(FIRST, 100, category="poetry")
    log.query("INSERT INTO rankings (category, model, place) VALUES ('poetry', %s, 1)", FIRST)
    review = log.review()
    assert any(note.startswith("poetry: not in the config") for note in review.notes)
    assert "poetry" not in {change.category for change in review.ranked}


def test_calls_after_now_count(log: Log) -> None:
    busy_days(log)
    log.add(FIRST, 400, days_ago=-2, outcome="error")  # written when the clock was two days ahead
    log.review()
    assert log.places()[FIRST] > 1
    assert log.review().changes == ()


def test_calls_as_a_fallback_are_not_evidence(log: Log) -> None:
    busy_days(log)
    log.add(FIRST, 800, outcome="error", rank=2)
    assert log.review().changes == ()


def test_a_ranking_survives_a_sync_until_its_rank_is_edited(log: Log) -> None:
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
    assert review.changes
    assert log.review().changes == ()
    assert seconds <= 60
