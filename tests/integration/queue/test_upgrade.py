"""An existing table `tasks` becomes the router's in place, no row rewritten, none lost; or is refused."""

from __future__ import annotations

import multiprocessing
import threading
import time
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from router.database import connect, rows
from router.errors import SchemaError
from router.migrations import SQL_FOLDER, migrate

OLD_TABLE = """
CREATE TABLE tasks (
    id {key} PRIMARY KEY, prompt {prompt}, status varchar(20) DEFAULT 'unsolved', answer varchar(40),
    owner text DEFAULT 'somebody', tags jsonb, created_at timestamp DEFAULT now()
)
"""


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
def test_a_hundred_thousand_rows_are_kept_where_they_are(empty_database: str, key: str, prompt: str) -> None:
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

    # Producers go on as they did, and the old columns with them; an answer may be longer than it could be.
    _run(url, "INSERT INTO tasks (prompt, owner) VALUES ('new', 'me')")
    assert _one(url, "SELECT count(*) FROM queue") == 75_001
    claimed = "SELECT task_id FROM claim_task('m', '{}', 'w', '01890000-0000-7000-8000-000000000000')"
    assert _one(url, claimed) == 1
    settle = "SELECT settle_call('01890000-0000-7000-8000-000000000000', 'answered', repeat('long ', 100))"
    assert _one(url, settle) == "solved"


def test_an_old_answer_is_not_replaced(empty_database: str) -> None:
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
def test_what_cannot_be_upgraded_is_refused_and_nothing_is_changed(
    empty_database: str, table: str, word: str
) -> None:
    url = empty_database
    _run(url, table)
    columns = "SELECT array_agg(attname ORDER BY attnum) FROM pg_attribute WHERE attrelid = 'tasks'::regclass"
    before = _one(url, columns)
    with pytest.raises(SchemaError) as refused:
        migrate(url)
    assert word in str(refused.value)
    assert _one(url, columns) == before
    assert _one(url, "SELECT count(*) FROM router_migrations") == 0


def test_a_table_in_another_schema_of_the_search_path_is_found(empty_database: str) -> None:
    url = empty_database
    name = _one(url, "SELECT current_database()")
    _run(url, "CREATE SCHEMA work", f'ALTER DATABASE "{name}" SET search_path = work, public')
    _run(url, OLD_TABLE.format(key="serial", prompt="text"), "INSERT INTO tasks (prompt) VALUES ('p')")
    assert migrate(url).tasks_queued == 1
    _run(url, "SET search_path = pg_catalog", "INSERT INTO work.tasks (prompt) VALUES ('q')")
    assert _one(url, "SELECT count(*) FROM queue") == 2


def test_a_migration_that_was_changed_after_it_was_applied_is_refused(
    empty_database: str, tmp_path: Path
) -> None:
    for kind in ("migrations", "functions"):
        (tmp_path / kind).mkdir()
        for path in (SQL_FOLDER / kind).glob("*.sql"):
            (tmp_path / kind / path.name).write_text(path.read_text())
    migrate(empty_database, tmp_path)
    first = tmp_path / "migrations" / "001_tasks.sql"
    first.write_text(first.read_text() + "\n-- changed")
    with pytest.raises(SchemaError, match=r"001_tasks\.sql was changed"):
        migrate(empty_database, tmp_path)


def test_functions_that_changed_are_renewed_and_others_are_not(empty_database: str, tmp_path: Path) -> None:
    for kind in ("migrations", "functions"):
        (tmp_path / kind).mkdir()
        for path in (SQL_FOLDER / kind).glob("*.sql"):
            (tmp_path / kind / path.name).write_text(path.read_text())
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
    except Exception as error:  # noqa: BLE001 - told to the test
        results.put(repr(error))


def test_four_processes_migrate_at_once_and_one_does_the_work(empty_database: str) -> None:
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
    told = sorted(results.get(timeout=90) for _ in processes)
    for process in processes:
        process.join(30)
    assert told == [0, 0, 0, len(list((SQL_FOLDER / "migrations").glob("*.sql")))]
    assert _one(empty_database, "SELECT count(*) FROM queue") == 5000


def test_producers_go_on_while_it_migrates_and_no_task_is_forgotten(empty_database: str) -> None:
    url = empty_database
    _run(
        url,
        OLD_TABLE.format(key="serial", prompt="text"),
        "INSERT INTO tasks (prompt) SELECT 'p' FROM generate_series(1, 20000)",
    )
    stop = threading.Event()
    slowest: list[float] = []
    troubles: list[str] = []

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
                    troubles.append(str(error))
                    return
                longest = max(longest, time.monotonic() - began)
            slowest.append(longest)
        connection.close()

    producers = [threading.Thread(target=produce) for _ in range(3)]
    for producer in producers:
        producer.start()
    time.sleep(0.1)
    migrate(url)
    time.sleep(0.1)
    stop.set()
    for producer in producers:
        producer.join()
    assert not troubles
    assert max(slowest) < 5
    unqueued = (
        "SELECT count(*) FROM tasks WHERE status = 'unsolved' AND id NOT IN (SELECT task_id FROM queue)"
    )
    assert _one(url, unqueued) == 0
    assert (
        _one(url, "SELECT unsolved FROM task_counts_now") == _one(url, "SELECT count(*) FROM tasks") > 20_000
    )


def test_it_lets_others_go_first_while_somebody_holds_the_table(
    empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A reader holds the table; the migration waits for it in turns, and between them producers get through.
    monkeypatch.setattr("router.migrations.LOCK_SECONDS", 0.3)
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


def test_a_table_that_stays_locked_is_said_to_be(
    empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.migrations.LOCK_SECONDS", 0.1)
    monkeypatch.setattr("router.migrations.LOCK_PATIENCE_SECONDS", 0.5)
    _run(empty_database, OLD_TABLE.format(key="serial", prompt="text"))
    reader = psycopg2.connect(empty_database)
    with reader.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM tasks")
    with pytest.raises(SchemaError, match="kept the tables locked"):
        migrate(empty_database)
    reader.close()
