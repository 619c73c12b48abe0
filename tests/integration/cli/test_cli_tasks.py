"""`router export` and `router retry` on a real PostgreSQL."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from router.database import connect, rows
from router.task import new_call_id
from tests.support.command_line import CommandLine

Ask = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def router(database: str) -> CommandLine:
    return CommandLine({"ROUTER_DATABASE_URL": database})


@pytest.fixture
def ask(database: str) -> Ask:
    def run(statement: str, *arguments: Any) -> list[dict[str, Any]]:
        with connect(database) as connection:
            return rows(connection, statement, arguments)

    return run


def solve_one(ask: Ask, outcome: str = "answered", answer: str | None = "Because.") -> uuid.UUID:
    """Claims a task and settles it, as a worker does."""
    call_id = new_call_id(time.time())
    ask("SELECT heartbeat('w')")
    assert ask(
        "SELECT * FROM claim_task('phi-4', '{general,technical,creative}', 'w', %s, 100)", str(call_id)
    )
    ask("SELECT settle_call(%s, %s, %s, 11, 5)", str(call_id), outcome, answer)
    return call_id


def fail_all(ask: Ask) -> None:
    ask("UPDATE tasks SET status = 'failed', failure = 'phi-4: timeout' WHERE status = 'unsolved'")


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_export_writes_openai_batch_output(router: CommandLine, ask: Ask, tmp_path: Path):
    ask("INSERT INTO tasks (prompt, external_id) VALUES ('Why?', 'r-1')")
    call_id = solve_one(ask)
    ask("INSERT INTO tasks (prompt) VALUES ('Fails?')")
    fail_all(ask)
    ask("INSERT INTO tasks (prompt) VALUES ('still unsolved')")
    result = router("export", tmp_path / "out.jsonl", "--json")
    assert result.json == {"file": str(tmp_path / "out.jsonl"), "written": 2}
    solved, failed = lines_of(tmp_path / "out.jsonl")
    assert (solved["custom_id"], solved["error"], solved["response"]["status_code"]) == ("r-1", None, 200)
    body = solved["response"]["body"]
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "Because."}
    assert (body["object"], body["model"], body["id"]) == ("chat.completion", "phi-4", f"chatcmpl-{call_id}")
    assert body["usage"] == {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}
    assert abs(body["created"] - time.time()) < 60
    assert failed["custom_id"] == "2"  # loaded without an id
    assert (failed["response"], failed["error"]) == (None, {"code": "failed", "message": "phi-4: timeout"})


def test_an_answer_without_a_logged_call_has_no_usage(router: CommandLine, ask: Ask, tmp_path: Path):
    ask("INSERT INTO tasks (prompt, status, answer) VALUES ('old', 'solved', 'from before')")
    router("export", tmp_path / "out.jsonl")
    body = lines_of(tmp_path / "out.jsonl")[0]["response"]["body"]
    assert ("usage" in body, body["choices"][0]["message"]["content"]) == (False, "from before")


@pytest.mark.parametrize(("option", "ids"), [("--solved", ["1"]), ("--failed", ["2"]), ("--all", ["1", "2"])])
def test_export_by_status(router: CommandLine, ask: Ask, tmp_path: Path, option: str, ids: list[str]):
    ask("INSERT INTO tasks (prompt, status, answer) VALUES ('a', 'solved', 'A'), ('b', 'failed', NULL)")
    router("export", tmp_path / "out.jsonl", option)
    assert [line["custom_id"] for line in lines_of(tmp_path / "out.jsonl")] == ids
    assert router("export", tmp_path / "out.jsonl", "--solved", "--failed").code == 2


SELECTIONS = {
    "--status solved": ["a/1", "b/1", "far"],
    "--status failed": ["a/2"],
    "--status all": ["a/1", "a/2", "b/1", "far"],
    "--category technical": ["a/1", "a/2"],
    "--category general": ["b/1", "far"],
    "--id-prefix a/": ["a/1", "a/2"],
    "--id-prefix %": [],
    "--since 2h": ["a/1", "a/2", "far"],
    "--since 1970-01-01 --until 2h": ["b/1"],
    "--until 1000-01-01": [],
    "--since 9999-12-31T23:59:59-10:00": "is neither a time nor an age",
    "--since 9999-12-30": ["far"],
    "--until 2020-06-01T00:00:00+02:00": ["b/1"],
    "--id-prefix a/ --status failed --category technical --since 1h": ["a/2"],
    "--since yesterday": "is neither a time nor an age",
    "--since 999999999d": "is neither a time nor an age",
    "--category nothing": "no category",
    "--status unsolved": "no status to export",
}


@pytest.mark.parametrize("zone", ["UTC", "America/New_York"])
def test_export_can_be_restricted(router: CommandLine, ask: Ask, tmp_path: Path, zone: str):
    ask(
        "INSERT INTO tasks (prompt, category, external_id, status, answer, solved_at) VALUES"
        " ('p', 'technical', 'a/1', 'solved', 'A', now() - interval '1 min'),"
        " ('p', 'technical', 'a/2', 'failed', NULL, NULL),"
        " ('p', 'unknown', 'b/1', 'solved', 'A', '2020-01-01'),"
        " ('p', NULL, 'far', 'solved', 'A', '99999-01-01'), ('p', NULL, 'a/3', 'unsolved', NULL, NULL)"
    )
    ask(f"ALTER ROLE postgres SET timezone = '{zone}'")
    for options, expected in SELECTIONS.items():
        done = router("export", tmp_path / "out.jsonl", *options.split())
        if isinstance(expected, str):
            assert done.code == 1, options
            assert expected in done.err
            continue
        assert done.code == 0, done.err
        assert [line["custom_id"] for line in lines_of(tmp_path / "out.jsonl")] == expected, options
    ask("ALTER ROLE postgres RESET timezone")


def test_export_to_standard_output(router: CommandLine, ask: Ask):
    ask(
        "INSERT INTO tasks (prompt, status, answer) SELECT 'a', 'solved', repeat('x', 500)"
        " FROM generate_series(1, 2000)"
    )
    result = router("export", "-")
    assert len([json.loads(line) for line in result.out.splitlines()]) == 2000
    with router.start("export", "-", stdin=subprocess.DEVNULL) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        assert json.loads(program.stdout.readline())
        program.stdout.close()  # as `| head -1` does
        assert program.stderr.read() == b""


def test_a_file_is_replaced_atomically(router: CommandLine, ask: Ask, tmp_path: Path):
    out = tmp_path / "out.jsonl"
    out.write_text("before\n")
    out.chmod(0o640)
    link = tmp_path / "link.jsonl"
    link.symlink_to(out)
    ask("INSERT INTO tasks (prompt, status, answer) VALUES ('a', 'solved', 'A')")
    assert router("export", link).code == 0
    assert (link.is_symlink(), len(lines_of(out)), stat.S_IMODE(out.stat().st_mode)) == (True, 1, 0o640)
    whole = out.read_text()
    ask("ALTER TABLE tasks RENAME COLUMN failure TO gone")
    result = router("export", out)
    assert (result.code, out.read_text()) == (1, whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.jsonl", "out.jsonl"]


def test_unwritable_files_are_reported(router: CommandLine, tmp_path: Path):
    result = router("export", tmp_path / "missing" / "out.jsonl")
    assert (result.code, "cannot be written" in result.err) == (1, True)
    assert "is a folder" in router("export", tmp_path).err


def test_export_to_a_named_pipe(router: CommandLine, ask: Ask, tmp_path: Path):
    ask("INSERT INTO tasks (prompt, status, answer) VALUES ('a', 'solved', 'A')")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    assert router("export", pipe).code == 0
    reader.join(30)
    assert read, "nothing was written to the pipe"
    assert (len(read[0].splitlines()), stat.S_ISFIFO(pipe.stat().st_mode)) == (1, True)


def test_retry_by_task_id(router: CommandLine, ask: Ask):
    ask("INSERT INTO tasks (prompt) VALUES ('a'), ('b'), ('c')")
    ask("UPDATE tasks SET status = 'failed' WHERE id < 3")
    result = router("retry", 2, 3, 99, "--yes", "--json")
    assert (result.code, result.json) == (3, {"unsolved": 1, "still_failed": 0})
    assert "Task 3 is unsolved, not failed." in result.err
    assert "Task 99 does not exist." in result.err
    found = ask("SELECT id, status FROM tasks ORDER BY id")
    assert [row["status"] for row in found] == ["failed", "unsolved", "unsolved"]
    assert {row["task_id"] for row in ask("SELECT task_id FROM queue")} == {2, 3}


def test_retry_asks_for_confirmation(router: CommandLine, ask: Ask):
    ask("INSERT INTO tasks (prompt) VALUES ('a'), ('b')")
    fail_all(ask)
    result = router("retry", "--all", answer="n\n")
    assert (result.code, "Retry 2 failed tasks?" in result.err) == (1, True)
    assert ask("SELECT count(*) AS n FROM tasks WHERE status = 'failed'")[0]["n"] == 2
    assert router("retry", "--all", answer="y\n").code == 0
    assert ask("SELECT count(*) AS n FROM tasks WHERE status = 'failed'")[0]["n"] == 0


def test_retry_by_category_in_batches(router: CommandLine, ask: Ask):
    ask("INSERT INTO tasks (prompt, category) SELECT 'p', 'technical' FROM generate_series(1, 2500)")
    ask("INSERT INTO tasks (prompt, category) VALUES ('q', 'creative'), ('r', NULL)")
    fail_all(ask)
    assert router("retry", "--category", "technical", "--yes", "--json").json["unsolved"] == 2500
    assert ask("SELECT unsolved, failed FROM task_counts_now WHERE category = 'technical'") == [
        {"unsolved": 2500, "failed": 0}
    ]
    assert ask("SELECT count(*) AS n FROM tasks WHERE status = 'failed'")[0]["n"] == 2
    assert router("retry", "--category", "general", "--yes", "--json").json["unsolved"] == 1  # it had none


def test_a_prompt_that_no_model_can_be_sent_stays_failed(router: CommandLine, ask: Ask):
    ask("INSERT INTO tasks (prompt) VALUES ('  '), ('good')")
    fail_all(ask)
    result = router("retry", "--all", "--yes", "--json")
    assert (result.code, result.json) == (3, {"unsolved": 1, "still_failed": 1})


@pytest.mark.parametrize("arguments", [(), ("1", "--all"), ("--all", "--category", "general"), ("one",)])
def test_retry_requires_exactly_one_selection(router: CommandLine, arguments: tuple[str, ...]):
    assert router("retry", *arguments).code == 2


def test_status_log_and_export_show_and_filter_clients(router: CommandLine, ask: Ask, tmp_path: Path):
    ask("INSERT INTO tasks (prompt, category, client) VALUES ('a', 'general', 'alice'), ('n', 'general', '')")
    solve_one(ask)
    solve_one(ask)
    ask("INSERT INTO tasks (prompt, client) SELECT 'more', 'bob' FROM generate_series(1, 3)")

    clients = router("status", "--json").json["clients"]
    assert clients["bob"] == {"unsolved": 3, "solved": 0, "failed": 0}
    assert clients[""] == clients["alice"] == {"unsolved": 0, "solved": 1, "failed": 0}
    assert list(router("status", "--client", "alice", "--json").json["clients"]) == ["alice"]
    assert "bob 3" in router("status").out
    assert "alice: 0 unsolved, 1 solved, 0 failed" in router("status", "--client", "alice").out

    for client in ("alice", ""):
        (call,) = router("log", "--client", client, "--json").json["calls"]
        assert call["client"] == client
        exported = tmp_path / "out.jsonl"
        assert router("export", exported, "--client", client, "--json").json["written"] == 1
    assert "alice" in router("log").out
