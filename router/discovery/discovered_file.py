"""Writes `config/discovered.yaml`, the models that the search found.

The file is derived from the roster in Postgres. After a crash, the next search, promotion or undo writes it
again. Without discovered models there is no file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from router.errors import ConfigError
from router.files import locked, replacing
from router.settings import DISCOVERED, load_config

HEADER = """\
# The models that the search found, with the history of each: when, by whom and why it was admitted, promoted
# or retired. The search rewrites this file from the roster; edits are lost. To change a model, use `router
# models promote`, `retire` or `undo`. To own a model, copy its entry to models.yaml without its history, with
# the state active: models.yaml takes precedence.
"""
LINE_WIDTH = 110
LOCK_SECONDS = 10.0


def require_writable(folder: Path) -> None:
    """Raises ConfigError if `discovered.yaml` is invalid, or cannot be written."""
    problem = load_config(folder).discovered_problem
    if problem is not None:
        raise ConfigError(problem)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{DISCOVERED}."):
            pass
    except OSError as error:
        raise ConfigError(
            f"{folder / DISCOVERED} cannot be written: {error.strerror}. Nothing was changed. Make the folder"
            " writable, or set ROUTER_CONFIG to one that is."
        ) from error


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Holds the lock of the file. Raises ConfigError if another process holds it for LOCK_SECONDS."""
    with locked(folder, timeout_seconds=LOCK_SECONDS) as acquired:
        if not acquired:
            raise ConfigError(f"Another process is writing {folder / DISCOVERED}. Try again.")
        yield


def write_discovered(folder: Path, models: list[dict[str, Any]]) -> bool:
    """Writes rows of the view `discovered_models`, or deletes the file if there are none.

    Replaces the file as a whole; call it within `writing`. Returns whether it changed.
    """
    path = folder / DISCOVERED
    before = path.read_bytes() if path.exists() else None
    if not models:
        path.unlink(missing_ok=True)
        return before is not None
    content = rendered(models).encode()
    if content == before:
        return False
    with replacing(path, mode=0o644) as file:  # other users who start the router read it, too
        file.write(content)
    return True


def entry_text(folder: Path, model: str) -> str:
    """The entry of one model as it is in the file, within 80 columns; empty if there is none."""
    path = folder / DISCOVERED
    models = yaml.safe_load(path.read_text(encoding="utf-8"))["models"] if path.exists() else {}
    entry = {model: models[model]} if model in models else {}
    return yaml.safe_dump(entry, sort_keys=False, allow_unicode=True, width=78) if entry else ""


def rendered(models: list[dict[str, Any]]) -> str:
    """Renders the file; the order of the rows does not matter."""
    entries = {row["model"]: _entry(row) for row in sorted(models, key=_admitted_at)}
    body = yaml.safe_dump({"models": entries}, sort_keys=False, allow_unicode=True, width=LINE_WIDTH)
    return HEADER + body


def _admitted_at(row: Mapping[str, Any]) -> tuple[str, str]:
    return min((change["at"] for change in row["history"]), default=""), row["model"]


def _entry(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "endpoint": row["endpoint"],
        "state": row["state"],
        "target": row["default_target"],
        "ranks": dict(sorted((row["ranks"] or {}).items())),
        "context_tokens": row["context_tokens"],
        "max_tokens": row["max_tokens"],
        "timeout_seconds": row["timeout_seconds"],
        "input_price": row["input_price"],
        "output_price": row["output_price"],
        "history": [{key: change[key] for key in ("what", "at", "by", "why")} for change in row["history"]],
    }
