"""The command line starts fast: slow imports happen in the commands that need them."""

from __future__ import annotations

import subprocess
import sys

SLOW = {"aiohttp", "fastapi", "numpy", "redis", "scipy", "sklearn"}


def test_slow_libraries_are_not_imported_at_start():
    loaded = subprocess.run(
        [sys.executable, "-c", "import router.cli, sys; print(*sys.modules)"],
        check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    assert "router.cli.ask" in loaded
    assert not SLOW & set(loaded)
