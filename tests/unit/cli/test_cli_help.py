"""Help texts, version, shell completion and unknown environment variables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
from typer.testing import CliRunner

from router.cli.main import app
from router.settings import unknown_variables
from router.settings.variables import KNOWN

ROOT = Path(__file__).parents[3]
COMMAND: Any = typer.main.get_command(app)


def commands(command: Any = COMMAND, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


def output_of(*arguments: str, **environment: str) -> str:
    done = CliRunner().invoke(app, list(arguments), env=environment, prog_name="router")
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_no_help_text_is_cut(columns: str) -> None:
    for path, command in commands():
        output = output_of(*path, "--help", COLUMNS=columns, TERMINAL_WIDTH=columns)
        words = " ".join(output.split())
        for name, inner in getattr(command, "commands", {}).items():
            sentence = " ".join(inner.get_short_help_str(1000).split())
            assert f"{name} {sentence}" in words, (path, name)
        cut = [line for line in output.splitlines() if re.search(r"[a-z,;]\\.\\.\\.$|\u2026", line)]
        assert not cut, (path, cut)


def test_the_version_is_shown() -> None:
    assert output_of("--version") == f"router {version('llm-router')}\n"


def test_every_model_and_category_is_completed() -> None:
    completed = set()
    for path, command in commands():
        for parameter in command.params:
            if parameter.metavar in {"MODEL", "CATEGORY"}:
                context = click.Context(command, info_name="router")
                found = {getattr(item, "value", item) for item in parameter.shell_complete(context, "")}
                assert {"MODEL": "phi-4", "CATEGORY": "creative"}[parameter.metavar] in found, path
                assert not list(parameter.shell_complete(context, "zz"))
                completed.add(path[0])
    assert completed >= {"ask", "load", "log", "models", "ranking", "retry", "traffic"}


def test_completion_without_a_valid_config_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUTER_CONFIG", str(tmp_path))
    ask = COMMAND.commands["ask"]
    (model,) = [parameter for parameter in ask.params if parameter.metavar == "MODEL"]
    assert model.shell_complete(click.Context(ask), "") == []


def test_unknown_environment_variables_are_named() -> None:
    unknown = {"ROUTER_DATABSE_URL": "x", "ROUTER_NOTHING_LIKE_IT": "x"}
    links = {"ROUTER_SERVICE_HOST": "10.0.0.1", "ROUTER_API_PORT_80_TCP_ADDR": "10.0.0.1", "ROUTER_PORT": "x"}
    first, second = unknown_variables({**unknown, **links, "ROUTER_CONFIG": "x", "OTHER": "x"})
    assert "ROUTER_DATABSE_URL is unknown and has no effect. Did you mean ROUTER_DATABASE_URL?" in first
    assert "ROUTER_NOTHING_LIKE_IT is unknown" in second
    done = CliRunner().invoke(app, ["keys", "--help"], env=unknown, prog_name="router")
    assert "ROUTER_DATABSE_URL is unknown" in done.stderr


def test_the_known_environment_variables_are_those_that_are_read() -> None:
    folders = ("router", "plugins", "dags", "local", "bench", "models_backend")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    files = [path for path in files if path.name != "variables.py"] + [ROOT / "Makefile"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    used = set(re.findall(r"\bROUTER_[A-Z_]*[A-Z]\b", text)) - {"ROUTER_DB", "ROUTER_REDIS"}
    assert used - {"ROUTER_AIRFLOW"} == KNOWN
