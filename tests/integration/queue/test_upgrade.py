"""Upgrades: an existing table `tasks` in place, and the schema of the version before with data in it."""

from __future__ import annotations

import multiprocessing
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from router.database import connect, rows
from router.errors import SchemaError
from router.migrations import SQL_FOLDER, migrate
from router.models import sync_roster
from router.settings import load_config

OLD_TABLE = """
CREATE TABLE tasks (
    id {key} PRIMARY KEY, prompt {prompt}, status varchar(20) DEFAULT 'unsolved', answer varchar(40),
    owner text DEFAULT 'somebody', tags jsonb, created_at timestamp DEFAULT now()
)
"""

NAMES_MIGRATION = "016_names.sql"
# Name of today -> name of the version before, which 016_names.sql removes.
FORMER_NAMES = {
    "add_request_call": "ask_call",
    "admit_candidate": "take_candidate",
    "advance_low_watermark": "raise_floor",
    "announce_classifier": "starts_categorising",
    "apply_default_category": "default_uncategorised",
    "assign_categories": "keep_categories",
    "begin_request": "ask_task",
    "category_problem": "unknown_category",
    "claim_due_deadlines": "take_deadlines",
    "claim_uncategorized": "take_uncategorised",
    "clear_target_errors": "forget_target_troubles",
    "close_abandoned_calls": "close_left_calls",
    "compact_counts": "fold_counts",
    "compacted_before": "folded_before",
    "complete_deadline": "deadline_served",
    "discard_request_call": "forget_asked",
    "drop_call_partition": "drop_day",
    "ensure_lane": "open_lane",
    "extend_deadline_claim": "hold_deadline",
    "finish_run": "leave_run",
    "first_call_id": "call_id_floor",
    "judging_usage": "judging_spent",
    "low_watermark": "floor_of",
    "mark_calls_lost": "lose_calls",
    "min_ready_position": "lowest_ready",
    "old_call_partitions": "old_days",
    "outage_window": "outage_stretch",
    "period_start": "period_floor",
    "prune_failures": "forget_failures",
    "prune_scores": "forget_scores",
    "queue_watermarks": "queue_floors",
    "queue_watermarks_newest": "queue_floors_newest",
    "recently_tried": "resting_candidates",
    "record_answer": "keep_answer",
    "record_candidate": "keep_candidate",
    "record_failure": "note_failure",
    "record_feedback": "give_feedback",
    "record_judgment": "keep_judgement",
    "record_review": "keep_review",
    "record_target": "keep_target",
    "record_target_error": "report_target_trouble",
    "remove_queue_row": "forget_queue_row",
    "requeue": "give_back",
    "requeue_position": "returned_position",
    "resolve_category": "known_category",
    "roster_snapshot": "roster_state",
    "set_paused": "hold_solving",
    "settle_request_call": "settle_asked",
    "uncategorized_until": "uncategorised_until",
    "watcher_heartbeat": "watch_goes_on",
    "worker_claims": "held_claims",
    "worker_state": "engine_state",
}
TABLES = ("tasks", "queue", "workers", "model_calls", "reviews", "candidates", "searches", "traffic_targets",
          "task_failures", "call_scores", "roster", "rankings", "categories")  # fmt: skip


def _copy_sql(folder: Path) -> None:
    for kind in ("migrations", "functions"):
        shutil.copytree(SQL_FOLDER / kind, folder / kind)


def _call_id(number: int) -> str:
    milliseconds = int(time.time() * 1000)
    return f"{milliseconds:012x}7000800000000000{number:04x}"


def _one(url: str, statement: str, *arguments: Any) -> Any:
    with connect(url) as connection:
        return next(iter(rows(connection, statement, arguments)[0].values()))


def _run(url: str, *statements: str) -> None:
    with connect(url) as connection:
        for statement in statements:
            rows(connection, statement)


@pytest.mark.parametrize(
    ("key", "prompt"), [("serial", "varchar"), pytest.param("bigserial", "text", marks=pytest.mark.soak)]
)
def test_an_existing_table_is_upgraded_without_a_rewrite(empty_database: str, key: str, prompt: str) -> None:
    url = empty_database
    _run(
        url,
        OLD_TABLE.format(key=key, prompt=prompt),
        "INSERT INTO tasks (prompt, status, answer, tags)"
        " SELECT 'prompt ' || n, CASE WHEN mod(n, 4) = 0 THEN 'solved' ELSE 'unsolved' END,"
        " CASE WHEN mod(n, 4) = 0 THEN 'old answer' END, jsonb_build_object('n', n)"
        " FROM generate_series(1, 100000) AS n",
        "INSERT INTO tasks (prompt) VALUES (NULL), ('')",
    )
    file = _one(url, "SELECT pg_relation_filenode('tasks')")
    kept = "SELECT md5(string_agg((id, prompt, answer, tags, created_at)::text, '' ORDER BY id)) FROM tasks"
    before = _one(url, kept)

    report = migrate(url)

    assert report.applied[0] == "001_tasks.sql"
    assert report.tasks_queued == 75_000
    assert _one(url, "SELECT pg_relation_filenode('tasks')") == file, "the table was rewritten"
    assert _one(url, kept) == before
    states = "(SELECT status, count(*) AS n FROM tasks GROUP BY 1) AS s"
    counted = _one(url, f"SELECT array_agg(status || n ORDER BY status) FROM {states}")
    assert counted == ["failed2", "solved25000", "unsolved75000"]
    assert _one(url, "SELECT (unsolved, solved, failed)::text FROM task_counts_now") == "(75000,25000,2)"
    assert migrate(url).applied == ()
    assert _one(url, "SELECT (unsolved, solved, failed)::text FROM task_counts_now") == "(75000,25000,2)"

    # Producers and their own columns keep working, and answers may exceed the old varchar.
    _run(url, "INSERT INTO tasks (prompt, owner) VALUES ('new', 'me')")
    assert _one(url, "SELECT count(*) FROM queue") == 75_001
    claimed = "SELECT task_id FROM claim_task('m', '{}', 'w', '01890000-0000-7000-8000-000000000000')"
    assert _one(url, claimed) == 1
    settle = "SELECT settle_call('01890000-0000-7000-8000-000000000000', 'answered', repeat('long ', 100))"
    assert _one(url, settle) == "solved"


def test_an_answer_from_before_the_upgrade_is_not_replaced(empty_database: str) -> None:
    url = empty_database
    _run(
        url,
        OLD_TABLE.format(key="serial", prompt="text"),
        "INSERT INTO tasks (prompt, status, answer) VALUES ('p', 'solved', 'old')",
    )
    migrate(url)
    _run(
        url,
        "INSERT INTO model_calls (call_id, task_id, prompt_version, model)"
        " VALUES ('01890000-0000-7000-8000-000000000000', 1, 1, 'm')",
    )
    assert (
        _one(url, "SELECT settle_call('01890000-0000-7000-8000-000000000000', 'answered', 'new')")
        == "superseded"
    )
    assert _one(url, "SELECT answer FROM tasks") == "old"


@pytest.mark.parametrize(
    ("table", "word"),
    [
        (
            "CREATE TABLE tasks (id uuid PRIMARY KEY, prompt text, status text, answer text)",
            "id is uuid, and must be",
        ),
        (
            "CREATE TABLE tasks (id text PRIMARY KEY, prompt text, status text, answer text)",
            "id is text, and must be",
        ),
        ("CREATE TABLE tasks (id int PRIMARY KEY, prompt text, answer text)", "status is missing"),
        ("CREATE TABLE tasks (id int PRIMARY KEY, prompt bytea, status text)", "prompt is bytea"),
        ("CREATE TABLE tasks (id int, prompt text, status text)", "neither primary key nor unique"),
        (
            (
                "CREATE TABLE tasks (id int PRIMARY KEY, prompt text, status text);"
                " INSERT INTO tasks VALUES (1, 'p', 'done'), (2, 'p', 'done'), (3, 'p', NULL)"
            ),
            "'done' (2 rows)",
        ),
        (
            "CREATE TABLE work (id int, prompt text, status text); CREATE VIEW tasks AS SELECT * FROM work",
            "not an ordinary table",
        ),
        (
            "CREATE TABLE tasks (id int, prompt text, status text) PARTITION BY RANGE (id)",
            "not an ordinary table",
        ),
        (
            "CREATE TABLE tasks (id int PRIMARY KEY, prompt text, status text, priority text)",
            "priority is text",
        ),
    ],
)
def test_an_incompatible_table_is_refused_unchanged(empty_database: str, table: str, word: str) -> None:
    url = empty_database
    _run(url, table)
    columns = "SELECT array_agg(attname ORDER BY attnum) FROM pg_attribute WHERE attrelid = 'tasks'::regclass"
    before = _one(url, columns)
    with pytest.raises(SchemaError) as refused:
        migrate(url)
    assert word in str(refused.value)
    assert _one(url, columns) == before
    assert _one(url, "SELECT to_regclass('router_migrations')") is None


def test_a_table_in_another_schema_is_upgraded(empty_database: str) -> None:
    url = empty_database
    name = _one(url, "SELECT current_database()")
    _run(url, "CREATE SCHEMA work", f'ALTER DATABASE "{name}" SET search_path = work, public')
    _run(url, OLD_TABLE.format(key="serial", prompt="text"), "INSERT INTO tasks (prompt) VALUES ('p')")
    assert migrate(url).tasks_queued == 1
    _run(url, "SET search_path = pg_catalog", "INSERT INTO work.tasks (prompt) VALUES ('q')")
    assert _one(url, "SELECT count(*) FROM queue") == 2


def test_a_changed_migration_is_refused(empty_database: str, tmp_path: Path) -> None:
    _copy_sql(tmp_path)
    migrate(empty_database, tmp_path)
    first = tmp_path / "migrations" / "001_tasks.sql"
    first.write_text(first.read_text() + "\n-- changed")
    with pytest.raises(SchemaError, match=r"001_tasks\.sql was changed"):
        migrate(empty_database, tmp_path)


def test_functions_are_replaced_only_if_they_changed(empty_database: str, tmp_path: Path) -> None:
    _copy_sql(tmp_path)
    assert migrate(empty_database, tmp_path).functions_renewed
    assert not migrate(empty_database, tmp_path).functions_renewed
    (tmp_path / "functions" / "99_more.sql").write_text(
        "CREATE FUNCTION more() RETURNS int LANGUAGE sql AS 'SELECT 7'"
    )
    assert migrate(empty_database, tmp_path).functions_renewed
    assert _one(empty_database, "SELECT more()") == 7


def _migrate_in_a_process(url: str, results: Any) -> None:
    try:
        results.put(len(migrate(url).applied))
    except Exception as error:  # noqa: BLE001 - reported to the test
        results.put(repr(error))


def test_of_four_concurrent_migrations_one_applies(empty_database: str) -> None:
    _run(
        empty_database,
        OLD_TABLE.format(key="serial", prompt="text"),
        "INSERT INTO tasks (prompt) SELECT 'p' FROM generate_series(1, 5000)",
    )
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=_migrate_in_a_process, args=(empty_database, results)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    applied = sorted(results.get(timeout=90) for _ in processes)
    for process in processes:
        process.join(30)
    assert applied == [0, 0, 0, len(list((SQL_FOLDER / "migrations").glob("*.sql")))]
    assert _one(empty_database, "SELECT count(*) FROM queue") == 5000


@contextmanager
def _producers(url: str) -> Iterator[list[float]]:
    """Inserts tasks on three connections without an error; yields a list for the longest insert of each."""
    stop = threading.Event()
    slowest: list[float] = []
    errors: list[str] = []

    def produce() -> None:
        connection = psycopg2.connect(url)
        connection.autocommit = True
        with connection.cursor() as cursor:
            longest = 0.0
            while not stop.is_set():
                began = time.monotonic()
                try:
                    cursor.execute(
                        "BEGIN; INSERT INTO tasks (prompt) VALUES ('p'), ('q');"
                        " SELECT pg_sleep(0.002); COMMIT"
                    )
                except psycopg2.Error as error:
                    errors.append(str(error))
                    return
                longest = max(longest, time.monotonic() - began)
            slowest.append(longest)
        connection.close()

    producers = [threading.Thread(target=produce) for _ in range(3)]
    for producer in producers:
        producer.start()
    try:
        time.sleep(0.1)
        yield slowest
        time.sleep(0.1)
    finally:
        stop.set()
        for producer in producers:
            producer.join()
    assert not errors


def test_tasks_inserted_during_a_migration_are_queued(empty_database: str) -> None:
    url = empty_database
    _run(
        url,
        OLD_TABLE.format(key="serial", prompt="text"),
        "INSERT INTO tasks (prompt) SELECT 'p' FROM generate_series(1, 20000)",
    )
    with _producers(url) as slowest:
        migrate(url)
    assert max(slowest) < 5
    unqueued = (
        "SELECT count(*) FROM tasks WHERE status = 'unsolved' AND id NOT IN (SELECT task_id FROM queue)"
    )
    assert _one(url, unqueued) == 0
    assert (
        _one(url, "SELECT unsolved FROM task_counts_now") == _one(url, "SELECT count(*) FROM tasks") > 20_000
    )


def test_producers_see_no_error_while_the_version_before_is_upgraded(former_database: str) -> None:
    url = former_database
    unsolved = int(_one(url, "SELECT count(*) FROM queue"))
    with _producers(url) as slowest:
        migrate(url)
    assert max(slowest) < 5
    assert _one(url, "SELECT count(*) FROM queue") > unsolved
    unqueued = (
        "SELECT count(*) FROM tasks WHERE status = 'unsolved' AND id NOT IN (SELECT task_id FROM queue)"
    )
    assert _one(url, unqueued) == 0
    assert _one(url, "SELECT sum(unsolved) FROM task_counts_now") == _one(url, "SELECT count(*) FROM queue")


def test_producers_are_not_blocked_while_a_migration_waits_for_a_lock(
    empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A reader holds the table. The migration waits for it in short turns, and producers insert in between.
    monkeypatch.setattr("router.migrations.apply.LOCK_SECONDS", 0.3)
    url = empty_database
    _run(url, OLD_TABLE.format(key="serial", prompt="text"))
    reader = psycopg2.connect(url)
    with reader.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM tasks")
    migrating = threading.Thread(target=migrate, args=(url,))
    migrating.start()
    for _ in range(5):
        began = time.monotonic()
        _run(url, "INSERT INTO tasks (prompt) VALUES ('p')")
        assert time.monotonic() - began < 2
    assert migrating.is_alive()
    reader.close()
    migrating.join(30)
    assert _one(url, "SELECT count(*) FROM queue") == 5


def test_a_locked_table_is_reported(empty_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.migrations.apply.LOCK_SECONDS", 0.1)
    monkeypatch.setattr("router.migrations.apply.LOCK_PATIENCE_SECONDS", 0.5)
    _run(empty_database, OLD_TABLE.format(key="serial", prompt="text"))
    reader = psycopg2.connect(empty_database)
    with reader.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM tasks")
    with pytest.raises(SchemaError, match="kept the tables locked"):
        migrate(empty_database)
    reader.close()


@pytest.fixture
def former_sql(tmp_path: Path) -> Path:
    """The SQL folder of the version before: no 016, and the former names in the functions."""
    folder = tmp_path / "former"
    _copy_sql(folder)
    (folder / "migrations" / NAMES_MIGRATION).unlink()
    word = re.compile(rf"\b({'|'.join(FORMER_NAMES)})\b")
    for path in (folder / "functions").glob("*.sql"):
        path.write_text(word.sub(lambda found: FORMER_NAMES[found[1]], path.read_text()))
    return folder


@pytest.fixture
def former_database(empty_database: str, former_sql: Path) -> str:
    """A database of the version before, with tasks in every state and rows in the other tables."""
    url = empty_database
    migrate(url, former_sql)
    with connect(url) as connection:
        sync_roster(connection, load_config())
    _run(
        url,
        "INSERT INTO tasks (prompt, category, priority, status, answer) VALUES"  # ids 1 to 8
        " ('ready', 'general', 0, 'unsolved', NULL), ('solved', 'technical', 0, 'solved', 'by hand'),"
        " ('failed', 'creative', 0, 'failed', NULL), ('', 'general', 0, 'unsolved', NULL),"
        " ('claimed', 'general', 7, 'unsolved', NULL), ('answered', 'general', 8, 'unsolved', NULL),"
        " ('waiting', 'general', 9, 'unsolved', NULL), ('uncategorised', NULL, 0, 'unsolved', NULL)",
        "INSERT INTO tasks (prompt, category) SELECT 'more', 'technical' FROM generate_series(1, 50)",
    )
    for number, task_id in ((7, 7), (6, 6), (5, 5)):
        claimed = f"SELECT task_id FROM claim_task('llama-3.3-70b', '{{general}}', 'w', '{_call_id(number)}')"
        assert _one(url, claimed) == task_id
        if task_id == 7:
            failed = "SELECT settle_call(call_id, 'error', p_error => 'down') FROM queue WHERE task_id = 7"
            assert _one(url, failed) == "retry"
        if task_id == 6:
            solved = "SELECT settle_call(call_id, 'answered', 'yes') FROM queue WHERE task_id = 6"
            assert _one(url, solved) == "solved"
    _run(
        url,
        "SELECT fold_counts()",
        "INSERT INTO tasks (prompt, category) VALUES ('after the counters were compacted', 'general')",
        "SELECT raise_floor('technical', 0::smallint, false)",
        "SELECT raise_floor('technical', 0::smallint, false)",
        "SELECT keep_target('llama-3.3-70b', '10/min', 1)",
        "SELECT keep_target('llama-3.3-70b', '20/min', 2)",
        "SELECT keep_review('a test', 86400, 1, '{}', '{}', '[]')",
        "INSERT INTO searches (by) VALUES ('a test')",
        "SELECT keep_candidate(1, 'new-model', 'general', 'file', 'lost', 'slower', NULL)",
        "SELECT give_feedback(6, 1, 'a reader')",
        "GRANT SELECT ON task_counts_now, discovered_models TO PUBLIC",
    )
    return url


def _rows_of(url: str) -> dict[str, list[str]]:
    contents = "SELECT coalesce(array_agg(r::text ORDER BY r::text), '{{}}') FROM {table} AS r"
    return {table: _one(url, contents.format(table=table)) for table in TABLES}


def _schema_of(url: str) -> list[str]:
    functions = (
        "SELECT oid::regprocedure::text || prosrc FROM pg_proc"
        " WHERE pronamespace IN ('public'::regnamespace, 'router'::regnamespace)"
    )
    relations = (
        "SELECT oid::regclass::text FROM pg_class"
        " WHERE relnamespace IN ('public'::regnamespace, 'router'::regnamespace)"
    )
    triggers = "SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal"
    return list(
        _one(
            url,
            f"SELECT array_agg(n ORDER BY n) FROM ({functions} UNION {relations} UNION {triggers}) AS s (n)",
        )
    )


def test_the_names_migration_removes_all_former_names() -> None:
    migration = (SQL_FOLDER / "migrations" / NAMES_MIGRATION).read_text()
    functions = "".join(path.read_text() for path in (SQL_FOLDER / "functions").glob("*.sql"))
    for name, former in FORMER_NAMES.items():
        assert re.search(rf"\b{former}\b", migration), former
        assert re.search(rf"\b{name}\b", functions + migration), name
        assert not re.search(rf"\b{former}\b", functions), former


def test_an_upgrade_keeps_the_data_of_the_version_before(former_database: str) -> None:
    url = former_database
    before = _rows_of(url)
    assert {row.split(",")[4] for row in before["queue"]} == {"ready", "claimed", "waiting", "uncategorised"}
    counters = "SELECT array_agg(c::text ORDER BY category) FROM task_counts_now AS c"
    counted = _one(url, counters)
    watermarks = _one(url, "SELECT array_agg(f::text ORDER BY f::text) FROM queue_floors AS f")
    assert watermarks

    report = migrate(url)

    assert (report.applied, report.functions_renewed, report.tasks_queued) == ((NAMES_MIGRATION,), True, 0)
    assert _rows_of(url) == before
    assert _one(url, counters) == counted
    assert _one(url, "SELECT array_agg(f::text ORDER BY f::text) FROM queue_watermarks AS f") == watermarks
    granted = "SELECT has_table_privilege('public', '{}', 'SELECT')"
    assert _one(url, granted.format("task_counts_now"))
    assert _one(url, granted.format("discovered_models"))
    after = _schema_of(url)
    again = migrate(url)
    assert (again.applied, again.functions_renewed, again.tasks_queued) == ((), False, 0)
    assert (_schema_of(url), _rows_of(url)) == (after, before)


def test_an_upgrade_leaves_the_schema_of_a_new_database(former_database: str, bare_database: str) -> None:
    migrate(former_database)
    assert _schema_of(former_database) == _schema_of(bare_database)
    former = list(FORMER_NAMES.values())
    assert _one(former_database, "SELECT count(*) FROM pg_proc WHERE proname = ANY (%s)", former) == 0
    assert _one(former_database, "SELECT count(*) FROM pg_class WHERE relname = ANY (%s)", former) == 0


def test_the_queue_works_after_an_upgrade(former_database: str) -> None:
    url = former_database
    migrate(url)
    assert _one(url, "SELECT heartbeat('w')") is True
    assert (
        _one(url, "SELECT settle_call(call_id, 'answered', 'yes') FROM queue WHERE task_id = 5") == "solved"
    )
    claimed = f"SELECT task_id FROM claim_task('gpt-4o-mini', '{{general}}', 'w', '{_call_id(20)}')"
    assert _one(url, claimed) == 1
    assert _one(url, "SELECT unclaim(call_id) FROM queue WHERE task_id = 1") is True

    assert _one(url, "SELECT array_agg(task_id) FROM task_failures WHERE task_id IN (3, 4)") == [3, 4]
    _run(
        url,
        "UPDATE tasks SET status = 'failed' WHERE id = 1",
        "UPDATE tasks SET status = 'unsolved' WHERE id = 3",
    )
    assert _one(url, "SELECT array_agg(task_id) FROM task_failures WHERE task_id IN (1, 3)") == [1]
    _run(url, "DELETE FROM tasks WHERE id = 1", "INSERT INTO tasks (id, prompt) VALUES (1000, 'new')")
    assert _one(url, "SELECT count(*) FROM task_failures WHERE task_id = 1") == 0
    assert _one(url, "SELECT count(*) FROM queue WHERE task_id = 1000") == 1
    counted = "SELECT (sum(unsolved), sum(solved), sum(failed))::text FROM task_counts_now"
    tasks = ("SELECT (count(*) FILTER (WHERE status = 'unsolved'), count(*) FILTER (WHERE status = 'solved'),"
             " count(*) FILTER (WHERE status = 'failed'))::text FROM tasks")  # fmt: skip
    assert _one(url, counted) == _one(url, tasks)
    assert _one(url, "SELECT low_watermark('technical', 0::smallint, false)") >= 1
    _run(url, "TRUNCATE tasks")
    assert _one(url, "SELECT count(*) FROM task_failures") == 0


@pytest.mark.parametrize("fails", ["functions", "migrations"])
def test_migrations_and_functions_are_one_transaction(
    former_database: str, tmp_path: Path, fails: str
) -> None:
    url = former_database
    broken = tmp_path / "broken"
    _copy_sql(broken)
    (broken / fails / "99_broken.sql").write_text("CREATE TABLE half_done (); SELECT no_such_function();")
    schema, contents = _schema_of(url), _rows_of(url)
    applied = "SELECT array_agg(m::text ORDER BY name) FROM router_migrations AS m"
    before = _one(url, applied)

    with pytest.raises(SchemaError, match="no_such_function"):
        migrate(url, broken)

    assert (_schema_of(url), _rows_of(url), _one(url, applied)) == (schema, contents, before)
    assert migrate(url).applied == (NAMES_MIGRATION,)
