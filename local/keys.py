"""Files of a data folder that persist between starts: generated secrets (mode 0600) and ports."""

from __future__ import annotations

import base64
import json
import random
import secrets
import shlex
import socket
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from router.files import replacing

FIRST_PORT, LAST_PORT = 20000, 31999  # below the ephemeral ports


@dataclass(frozen=True, repr=False)
class Secrets:
    """Generated passwords and keys of one data folder."""

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
        """Passwords of Airflow's users."""
        return {"admin": self.admin, "viewer": self.viewer, "router": self.router}


def load_secrets(path: Path) -> Secrets:
    """Reads the secrets in `path` and generates missing ones."""
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
        return secrets.token_urlsafe(12)  # typed by hand
    return secrets.token_urlsafe(32)


def load_ports(path: Path, names: Iterable[str]) -> dict[str, int]:
    """Returns a free loopback port for each name, the one in `path` if it is still free."""
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
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # servers can reuse a port in TIME_WAIT
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def write_private(path: Path, text: str) -> None:
    """Replaces a file atomically; only its owner can read it."""
    with replacing(path, mode=0o600) as file:
        file.write(f"{text}\n".encode())


def as_shell(values: Mapping[str, str]) -> str:
    """Formats variables for `set -a; . file; set +a`."""
    return "\n".join(f"{name}={shlex.quote(value)}" for name, value in values.items())
