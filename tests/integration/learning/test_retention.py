"""Retention: drops old days that are summed up, and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from router.database import connect, rows
from router.errors import DatabaseError
from router.learning.retention import Retention, drop_old_calls
from router.learning.review import REVIEW_LOCK, ReviewBusy
from router.settings.learning import LearningSettings
from tests.support.reviews import Log, shipped_learning
from tests.support.waiting import until

MODEL, OTHER = "llama-3.3-70b", "deepseek-v3"
OLD = (9, 8, 7)  # days ago


@pytest.fixture
def log(database: str) -> Log:
    log = Log(database)
    for day in (*OLD, 2):
        with_partition(log, day)
        log.add(MODEL, 20, days_ago=day)
    return log


def with_partition(log: Log, days_ago: int) -> None:
    log.query(
        "SELECT make_call_partition(date_trunc('day', now(), 'UTC') - make_interval(hours => 24 * %s))"
        " WHERE to_regclass(%s) IS NULL",
        days_ago,
        day(log, days_ago),
    )


def day(log: Log, days_ago: int) -> str:
    name = "SELECT 'model_calls_' || to_char((now() AT TIME ZONE 'UTC')::date - %s, 'YYYYMMDD')"
    return str(log.value(name, days_ago))


def days(log: Log, ago: Sequence[int] = OLD) -> tuple[str, ...]:
    return tuple(day(log, one) for one in ago)


def partitions(log: Log) -> set[str]:
    found = log.query(
        "SELECT inhrelid::regclass::text AS name FROM pg_inherits WHERE inhparent = 'model_calls'::regclass"
    )
    return {row["name"] for row in found}


def dropped(log: Log, *, dry_run: bool = False, **changes: object) -> Retention:
    return drop_old_calls(log.url, keeping(**changes), dry_run=dry_run)


def keeping(**changes: object) -> LearningSettings:
    return shipped_learning(**{"retention_days": 5, **changes})


def test_summed_up_days_are_dropped_and_their_evidence_stays(log: Log) -> None:
    log.review()
    before, evidence = partitions(log), log.query("SELECT * FROM evidence ORDER BY period")
    gone = dropped(log)
    assert gone.days == days(log)
    assert gone.bytes_freed > 0
    assert gone.kept == ()
    assert before - partitions(log) == set(days(log))
    assert log.value("SELECT count(*) FROM model_calls") == 20
    again = dropped(log)
    assert (again.days, again.kept) == ((), ())
    assert log.review().changes == ()
    assert log.query("SELECT * FROM evidence ORDER BY period") == evidence


def test_days_that_are_not_summed_up_are_kept(log: Log) -> None:
    gone = dropped(log)
    assert gone.days == ()
    assert gone.kept == tuple(f"{name}: not summed up" for name in days(log))
    log.review()
    log.add(MODEL, 1, days_ago=8, outcome=None)  # still open
    log.query("DELETE FROM evidence_periods WHERE period = (SELECT min(period) + 1 FROM evidence_periods)")
    log.review()
    gone = dropped(log)
    assert gone.days == days(log, (9, 7))
    assert gone.kept == (
        f"{day(log, 8)}: summed up, but not closed: a call is still open, or the day is too fresh",
    )
    assert log.value("SELECT count(*) FROM model_calls") == 41


def test_an_empty_day_is_dropped_without_being_summed_up(log: Log) -> None:
    with_partition(log, 400)
    assert dropped(log).days == (day(log, 400),)


def test_each_period_length_needs_its_own_sums(log: Log) -> None:
    log.review()
    assert dropped(log, period_hours=12).days == ()
    log.review(shipped_learning(period_hours=12))
    assert dropped(log, period_hours=12).days == days(log)


def test_late_feedback_on_a_dropped_day_leaves_its_evidence_alone(log: Log) -> None:
    log.review()
    two_days = shipped_learning(period_hours=48)  # one of its periods keeps a day
    log.review(two_days)
    evidence = log.query("SELECT * FROM evidence WHERE period_seconds = 172800 ORDER BY period")
    drop_old_calls(log.url, LearningSettings.model_validate({**two_days.model_dump(), "retention_days": 8}))
    assert day(log, 9) not in partitions(log)
    log.query("SELECT record_feedback(id, 0, 'a reader') FROM tasks")
    log.review(two_days)
    kept = log.query("SELECT * FROM evidence WHERE period_seconds = 172800 ORDER BY period")
    dropped_periods = log.query(
        "SELECT period FROM evidence_periods WHERE calls_dropped AND period_seconds = 172800"
    )
    touched = {row["period"] for row in dropped_periods}
    assert touched
    assert [row for row in kept if row["period"] in touched] == [
        row for row in evidence if row["period"] in touched
    ]
    assert kept != evidence  # the evidence of other days changed


def test_days_of_the_longest_window_are_kept(log: Log) -> None:
    log.review()
    log.query("INSERT INTO traffic_targets (model, version, target) VALUES (%s, 1, '5000/7d')", MODEL)
    assert dropped(log).days == days(log, (9,))  # the longest window, plus a day


def test_a_dry_run_drops_nothing(log: Log) -> None:
    log.review()
    before = partitions(log)
    assert dropped(log, dry_run=True).days == days(log)
    assert partitions(log) == before


def test_a_locked_log_is_waited_for_and_then_left_for_the_next_run(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.review()
    monkeypatch.setattr("router.learning.retention.RETRY_SECONDS", 0.5)
    with connect(log.url) as reader:
        rows(reader, "SELECT count(*) FROM model_calls")  # e.g. a long report
        gone = dropped(log)
    assert gone.days == ()
    assert len(gone.kept) == 3
    assert all("in use" in kept for kept in gone.kept)
    monkeypatch.setattr("router.learning.retention.RETRY_SECONDS", 20.0)
    with connect(log.url) as reader:
        rows(reader, "SELECT count(*) FROM model_calls")
        done: list[Retention] = []
        thread = threading.Thread(target=lambda: done.append(dropped(log)))
        thread.start()
        dropping = "SELECT FROM pg_stat_activity WHERE query LIKE 'SELECT drop_call_partition%%'"
        until(lambda: log.query(dropping))
    thread.join(30)
    assert done[0].days == days(log)


def test_a_failed_drop_is_rolled_back(log: Log) -> None:
    log.review()
    log.query(
        "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'crashed'; END $$;"
        " CREATE TRIGGER zz_fail AFTER UPDATE ON evidence_periods FOR EACH ROW EXECUTE FUNCTION fail()"
    )
    before = partitions(log)
    with pytest.raises(DatabaseError, match="crashed"):
        dropped(log)
    assert partitions(log) == before
    assert log.value("SELECT count(*) FROM model_calls") == 80


def test_nothing_is_dropped_during_a_review(log: Log) -> None:
    with connect(log.url) as connection:
        rows(connection, "SELECT pg_advisory_lock(%s)", (REVIEW_LOCK,))
        with pytest.raises(ReviewBusy):
            dropped(log)


def test_scores_older_than_the_memory_are_deleted(log: Log) -> None:
    log.review()
    log.add(OTHER, 2, days_ago=70)
    log.query(
        "INSERT INTO call_scores (call_id, source, score) SELECT call_id, 'feedback', 1 FROM model_calls"
    )
    log.query(
        "INSERT INTO judgements (call_id, category, model, opponent, judge)"
        " SELECT call_id, category, model, 'a', 'b' FROM model_calls"
    )
    assert dropped(log).scores == 4
    assert log.value("SELECT count(*) FROM judgements") == 80
    assert dropped(log).scores == 0
