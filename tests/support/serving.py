"""`router serve` as a process, used through the unchanged `openai` package."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import requests
import yaml

from models_backend.process import BackendServer
from router.database import connect, rows
from router.server.key_file import add_key
from router.settings.environment import DEFAULT_CONFIG_FOLDER
from tests.support.waiting import until

EVERY_CATEGORY = ("technical", "creative", "general")
CODE = "Write a Python function that reverses a linked list."


@dataclass
class Serving:
    """The server process, its client, database and backend."""

    process: subprocess.Popen[bytes]
    log_file: Path
    keys_file: Path
    key: str
    database_url: str
    backend: BackendServer
    url: str = field(init=False)
    client: openai.OpenAI = field(init=False)

    def __post_init__(self) -> None:
        until(lambda: self.process.poll() is not None or "router serve: http" in self.log, 60)
        assert self.process.poll() is None, self.log
        found = re.search(r"router serve: (http://\S+)/v1", self.log)
        assert found, self.log
        self.url = found[1]
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=30)

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def chat(self, prompt: str = "Why?", model: str = "auto", **more: Any) -> Any:
        messages = [{"role": "user", "content": prompt}]
        return self.client.chat.completions.create(model=model, messages=messages, **more)  # type: ignore[call-overload]

    def post(self, path: str = "/v1/chat/completions", *, key: str | None = None, **more: Any) -> Any:
        headers = {"Authorization": f"Bearer {key or self.key}", **more.pop("headers", {})}
        return requests.post(f"{self.url}{path}", headers=headers, timeout=30, **more)

    def rows(self, statement: str, *values: Any) -> list[dict[str, Any]]:
        with connect(self.database_url) as connection:
            return rows(connection, statement, values)

    def fault(self, kind: str, model: str = "*", seconds: float = 60, **more: Any) -> None:
        order = {"kind": kind, "model": model, "seconds": seconds, **more}
        requests.post(f"{self.backend.url}/faults", json=order, timeout=5).raise_for_status()


def config_folder(folder: Path) -> Path:
    """The shipped config with a fast, a cheap and a paused model, and short deadlines."""
    shutil.copytree(DEFAULT_CONFIG_FOLDER, folder)
    file = folder / "models.yaml"
    config = yaml.safe_load(file.read_text())
    ranks = dict.fromkeys(EVERY_CATEGORY, 1)
    config["models"] = {
        "qwen-2.5-72b": {"target": "6000/min", "ranks": ranks},
        "phi-4": {"target": "6000/min", "ranks": dict.fromkeys(EVERY_CATEGORY, 2)},
        "gemma-2-27b": {"target": "0", "ranks": {}},
    }
    config["answering"] = {"default_deadline_seconds": 4, "late_seconds": 1}
    config["fallback"] = {"models": ["phi-4"]}
    file.write_text(yaml.safe_dump(config))
    for examples in (folder / "examples").glob("*.jsonl"):  # fewer examples, for a faster start
        examples.write_text("\n".join(examples.read_text().splitlines()[::4]) + "\n")
    return folder


@contextmanager
def serving(
    folder: Path,
    services: dict[str, str],
    backend: BackendServer,
    *options: str,
    open_files: tuple[int, int] | None = None,
) -> Iterator[Serving]:
    """Starts a server, with these limits of open files; at the end it must stop cleanly."""
    folder.mkdir(exist_ok=True)
    keys, log = folder / "api_keys", folder / "serve.log"
    key = add_key(keys, "tester")
    environment = {**os.environ, **services, "ROUTER_API_KEYS": str(keys)}
    command = [sys.executable, "-m", "router.cli", "serve", "--port", "0", *options]
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    if open_files is not None:  # before the server reads them: it is still importing
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, open_files)
    try:
        server = Serving(process, log, keys, key, services["ROUTER_DATABASE_URL"], backend)
        with server.client:
            yield server
        process.terminate()
        assert process.wait(20) == 0, server.log
        assert "Traceback" not in server.log, server.log
        assert "unexpected error" not in server.log, server.log
    finally:
        process.kill()
        process.wait()


def classifies(server: Serving) -> bool:
    """Returns whether the classifier is ready; until then prompts get the default category."""
    completion = server.client.chat.completions.create(
        model="auto", messages=[{"role": "user", "content": CODE}], max_tokens=1
    )
    return "no category" not in completion.router["reason"]  # type: ignore[attr-defined]
