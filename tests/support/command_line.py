"""Calls `router` in this process or as a separate one."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from typer.testing import CliRunner

from router.cli.main import app

REMOVED = ("ROUTER_DATABASE_URL", "ROUTER_REDIS_URL", "ROUTER_AIRFLOW_URL", "ROUTER_CONFIG")


@dataclass(frozen=True)
class CommandResult:
    """Output and exit code of a call."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass(frozen=True)
class CommandLine:
    """Calls `router` with the given environment variables."""

    environment: Mapping[str, str]

    def __call__(self, *arguments: object, answer: str | None = None) -> CommandResult:
        """Runs a command in this process; `answer` is its standard input."""
        environment = {**dict.fromkeys(REMOVED), "COLUMNS": "100", **self.environment}
        result = CliRunner().invoke(
            app, [str(argument) for argument in arguments], input=answer, env=environment
        )
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return CommandResult(result.exit_code, result.stdout, result.stderr)

    def start(self, *arguments: object, **options: Any) -> subprocess.Popen[bytes]:
        """Starts a command as a process."""
        environment = {name: value for name, value in os.environ.items() if name not in REMOVED}
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen(
            [sys.executable, "-m", "router.cli", *map(str, arguments)],
            env={**environment, "COLUMNS": "100", **self.environment},
            **{**pipes, **options},
        )

    def on_terminal(self, *arguments: object, **options: Any) -> bytes:
        """Runs a command on a pseudo-terminal and returns the bytes that reach it."""
        ours, theirs = pty.openpty()
        process = self.start(*arguments, stdin=theirs, stdout=theirs, stderr=theirs, **options)
        os.close(theirs)
        output = bytearray()
        try:
            with contextlib.suppress(OSError):  # the end of a pseudo-terminal
                while piece := os.read(ours, 65_536):
                    output += piece
            process.wait(30)
        finally:
            process.kill()
            os.close(ours)
        return bytes(output)
