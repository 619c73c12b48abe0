"""`router export` and `router retry`, on a real PostgreSQL."""

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
    """Claim a task and settle it, as a worker does."""
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


def test_answers_are_written_as_openai_writes_them(router: CommandLine, ask: Ask, tmp_path: Path):
    ask("INSERT INTO tasks (prompt, external_id) VALUES ('Why?', 'r-1')")
    call_id = solve_one(ask)
    ask("INSERT INTO tasks (prompt) VALUES ('Fails?')")
    fail_all(ask)
    ask("INSERT INTO tasks (prompt) VALUES ('still unsolved')")
    said = router("export", tmp_path / "out.jsonl", "--json")
    assert said.json == {"file": str(tmp_path / "out.jsonl"), "written": 2}
    solved, failed = lines_of(tmp_path / "out.jsonl")
    assert (solved["custom_id"], solved["error"], solved["response"]["status_code"]) == ("r-1", None, 200)
    body = solved["response"]["body"]
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "Because."}
    assert (body["object"], body["model"], body["id"]) == ("chat.completion", "phi-4", f"chatcmpl-{call_id}")
    assert body["usage"] == {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}
    assert abs(body["created"] - time.time()) < 60
    assert failed["custom_id"] == "2"  # loaded without an id: its number
    assert (failed["response"], failed["error"]) == (None, {"code": "failed", "message": "phi-4: timeout"})


def test_an_answer_whose_call_is_no_longer_in_the_log_has_no_usage(
    router: CommandLine, ask: Ask, tmp_path: Path
):
    ask("INSERT INTO tasks (prompt, status, answer) VALUES ('old', 'solved', 'from before')")
    router("export", tmp_path / "out.jsonl")
    body = lines_of(tmp_path / "out.jsonl")[0]["response"]["body"]
    assert ("usage" in body, body["choices"][0]["message"]["content"]) == (False, "from before")


@pytest.mark.parametrize(("option", "ids"), [("--solved", ["1"]), ("--failed", ["2"]), ("--all", ["1", "2"])])
def test_what_is_exported_can_be_chosen(
    router: CommandLine, ask: Ask, tmp_path: Path, option: str, ids: list[str]
):
    ask("INSERT INTO tasks (prompt, status, answer) VALUES ('a', 'solved', 'A'), ('b', 'failed', NULL)")
    router("export", tmp_path / "out.jsonl", option)
    assert [line["custom_id"] for line in lines_of(tmp_path / "out.jsonl")] == ids
    assert router("export", tmp_path / "out.jsonl", "--solved", "--failed").code == 2


def test_standard_output_holds_the_lines_and_nothing_else(router: CommandLine, ask: Ask):
    ask(
        "INSERT INTO tasks (prompt, status, answer) SELECT 'a', 'solved', repeat('x', 500)"
        " FROM generate_series(1, 2000)"
    )
    said = router("export", "-")
    assert len([json.loads(line) for line in said.out.splitlines()]) == 2000
    with router.start("export", "-", stdin=subprocess.DEVNULL) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        assert json.loads(program.stdout.readline())
        program.stdout.close()  # as `| head -1` does
        assert program.stderr.read() == b""


def test_a_file_is_replaced_whole_or_not_at_all(router: CommandLine, ask: Ask, tmp_path: Path):
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
    said = router("export", out)
    assert (said.code, out.read_text()) == (1, whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.jsonl", "out.jsonl"]


def test_where_nothing_can_be_written_that_is_said(router: CommandLine, tmp_path: Path):
    said = router("export", tmp_path / "missing" / "out.jsonl")
    assert (said.code, "cannot be written" in said.err) == (1, True)
    assert "is a folder" in router("export", tmp_path).err


def test_a_pipe_is_written_to_and_stays_a_pipe(router: CommandLine, ask: Ask, tmp_path: Path):
    ask("INSERT INTO tasks (prompt, status, answer) VALUES ('a', 'solved', 'A')")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    assert router("export", pipe).code == 0
    reader.join(30)
    assert read, "nobody wrote to the pipe"
    assert (len(read[0].splitlines()), stat.S_ISFIFO(pipe.stat().st_mode)) == (1, True)


def test_failed_tasks_are_tried_again_by_number(router: CommandLine, ask: Ask):
    ask("INSERT INTO tasks (prompt) VALUES ('a'), ('b'), ('c')")
    ask("UPDATE tasks SET status = 'failed' WHERE id < 3")
    said = router("retry", 2, 3, 99, "--yes", "--json")
    assert (said.code, said.json) == (3, {"unsolved": 1, "still_failed": 0})
    assert "Task 3 is unsolved, not failed." in said.err
    assert "Task 99 does not exist." in said.err
    found = ask("SELECT id, status FROM tasks ORDER BY id")
    assert [row["status"] for row in found] == ["failed", "unsolved", "unsolved"]
    assert {row["task_id"] for row in ask("SELECT task_id FROM queue")} == {2, 3}


def test_it_asks_first_and_changes_nothing_on_a_no(router: CommandLine, ask: Ask):
    ask("INSERT INTO tasks (prompt) VALUES ('a'), ('b')")
    fail_all(ask)
    said = router("retry", "--all", answer="n\n")
    assert (said.code, "Retry 2 failed tasks?" in said.err) == (1, True)
    assert ask("SELECT count(*) AS n FROM tasks WHERE status = 'failed'")[0]["n"] == 2
    assert router("retry", "--all", answer="y\n").code == 0
    assert ask("SELECT count(*) AS n FROM tasks WHERE status = 'failed'")[0]["n"] == 0


def test_all_of_a_category_are_tried_again_in_batches(router: CommandLine, ask: Ask):
    ask("INSERT INTO tasks (prompt, category) SELECT 'p', 'technical' FROM generate_series(1, 2500)")
    ask("INSERT INTO tasks (prompt, category) VALUES ('q', 'creative'), ('r', NULL)")
    fail_all(ask)
    assert router("retry", "--category", "technical", "--yes", "--json").json["unsolved"] == 2500
    assert ask("SELECT unsolved, failed FROM task_counts_now WHERE category = 'technical'") == [
        {"unsolved": 2500, "failed": 0}
    ]
    assert ask("SELECT count(*) AS n FROM tasks WHERE status = 'failed'")[0]["n"] == 2
    assert router("retry", "--category", "general", "--yes", "--json").json["unsolved"] == 1  # it had none


def test_a_prompt_that_no_model_can_be_sent_stays_failed_and_is_counted(router: CommandLine, ask: Ask):
    ask("INSERT INTO tasks (prompt) VALUES ('  '), ('good')")
    fail_all(ask)
    said = router("retry", "--all", "--yes", "--json")
    assert (said.code, said.json) == (3, {"unsolved": 1, "still_failed": 1})


@pytest.mark.parametrize("arguments", [(), ("1", "--all"), ("--all", "--category", "general"), ("one",)])
def test_what_is_meant_must_be_said_in_one_way(router: CommandLine, arguments: tuple[str, ...]):
    assert router("retry", *arguments).code == 2
