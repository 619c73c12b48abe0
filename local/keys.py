"""What a data folder remembers between starts: generated passwords and keys (0600), and the ports it had."""

from __future__ import annotations

import base64
import json
import os
import random
import secrets
import socket
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

FIRST_PORT, LAST_PORT = 20000, 31999  # below what systems hand out to outgoing connections


@dataclass(frozen=True, repr=False)
class Secrets:
    """Everything generated once for one data folder."""

    postgres: str
    redis: str
    fernet: str
    jwt: str
    api: str
    admin: str
    viewer: str
    router: str

    @property
    def airflow_passwords(self) -> dict[str, str]:
        """Airflow's users and their passwords."""
        return {"admin": self.admin, "viewer": self.viewer, "router": self.router}


def load_secrets(path: Path) -> Secrets:
    """The secrets kept in `path`, made when missing; the file is readable by its owner alone."""
    known: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    values = {field.name: known.get(field.name) or _generated(field.name) for field in fields(Secrets)}
    result = Secrets(**values)
    if values != known:
        write_private(path, json.dumps(asdict(result), indent=1))
    return result


def _generated(name: str) -> str:
    if name == "fernet":
        return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()
    if name in {"admin", "viewer"}:
        return secrets.token_urlsafe(12)  # people type these
    return secrets.token_urlsafe(32)


def load_ports(path: Path, names: Iterable[str]) -> dict[str, int]:
    """A free loopback port for each name: the one it had last time when nobody has taken it since."""
    known: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}
    ports: dict[str, int] = {}
    for name in names:
        ports[name] = _free(known.get(name), set(ports.values()))
    write_private(path, json.dumps(ports, indent=1))
    return ports


def _free(wanted: int | None, taken: set[int]) -> int:
    candidates = [wanted] if wanted else []
    candidates += random.sample(range(FIRST_PORT, LAST_PORT), 200)
    for port in candidates:
        if port not in taken and _is_free(port):
            return port
    raise RuntimeError(f"No free port found between {FIRST_PORT} and {LAST_PORT} on 127.0.0.1.")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: TIME_WAIT is free
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def write_private(path: Path, text: str) -> None:
    """Write the file whole or not at all, readable by its owner alone from the first moment."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text + "\n")
    beside.replace(path)


def as_shell(values: Mapping[str, str]) -> str:
    """Lines for `set -a; . file; set +a`; every value is quoted."""
    import shlex  # noqa: PLC0415 - only here

    return "\n".join(f"{name}={shlex.quote(value)}" for name, value in values.items())
