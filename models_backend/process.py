"""Runs the stand-in as a process of its own, for benches and tests."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_SECONDS = 30.0
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class BackendServer:
    """A running stand-in; `stop` ends its process."""

    process: subprocess.Popen[bytes]
    url: str
    arrival_log: Path

    def arrivals(self) -> list[dict[str, Any]]:
        """The arrival log so far; complete after `stop`."""
        if not self.arrival_log.exists():
            return []
        return [json.loads(line) for line in self.arrival_log.read_text(encoding="utf-8").splitlines()]

    def stop(self) -> None:
        """Sends SIGTERM and waits for the log to be complete; SIGKILL after 10 s. Idempotent."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def free_port() -> int:
    """A loopback TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_backend(folder: Path, *arguments: str, port: int | None = None) -> BackendServer:
    """Starts `python -m models_backend` with its logs in `folder`; returns once /health answers.

    `arguments` extend its command line (`--time-scale`, `--latency`, ...). Raises RuntimeError with its
    last output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    arrival_log, output = folder / "arrivals.jsonl", folder / "models_backend.log"
    command = [
        sys.executable,
        "-m",
        "models_backend",
        "--port",
        str(port),
        "--arrival-log",
        str(arrival_log),
        *arguments,
    ]
    with output.open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=ROOT)  # noqa: S603 - our own program
    server = BackendServer(process, f"http://127.0.0.1:{port}", arrival_log)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(
                f"The Models Backend did not start: {output.read_text(errors='replace')[-1500:]}"
            )
        if _answers(server.url, process.pid):
            return server
        time.sleep(0.05)
    server.stop()
    raise RuntimeError(f"The Models Backend at {server.url} did not answer within {START_SECONDS:g} s.")


def _answers(url: str, pid: int) -> bool:
    """Whether this process answers, and not another one on the same port."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{url}/health", timeout=1) as response:
            return bool(json.load(response).get("pid") == pid)
    except (OSError, ValueError):
        return False
