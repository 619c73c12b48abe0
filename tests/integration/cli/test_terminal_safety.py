"""Texts of models, files, Variables and catalogs are shown and cannot control the terminal, here a pty."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from local.redis import RedisServer
from models_backend.process import BackendServer, start_backend
from router.database import connect, rows
from router.settings import DEFAULT_CONFIG_FOLDER
from router.task import new_call_id
from tests.support.command_line import CommandLine

CLIPBOARD = "52;c;ZXZpbA=="
HOSTILE = f"\x1b]{CLIPBOARD}\x07\x9d{CLIPBOARD}\x9c\u202e\u200b\x1b]8;;http://evil.example\x07\x1b[2J[link=http://evil.example]"
COMMANDS = (b"\x1b]", b"\x1bP", b"\xc2\x9d", b"\xc2\x9b", b"\xe2\x80\xae", b"\xe2\x80\x8b", b"\x1b[2J")

Ask = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackendServer]:
    server = start_backend(tmp_path_factory.mktemp("backend"), "--time-scale", "20", "--latency", "even:2:4")
    yield server
    server.stop()


@pytest.fixture
def router(
    database: str, redis_server: RedisServer, redis_client: object, backend: BackendServer, trained_data: Path
) -> CommandLine:
    return CommandLine(
        {
            "ROUTER_DATABASE_URL": database,
            "ROUTER_REDIS_URL": redis_server.url,
            "MODELS_BACKEND_URL": backend.url,
            "ROUTER_DATA": str(trained_data),
            "COLUMNS": "400",
            "TERM": "xterm-256color",
        }
    )


@pytest.fixture
def ask(database: str) -> Ask:
    def run(statement: str, *arguments: Any) -> list[dict[str, Any]]:
        with connect(database) as connection:
            return rows(connection, statement, arguments)

    return run


def check(output: bytes, shown: str = CLIPBOARD) -> None:
    """The hostile text was shown, and none of its commands reached the terminal."""
    assert shown in output.decode(), output
    for command in COMMANDS:
        assert command not in output, output


def log_call(ask: Ask, *, model: str = "phi-4", error: str = "") -> None:
    ask(
        "INSERT INTO model_calls (call_id, model, category, role, finished_at, outcome, error)"
        " VALUES (%s, %s, 'general', 'asked', now(), 'error', %s)",
        str(new_call_id(time.time())), model, error,
    )  # fmt: skip


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["table", "json"])
@pytest.mark.parametrize("column", ["model", "error"])
def test_the_call_log(router: CommandLine, ask: Ask, column: str, options: list[str]) -> None:
    log_call(ask, **{column: HOSTILE[:100]})
    check(router.on_terminal("log", *options), "52;c;Z")


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_an_answer(router: CommandLine, options: list[str]) -> None:
    # The simulated models repeat the prompt in good answers.
    check(
        router.on_terminal("ask", "--category", "general", "--late", "0", *options, f"Why is {HOSTILE} blue?")
    )


def test_an_answer_stays_exact_in_a_pipe(router: CommandLine) -> None:
    process = router.start("ask", "--category", "general", "--late", "0", f"Why is {HOSTILE} blue?")
    out, _ = process.communicate(timeout=90)
    assert HOSTILE in out.decode()


def test_an_exported_answer(router: CommandLine, ask: Ask) -> None:
    ask("INSERT INTO tasks (prompt, status, answer) VALUES ('Why?', 'solved', %s)", HOSTILE)
    check(router.on_terminal("export", "-"))
    exported = json.loads(router("export", "-").out)
    assert exported["response"]["body"]["choices"][0]["message"]["content"] == HOSTILE


@pytest.mark.parametrize(
    "arguments",
    [
        ["log", "--since", HOSTILE],
        ["ask", "--model", HOSTILE, "Why?"],
        ["traffic", "phi-4", HOSTILE],
        ["keys", "add", HOSTILE],
        ["knowledge", "add", HOSTILE],
        [HOSTILE],
        ["log", f"--{HOSTILE}"],
        ["log", "--limit", HOSTILE],
        ["status", "--database", HOSTILE],
    ],
    ids=lambda arguments: " ".join(arguments).replace(HOSTILE, "HOSTILE"),
)
def test_an_argument_that_is_refused(router: CommandLine, arguments: list[str]) -> None:
    output = router.on_terminal(*arguments)
    assert output
    for command in COMMANDS:
        assert command not in output, output


def test_a_file_of_prompts(router: CommandLine, tmp_path: Path) -> None:
    file = tmp_path / f"{HOSTILE.replace('/', '')}.jsonl"
    lines = [json.dumps({HOSTILE: "a"}), json.dumps({"prompt": "Why?", "category": HOSTILE}), HOSTILE]
    file.write_text("\n".join(lines))
    check(router.on_terminal("load", str(file)), "52;c;Z")


def test_a_file_of_knowledge(router: CommandLine, tmp_path: Path) -> None:
    file = tmp_path / f"{HOSTILE.replace('/', '')}.md"
    file.write_text(f"# {HOSTILE}\n\nThe reactor is cooled with water. {HOSTILE}")
    check(router.on_terminal("knowledge", "add", str(file)))
    check(router.on_terminal("knowledge", "list"))
    check(router.on_terminal("knowledge", "search", "How is the reactor cooled?"))


def test_a_line_of_a_variable(router: CommandLine, ask: Ask) -> None:
    ask("INSERT INTO traffic_troubles (model, line, problem) VALUES ('phi-4', %s, %s)", HOSTILE, HOSTILE)
    check(router.on_terminal("traffic"))
    check(router.on_terminal("status"))


def test_a_name_in_a_config_file(router: CommandLine, tmp_path: Path) -> None:
    folder = tmp_path / "config"
    shutil.copytree(DEFAULT_CONFIG_FOLDER, folder)
    config = yaml.safe_load((folder / "models.yaml").read_text())
    config["models"][HOSTILE] = {"target": "5/min", "ranks": {}}
    (folder / "models.yaml").write_text(yaml.safe_dump(config))
    check(router.on_terminal("models", "sync", "--config", str(folder)))


def test_an_entry_of_a_catalog(router: CommandLine, tmp_path: Path) -> None:
    folder = tmp_path / "config"
    shutil.copytree(DEFAULT_CONFIG_FOLDER, folder)
    entries = [{"name": f"a{HOSTILE}"}, {"name": "llama-9", "parameters": HOSTILE}]
    (folder / "llama_catalog.yaml").write_text(yaml.safe_dump({"models": entries}))
    check(router.on_terminal("models", "search", "--dry-run", "--config", str(folder)), "Not tried")
    check(router.on_terminal("models", "search", "--dry-run", "--json", "--config", str(folder)), "52;c;")
