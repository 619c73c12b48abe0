"""The verbs `router serve` and `router keys`: the OpenAI protocol over HTTP, and who may speak it."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from router.cli import terminal
from router.errors import ConfigError
from router.server import ENVIRONMENT_CLIENT, ApiKeys, Limits, add_key, read_keys, remove_key

DEFAULT_KEYS = Path("~/.config/llm-router/api_keys")
MEBIBYTE = 1024 * 1024

SERVE_HELP = """
Answer programs that speak OpenAI's protocol: /v1/chat/completions and /v1/models.

The model "auto" routes the prompt, "auto:CATEGORY" too but in that category; a model's name goes to it. Needs
ROUTER_DATABASE_URL, ROUTER_REDIS_URL and MODELS_BACKEND_URL, and an API key for each client (`router keys`);
ROUTER_API_KEY can hold one more, in clear. SIGTERM lets requests under way end, within the grace.

\b
Examples:
  router keys add alice && router serve
  router serve --no-keys --port 8201          programs of this machine only
  ROUTER_API_KEY=... router serve --host 0.0.0.0
"""
KEYS_HELP = """
API keys of `router serve`, by client. A change is in force within a second.

\b
Examples:
  router keys add alice
  router keys list
  router keys remove alice
"""

KeysFile = Annotated[
    Path,
    typer.Option(
        "--keys", metavar="FILE", envvar="ROUTER_API_KEYS", help="The file of the clients' hashed keys."
    ),
]
Client = Annotated[str, typer.Argument(metavar="CLIENT", help="Whose key it is.")]

keys = terminal.verbs()


@keys.command("add")
def add(client: Client, *, file: KeysFile = DEFAULT_KEYS, as_json: terminal.Json = False) -> None:
    """Make a key for a client, and print it: only its hash is kept."""
    key = add_key(file.expanduser(), client)
    if as_json:
        terminal.print_json({"client": client, "key": key})
    else:
        typer.echo(key)
        terminal.note(f"This is the key of {client}. It is not kept, and cannot be shown again.")


@keys.command("list")
def list_clients(*, file: KeysFile = DEFAULT_KEYS, as_json: terminal.Json = False) -> None:
    """The clients that have a key."""
    clients = sorted(read_keys(file.expanduser()))
    if as_json:
        terminal.print_json(clients)
    else:
        typer.echo("\n".join(clients) or "no client has a key; make one: router keys add NAME")


@keys.command("remove")
def remove(client: Client, *, file: KeysFile = DEFAULT_KEYS) -> None:
    """Take a client's key away."""
    remove_key(file.expanduser(), client)
    typer.echo(f"{client} is not let in any more")


def serve(
    *,
    host: Annotated[
        str, typer.Option(envvar="ROUTER_SERVE_HOST", help="The address to listen on.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(envvar="ROUTER_SERVE_PORT", min=0, max=65535, help="The port; 0 takes a free one.")
    ] = 8200,
    file: KeysFile = DEFAULT_KEYS,
    no_keys: Annotated[
        bool, typer.Option("--no-keys", help="Ask nobody for a key, and serve this machine only.")
    ] = False,
    at_once: Annotated[
        int,
        typer.Option(
            envvar="ROUTER_SERVE_AT_ONCE", min=1, max=10_000, help="Requests at once; more get a 503."
        ),
    ] = 64,
    max_body: Annotated[
        int,
        typer.Option(
            envvar="ROUTER_SERVE_MAX_BODY", metavar="MIB", min=1, max=64, help="The largest request, in MiB."
        ),
    ] = 4,
    grace: Annotated[
        float,
        typer.Option(
            envvar="ROUTER_SERVE_GRACE",
            metavar="SECONDS",
            min=0,
            max=3600,
            help="How long requests may go on after SIGTERM.",
        ),
    ] = 30.0,
    keep_alive: Annotated[
        float,
        typer.Option(
            envvar="ROUTER_SERVE_KEEP_ALIVE",
            metavar="SECONDS",
            min=0.1,
            max=300,
            help="How often a stream that waits for its answer shows a sign of life.",
        ),
    ] = 10.0,
    config: terminal.Config = terminal.DEFAULT_CONFIG,
) -> None:
    from router.server import ServeOptions, run_server  # noqa: PLC0415 - only this verb needs half a second

    keys_in_force = None if no_keys else _someone_has_one(file.expanduser())
    if no_keys:
        _check_private(host)
    options = ServeOptions(
        host=host,
        port=port,
        keys=keys_in_force,
        limits=Limits(max_body * MEBIBYTE, at_once, keep_alive),
        grace_seconds=grace,
        config=config,
    )
    who = "this machine only, no keys" if keys_in_force is None else f"{keys_in_force.count} with a key"

    def listening(url: str) -> None:
        terminal.err().print(f"router serve: {url} ({who})", markup=False, soft_wrap=True)

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(run_server(options, listening))


def _check_private(host: str) -> None:
    if host == "localhost":
        return
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return
    raise ConfigError(
        f"--no-keys serves this machine only, and {host} is open to others. Leave one of them out."
    )


def _someone_has_one(file: Path) -> ApiKeys:
    found = ApiKeys(file, os.environ.get(ENVIRONMENT_CLIENT))
    if found.count == 0:
        raise ConfigError(
            f"No client has an API key in {file}. Make one: router keys add NAME."
            " To serve this machine only, without keys: router serve --no-keys."
        )
    return found
