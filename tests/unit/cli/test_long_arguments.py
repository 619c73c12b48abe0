"""Errors repeat at most 300 characters of what they were given."""

from __future__ import annotations

from pathlib import Path

import pytest

from router.errors import MAX_ECHOED, InputError, RouterError, unknown
from router.settings import load_config
from router.traffic import TrafficTarget
from tests.support.command_line import CommandLine

LONG = "q" * 20_000


def check(text: str) -> None:
    assert text.count("q") < MAX_ECHOED + 20


@pytest.mark.parametrize(
    "arguments",
    [
        ["log", "--since", LONG],
        ["log", "--limit", LONG],
        ["log", f"--{LONG}"],
        ["keys", "add", LONG],
        ["keys", "remove", LONG],
        ["serve", "--no-keys", "--cors-origin", LONG],
        ["feedback", "1", LONG],
        [LONG],
        [f"--{LONG}"],
    ],
    ids=lambda arguments: " ".join(arguments).replace(LONG, "LONG"),
)
def test_an_argument(arguments: list[str], tmp_path: Path):
    keys = ["--keys", str(tmp_path / "keys")] if arguments[0] == "keys" else []
    result = CommandLine({"ROUTER_DATABASE_URL": "postgresql://nowhere.invalid/x"})(*arguments, *keys)
    assert result.code in {1, 2}
    check(result.err)


def test_a_name():
    check(str(unknown(LONG, ["a"], "category")))


@pytest.mark.parametrize("line", [LONG, f"5/{LONG}", f"5 {LONG}/min", f"5{LONG}", f"5/min, {LONG}"])
def test_a_traffic_target(line: str):
    with pytest.raises(RouterError) as error:
        TrafficTarget.parse(line)
    assert str(error.value).count("q") < MAX_ECHOED + 20


@pytest.mark.parametrize(
    "text",
    [
        f"{LONG}: 1",
        f"answering: {LONG}",
        f"answering:\n  {LONG}: 1",
        f"models: {{{LONG}: {{target: 5/min}}}}",
    ],
    ids=["key", "value", "nested key", "model"],
)
def test_a_config_file(text: str, tmp_path: Path):
    (tmp_path / "models.yaml").write_text(text)
    with pytest.raises(RouterError) as error:
        load_config(tmp_path)
    assert str(error.value).count("q") < MAX_ECHOED + 60
    assert not isinstance(error.value, InputError)
