"""4. The command line: what a person does with the router, from a file of prompts to a file of answers.

`router` speaks the words of the glossary. What it cannot do it says in one message, and its exit code tells a
program the same: 0 done, 1 could not be done, 2 wrong usage, 3 done but for what was named. Every verb
explains itself with `--help`, and prints for programs with `--json`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from local.redis import RedisServer
from router.database import connect, rows
from router.task import new_call_id
from tests.support.command_line import CommandLine


@pytest.fixture
def router(database: str, redis_server: RedisServer) -> CommandLine:
    """The environment says where things are, or options do; `router migrate` has run."""
    return CommandLine({"ROUTER_DATABASE_URL": database, "ROUTER_REDIS_URL": redis_server.url})


def solve_all(database: str) -> None:
    """What the workers do, without a model: claim each task, and settle it."""
    with connect(database) as connection:
        rows(connection, "SELECT heartbeat('a worker')")
        while True:
            call = str(new_call_id(time.time()))
            claim = "SELECT prompt FROM claim_task('phi-4', '{technical,creative,general}', 'a worker', %s)"
            claimed = rows(connection, claim, (call,))
            if not claimed:
                return
            outcome, answer = ("answered", f"Answer: {claimed[0]['prompt']}")
            if claimed[0]["prompt"] == "forbidden":
                outcome, answer = ("rejected", None)
            rows(connection, "SELECT settle_call(%s, %s, %s)", (call, outcome, answer))


def test_prompts_come_from_files_of_many_kinds(router: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Why is the sky blue?\nWhat is a monad?\n")
    (tmp_path / "prompts.csv").write_text("prompt,category\nWrite a haiku,creative\n")
    assert router("load", tmp_path / "prompts.txt", tmp_path / "prompts.csv").code == 0
    assert router("status", "--json").json["tasks"]["unsolved"] == 3


def test_the_same_file_again_adds_nothing(router: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Why is the sky blue?\n")
    router("load", tmp_path / "prompts.txt")
    assert "0 added · 1 already present" in router("load", tmp_path / "prompts.txt").out


def test_a_line_that_cannot_be_read_is_named_and_the_others_are_loaded(
    router: CommandLine, tmp_path: Path
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "good"}\n{"prompt": \n')
    said = router("load", tmp_path / "prompts.jsonl")
    assert said.code == 3
    assert "prompts.jsonl:2: the line is not valid JSON" in said.err
    assert "1 added · 1 invalid" in said.out


def test_answers_go_out_under_the_ids_they_came_in_with(
    router: CommandLine, database: str, tmp_path: Path
) -> None:
    (tmp_path / "batch.jsonl").write_text(
        '{"custom_id": "q-7", "method": "POST", "url": "/v1/chat/completions", "body": {"messages":'
        ' [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]}}\n'
    )
    router("load", tmp_path / "batch.jsonl")
    solve_all(database)
    router("export", tmp_path / "answers.jsonl")
    (answer,) = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    assert answer["custom_id"] == "q-7"
    message = answer["response"]["body"]["choices"][0]["message"]
    assert message["content"] == "Answer: Be brief.\n\nWhy?"  # a chat is one prompt: its system text first


def test_failed_tasks_can_be_tried_again(router: CommandLine, database: str, tmp_path: Path) -> None:
    with connect(database) as connection:
        rows(connection, "UPDATE queue_settings SET max_attempts = 1")
    (tmp_path / "prompts.txt").write_text("forbidden\n")
    router("load", tmp_path / "prompts.txt")
    solve_all(database)
    assert router("status", "--json").json["tasks"]["failed"] == 1
    assert router("retry", "--all", "--yes").code == 0
    assert router("status", "--json").json["tasks"] == {
        "unsolved": 1, "uncategorised": 0, "ready": 1, "waiting": 0, "running": 0, "solved": 0, "failed": 0
    }  # fmt: skip


def test_a_traffic_target_is_checked_before_it_is_set(router: CommandLine) -> None:
    said = router("traffic", "phi-4", "120/min, 4/second, 20 at one")
    assert said.code == 1
    assert "'at one' is not a limit at column 23" in said.err
    assert "20 at once            calls in flight" in said.err  # the grammar, to write it right
