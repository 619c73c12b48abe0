"""JSON Lines, atomic replacement, and locks between processes."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from router.errors import ConfigError, InputError
from router.files import json_lines, locked, replacing


def test_json_lines_yields_each_object_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n\n{"a": "\u2028"}\n', encoding="utf-8")
    assert list(json_lines(file)) == [(f"{file}, line 1", {"a": 1}), (f"{file}, line 3", {"a": "\u2028"})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', "line 2: not valid JSON"),
        (b"[1]\n", "line 1: must be a JSON object, not list"),
        (b"[" * 100_000, "line 1: not valid JSON"),
        (b"\xff\n", "cannot be read as UTF-8 text"),
        (b'{"a": "' + b"x" * 100 + b'"}', "larger than 50 bytes"),
    ],
)
def test_json_lines_names_file_and_line_of_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        list(json_lines(file, error=InputError, max_bytes=50 if b"xx" in content else None))
    assert str(file) in str(raised.value)


def test_json_lines_names_a_file_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        list(json_lines(tmp_path / "missing.jsonl"))


def test_replaced_file_keeps_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("old")
    file.chmod(0o640)
    with replacing(file) as fresh:
        fresh.write(b"new")
        assert file.read_text() == "old"
    assert (file.read_text(), stat.S_IMODE(file.stat().st_mode)) == ("new", 0o640)


def test_error_while_replacing_keeps_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("old")
    with pytest.raises(TypeError), replacing(file) as fresh:
        fresh.writelines([b"half", "no bytes"])  # type: ignore[list-item]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert file.read_text() == "old"


def test_lock_is_exclusive(tmp_path: Path) -> None:
    with locked(tmp_path) as first:
        assert first
        with locked(tmp_path, timeout_seconds=0.01) as second:
            assert not second
    with locked(tmp_path, timeout_seconds=0.01) as third:
        assert third
