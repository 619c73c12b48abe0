"""Writing exported lines to a file."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from router.queue import write_lines


def test_a_new_file_has_the_mode_of_the_umask(tmp_path: Path):
    before = os.umask(0o027)
    try:
        assert write_lines(tmp_path / "new", ["é\n", "b\n"]) == 2
    finally:
        os.umask(before)
    assert (tmp_path / "new").read_text(encoding="utf-8") == "é\nb\n"
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


def test_an_error_leaves_the_folder_unchanged(tmp_path: Path):
    def lines() -> Iterator[str]:
        yield "new\n"
        raise RuntimeError("the cursor broke")

    (tmp_path / "old").write_text("old\n")
    for name in ("old", "new"):
        with pytest.raises(RuntimeError, match="cursor"):
            write_lines(tmp_path / name, lines())
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "old\n"
