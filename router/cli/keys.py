"""`router keys`: the API keys of `router serve`."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer

from router.cli import terminal
from router.errors import InputError, echoed
from router.server import StoredKey, add_key, expiry, read_keys, read_last_used, remove_keys
from router.traffic import TrafficTarget

DEFAULT_KEYS = Path("~/.config/llm-router/api_keys")
KEYS_HELP = """
Manage API keys for `router serve`.

Changes apply within a second. To replace a key without an outage, add a second one with --rotate, let the
client switch, and remove the old one by its id.

\b
Examples:
  router keys add alice
  router keys add bob --limit "60/min, $5/day" --models phi-4,gemma-2-27b --expires 90d
  router keys list
  router keys add alice --rotate
  router keys remove alice --id 5e884898      one key
  router keys remove alice                    all keys of alice
"""

KeysFile = Annotated[
    Path,
    typer.Option("--keys", metavar="FILE", envvar="ROUTER_API_KEYS", help="File with the hashed keys."),
]
Client = Annotated[str, typer.Argument(metavar="CLIENT", help="Name of the client.")]

keys = terminal.verbs()


@keys.command("add")
def add(
    client: Client,
    *,
    limit: Annotated[
        str | None,
        typer.Option(
            metavar="TARGET",
            help='Limit of the client over all models and keys, e.g. "60/min, $5/day". An entry in'
            " clients: of models.yaml takes precedence.",
        ),
    ] = None,
    models: Annotated[
        str | None, typer.Option(metavar="MODEL,...", help="Models that the key may use. Default: all.")
    ] = None,
    expires: Annotated[
        str | None, typer.Option(metavar="AGE", help="Validity, e.g. 12h or 90d. Default: unlimited.")
    ] = None,
    rotate: Annotated[
        bool,
        typer.Option(
            "--rotate", help="Add a second key, with the limit and models of the first unless given."
        ),
    ] = False,
    file: KeysFile = DEFAULT_KEYS,
    as_json: terminal.Json = False,
    database: terminal.Database = None,
) -> None:
    """Create a key for a client and print it. Only its hash is stored."""
    before = _described(file, client)
    key = add_key(
        file.expanduser(), client, rotate=rotate, expires=None if expires is None else _expiry(expires),
        models=None if models is None else _names(models),
        limit=None if limit is None else TrafficTarget.parse(limit),
    )  # fmt: skip
    terminal.audit(database, "keys add", client, before=before, after=_described(file, client))
    if as_json:
        terminal.print_json({"client": client, "key": key})
    else:
        typer.echo(key)
        terminal.note(f"This is the key of {client}. It is not stored and cannot be shown again.")


@keys.command("list")
def list_keys(*, file: KeysFile = DEFAULT_KEYS, as_json: terminal.Json = False) -> None:
    """List the keys, without their secrets."""
    stored = sorted(read_keys(file.expanduser()), key=lambda key: key.client)
    used = read_last_used(file.expanduser())
    if as_json:
        terminal.print_json([_object(key, used.get(key.id)) for key in stored])
        return
    if not stored:
        typer.echo("no client has a key; create one: router keys add NAME")
        return
    table = terminal.quiet_table("client", "id", "created", "expires", "last used", "limit", "models")
    for key in stored:
        table.add_row(
            key.client, key.id, _day(key.created), "expired" if key.is_expired() else _day(key.expires),
            _ago(used.get(key.id)), str(key.limit or ""),
            "all" if key.models is None else ", ".join(key.models),
        )  # fmt: skip
    terminal.out().print(table)


@keys.command("remove")
def remove(
    client: Client,
    *,
    key_id: Annotated[
        str | None, typer.Option("--id", metavar="ID", help="Revoke this key only; see `router keys list`.")
    ] = None,
    file: KeysFile = DEFAULT_KEYS,
    database: terminal.Database = None,
) -> None:
    """Revoke the keys of a client, or one of them."""
    before = _described(file, client)
    count = remove_keys(file.expanduser(), client, key_id)
    terminal.audit(database, "keys remove", client, before=before, after=_described(file, client))
    typer.echo(f"revoked {count} keys of {client}" if count > 1 else f"revoked the key of {client}")


def _described(file: Path, client: str) -> str | None:
    """Describes the keys of a client without their secrets; None if it has none."""
    described = [
        f"{key.id}: limit {key.limit or 'none'}, models {', '.join(key.models or ['all'])},"
        f" expires {_day(key.expires) or 'never'}"
        for key in read_keys(file.expanduser())
        if key.client == client
    ]
    return "; ".join(described) or None


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError(f"--models {echoed(text)} names no model. Give e.g. phi-4,gemma-2-27b.")
    return names


def _expiry(text: str) -> datetime:
    seconds = terminal.age_seconds(text)
    if not seconds:
        raise InputError(f"--expires {echoed(text)} is not a time span. Give e.g. 12h or 90d.")
    return expiry(seconds)


def _object(key: StoredKey, used: datetime | None) -> dict[str, Any]:
    return {
        "client": key.client, "id": key.id, "created": key.created, "expires": key.expires,
        "expired": key.is_expired(), "last_used": used, "models": key.models,
        "limit": None if key.limit is None else str(key.limit),
    }  # fmt: skip


def _day(at: datetime | None) -> str:
    return "" if at is None else f"{at.astimezone(timezone.utc):%Y-%m-%d}"


def _ago(at: datetime | None) -> str:
    return "" if at is None else f"{terminal.ago(at)} ago"
