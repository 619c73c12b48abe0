"""The command line starts quickly: what takes long to load is loaded by the verbs that need it."""

from __future__ import annotations

import subprocess
import sys

SLOW = {"aiohttp", "fastapi", "numpy", "redis", "scipy", "sklearn"}


def test_no_verb_waits_for_what_another_one_needs():
    loaded = subprocess.run(
        [sys.executable, "-c", "import router.cli, sys; print(*sys.modules)"],
        check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    assert "router.cli.ask" in loaded
    assert not SLOW & set(loaded)
