"""`router load` on a real PostgreSQL."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import pytest

from router.database import connect, rows
from router.queue.ingest import NewTask
from router.queue.tasks import enqueue
from tests.support.command_line import CommandLine, CommandResult
from tests.support.waiting import until


@pytest.fixture
def router(database: str) -> CommandLine:
    return CommandLine({"ROUTER_DATABASE_URL": database})


@pytest.fixture
def ask(database: str) -> Callable[..., list[dict[str, Any]]]:
    def run(statement: str, *arguments: Any) -> list[dict[str, Any]]:
        with connect(database) as connection:
            return rows(connection, statement, arguments)

    return run


def prompts_in(ask: Callable[..., list[dict[str, Any]]]) -> list[str]:
    return [row["prompt"] for row in ask("SELECT prompt FROM tasks ORDER BY id")]


def test_the_client_of_all_rows_can_be_given(router: CommandLine, ask: Any, tmp_path: Path):
    (tmp_path / "c.txt").write_text("one\ntwo\n")
    assert router("load", tmp_path / "c.txt", "--client", "alice").code == 0
    assert router("load", tmp_path / "c.txt", "--json").json["added"] == 2, "another client's tasks"
    found = ask("SELECT client, count(*) AS n FROM tasks GROUP BY client ORDER BY client")
    assert found == [{"client": "", "n": 2}, {"client": "alice", "n": 2}]
    refused = router("load", tmp_path / "c.txt", "--client", "two words")
    assert (refused.code, "'two words' is not a client" in refused.err) == (1, True)


def test_tasks_of_every_format_are_queued(router: CommandLine, ask: Any, tmp_path: Path):
    chat = {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "max_tokens": 7,
    }
    deadline = "2030-01-01T00:00:00+02:00"
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"custom_id": "r-1", "method": "POST", "url": "/v1/chat/completions", "body": chat}) + "\n"
        + json.dumps({"prompt": "plain\ttab \\ back\nslash", "priority": 2, "deadline_at": deadline})
    )  # fmt: skip
    (tmp_path / "b.csv").write_text("prompt,category\nfrom csv,creative\n")
    (tmp_path / "c.txt").write_text("from text\n")
    result = router("load", tmp_path / "a.jsonl", tmp_path / "b.csv", tmp_path / "c.txt", "--json")
    assert (result.code, result.json["added"], result.json["read"], result.json["bad"]) == (0, 4, 4, 0)
    found = ask(
        "SELECT prompt, external_id, category, priority, max_tokens, deadline_at FROM tasks ORDER BY id"
    )
    assert [row["prompt"] for row in found] == [
        "Be brief.\n\nHi", "plain\ttab \\ back\nslash", "from csv", "from text"
    ]  # fmt: skip
    assert (found[0]["external_id"], found[0]["max_tokens"]) == ("r-1", 7)
    assert (found[1]["priority"], found[1]["deadline_at"].isoformat()) == (2, "2029-12-31T22:00:00+00:00")
    assert [row["category"] for row in found] == [None, None, "creative", None]
    assert ask("SELECT count(*) AS n FROM queue")[0]["n"] == 4


def test_loading_a_file_again_adds_nothing(router: CommandLine, ask: Any, tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\none\n")
    assert router("load", file, "--json").json["added"] == 3
    again = router("load", file, "--json").json
    assert (again["added"], again["known"]) == (0, 3)
    assert prompts_in(ask) == ["one", "two", "one"]


def test_invalid_rows_are_listed_and_the_others_loaded(router: CommandLine, ask: Any, tmp_path: Path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "good"}\nbad\n{"prompt": "good too"}\n{"prompt": ""}\n')
    result = router("load", file)
    assert result.code == 3
    assert f"{file}:2: the line is not valid JSON" in result.err
    assert f"{file}:4: the prompt is empty" in result.err
    assert "2 added · 2 invalid" in result.out
    assert prompts_in(ask) == ["good", "good too"]


def test_the_first_invalid_rows_are_listed_and_all_are_counted(router: CommandLine, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("bad\n" * 100)
    result = router("load", tmp_path / "a.jsonl")
    assert (result.code, result.err.count("not valid JSON")) == (3, 20)
    result = router("load", tmp_path / "a.jsonl", "--json")
    assert (result.json["bad"], len(result.json["errors"]), result.err) == (100, 20, "")


def test_an_id_conflict_is_reported_and_a_prefix_resolves_it(router: CommandLine, ask: Any, tmp_path: Path):
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    first.write_text('{"id": "request-1", "prompt": "a"}\n')
    second.write_text('{"id": "request-1", "prompt": "b"}\n')
    router("load", first)
    result = router("load", second)
    assert result.code == 3
    assert "belongs to task 1, which has another prompt" in result.err
    assert router("load", second, "--id-prefix", "2/").code == 0
    assert prompts_in(ask) == ["a", "b"]


def test_an_unknown_category_is_classified(router: CommandLine, ask: Any, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "category": "maths"}\n')
    result = router("load", tmp_path / "a.jsonl")
    assert result.code == 0
    assert "maths" in result.err
    assert ask("SELECT category FROM tasks")[0]["category"] is None


def test_options_are_defaults_for_rows(router: CommandLine, ask: Any, tmp_path: Path):
    (tmp_path / "a.txt").write_text("a\n")
    assert router("load", tmp_path / "a.txt", "--category", "technical", "--priority", "-3").code == 0
    assert ask("SELECT category, priority FROM queue") == [{"category": "technical", "priority": -3}]
    result = router("load", tmp_path / "a.txt", "--category", "techncal")
    assert (result.code, "did you mean 'technical'?" in result.err) == (1, True)
    assert router("load", tmp_path / "a.txt", "--priority", "99").code == 2


def test_a_missing_file_fails_before_anything_is_added(router: CommandLine, ask: Any, tmp_path: Path):
    (tmp_path / "a.txt").write_text("a\n")
    result = router("load", tmp_path / "a.txt", tmp_path / "missing.txt")
    assert (result.code, "missing.txt cannot be read: No such file" in result.err) == (1, True)
    assert prompts_in(ask) == []


def test_standard_input(router: CommandLine, ask: Any):
    program = router.start("load", "-", "--json")
    out, err = program.communicate(b'{"prompt": "piped"}\n')
    assert (program.returncode, json.loads(out)["added"], err) == (0, 1, b"")
    assert prompts_in(ask) == ["piped"]


def test_an_interrupted_load_continues(router: CommandLine, ask: Any):
    lines = [f'{{"prompt": "number {number}"}}\n'.encode() for number in range(5000)]
    program = router.start("load", "-")
    assert program.stdin is not None
    program.stdin.write(b"".join(lines[:2500]))
    program.stdin.flush()
    until(lambda: len(prompts_in(ask)) == 2000)  # one batch; the next one waits for more rows
    program.send_signal(signal.SIGINT)
    _, err = program.communicate()
    assert program.returncode == 130
    assert b"2,000 tasks were added" in err
    assert b"Traceback" not in err
    again = router.start("load", "-", "--json")
    result = json.loads(again.communicate(b"".join(lines))[0])
    assert (result["added"], result["known"]) == (3000, 2000)


def test_concurrent_loads_of_the_same_ids_succeed(database: str, ask: Any):
    empty = NewTask(0, "", "", own_id=True, category=None, priority=0, max_tokens=None, deadline_at=None)
    rounds = [
        [replace(empty, prompt="p", external_id=f"{turn}-{number}") for number in range(3000)]
        for turn in range(3)
    ]
    together = Barrier(2, timeout=60)
    failed: list[BaseException] = []

    def run(step: int) -> None:
        try:
            with connect(database) as connection:
                for batch in rounds:
                    in_order = [replace(task, line=line) for line, task in enumerate(batch[::step])]
                    together.wait()
                    enqueue(connection, in_order)
        except BaseException as error:  # noqa: BLE001 - asserted below
            failed.append(error)
            together.abort()

    threads = [Thread(target=run, args=(step,)) for step in (1, -1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert ask("SELECT count(*) AS n FROM tasks")[0]["n"] == 9000


def error_of(result: CommandResult) -> str:
    assert result.code == 1
    assert result.out == ""
    assert "Traceback" not in result.err
    return result.err


def test_missing_settings_and_services_are_reported(empty_database: str, tmp_path: Path):
    (tmp_path / "a.txt").write_text("a\n")
    load = ("load", tmp_path / "a.txt")
    assert "ROUTER_DATABASE_URL is not set" in error_of(CommandLine({})(*load))
    assert "`router migrate`" in error_of(CommandLine({"ROUTER_DATABASE_URL": empty_database})(*load))
    away = "postgresql://nobody@127.0.0.1:9/none"
    assert "Postgres cannot be reached" in error_of(CommandLine({"ROUTER_DATABASE_URL": away})(*load))
