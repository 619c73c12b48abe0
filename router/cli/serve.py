"""`router serve`: the OpenAI-compatible API."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import re
from pathlib import Path
from typing import Annotated

import typer

from router.cli import terminal
from router.cli.keys import DEFAULT_KEYS, KeysFile
from router.errors import ConfigError, echoed
from router.server import ENVIRONMENT_CLIENT, ApiKeys, Limits

MEBIBYTE = 1024 * 1024
ANY_ORIGIN = "*"
ORIGIN_PATTERN = r"[a-z][a-z0-9+.-]*://[^\s/?#@A-Z]+"

SERVE_HELP = """
Serve an OpenAI-compatible API.

Endpoints are /v1/chat/completions and /v1/models. The model "auto" routes the prompt, "auto:CATEGORY" routes
it within a category, and any other name selects that model. Requires ROUTER_DATABASE_URL, ROUTER_REDIS_URL,
MODELS_BACKEND_URL, and an API key for each client (`router keys`); ROUTER_API_KEY may contain one more key in
plain text. On SIGTERM, requests in flight may finish within --grace.

\b
Examples:
  router keys add alice && router serve
  router serve --no-keys --port 8201          localhost only
  ROUTER_API_KEY=... router serve --host 0.0.0.0
"""


def serve(
    *,
    host: Annotated[
        str,
        typer.Option(envvar="ROUTER_SERVE_HOST", metavar="ADDRESS", help="Address to listen on."),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            envvar="ROUTER_SERVE_PORT", metavar="PORT", min=0, max=65535, help="Port; 0 selects a free one."
        ),
    ] = 8200,
    file: KeysFile = DEFAULT_KEYS,
    no_keys: Annotated[
        bool, typer.Option("--no-keys", help="Disable authentication; listens on localhost only.")
    ] = False,
    at_once: Annotated[
        int,
        typer.Option(
            envvar="ROUTER_SERVE_AT_ONCE",
            metavar="N",
            min=1,
            max=10_000,
            help="Maximum concurrent requests; further ones get a 503.",
        ),
    ] = 64,
    max_body: Annotated[
        int,
        typer.Option(
            envvar="ROUTER_SERVE_MAX_BODY",
            metavar="MIB",
            min=1,
            max=64,
            help="Maximum size of a request, in MiB.",
        ),
    ] = 4,
    grace: Annotated[
        float,
        typer.Option(
            envvar="ROUTER_SERVE_GRACE",
            metavar="SECONDS",
            min=0,
            max=3600,
            help="Time for requests in flight after SIGTERM.",
        ),
    ] = 30.0,
    keep_alive: Annotated[
        float,
        typer.Option(
            envvar="ROUTER_SERVE_KEEP_ALIVE",
            metavar="SECONDS",
            min=0.1,
            max=300,
            help="Interval of keep-alive comments in a stream that waits for its answer.",
        ),
    ] = 10.0,
    origins: Annotated[
        list[str] | None,
        typer.Option(
            "--cors-origin",
            envvar="ROUTER_SERVE_CORS_ORIGINS",
            metavar="ORIGIN",
            help="Origin of web pages that may use the API, as https://chat.example.org; repeatable."
            " * allows any. Default: none.",
        ),
    ] = None,
    config: terminal.Config = terminal.DEFAULT_CONFIG,
) -> None:
    from router.server import ServeOptions, run_server  # noqa: PLC0415 - takes half a second

    api_keys = None if no_keys else _require_keys(file.expanduser())
    if no_keys:
        _require_loopback(host)
    options = ServeOptions(
        host=host,
        port=port,
        keys=api_keys,
        limits=Limits(max_body * MEBIBYTE, at_once, keep_alive),
        grace_seconds=grace,
        config=config,
        origins=_checked_origins(origins or [], has_keys=api_keys is not None),
    )
    access = "localhost only, no authentication" if api_keys is None else f"API keys: {api_keys.count}"

    def listening(url: str) -> None:
        terminal.err().print(f"router serve: {url} ({access})", soft_wrap=True)

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(run_server(options, listening))


def _require_loopback(host: str) -> None:
    if host == "localhost":
        return
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return
    raise ConfigError(f"--no-keys requires a loopback address, not {host}. Omit --no-keys or --host.")


def _checked_origins(origins: list[str], *, has_keys: bool) -> tuple[str, ...]:
    for origin in origins:
        if origin == ANY_ORIGIN and not has_keys:
            raise ConfigError(
                "--cors-origin * lets any web page use this server. Omit --no-keys, or name origins."
            )
        if origin != ANY_ORIGIN and re.fullmatch(ORIGIN_PATTERN, origin) is None:
            raise ConfigError(
                f"--cors-origin {echoed(origin)} is not an origin. Use scheme and host as browsers do:"
                " https://chat.example.org or http://localhost:3000, in lower case, without a path."
            )
    return tuple(origins)


def _require_keys(file: Path) -> ApiKeys:
    found = ApiKeys(file, os.environ.get(ENVIRONMENT_CLIENT))
    if found.count == 0:
        raise ConfigError(
            f"No client has an API key in {file}. Create one: router keys add NAME."
            " To serve localhost without authentication: router serve --no-keys."
        )
    return found
