"""Airflow plugin that adds the console: a page in the navigation, and its API under `/router`.

Every process of Airflow loads this file, so nothing is built or imported before the first request.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from airflow.configuration import conf
from airflow.plugins_manager import AirflowPlugin
from starlette.types import ASGIApp, Receive, Scope, Send

if TYPE_CHECKING:
    from console.app import Console

PREFIX = "/router"
# Airflow may be served below a path, e.g. `[api] base_url = https://host/airflow`.
BASE_PATH = urlsplit(conf.get("api", "base_url", fallback="")).path.rstrip("/")


class LazyConsole:
    """ASGI application that builds the console at the first request."""

    def __init__(self) -> None:
        self._lock: asyncio.Lock | None = None
        self._console: Console | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._console is None:
            self._lock = self._lock or asyncio.Lock()
            async with self._lock:
                if self._console is None:
                    # In a thread, because importing the router's libraries would block Airflow's event loop.
                    self._console = await asyncio.to_thread(_build)
        await self._console(scope, receive, send)

    async def close(self) -> None:
        """Closes the console if it was built."""
        if self._console is not None:
            await self._console.state.close()


def _build() -> Console:
    folder = str(Path(__file__).resolve().parent)
    if folder not in sys.path:  # Airflow adds its plugins folder, where this file may be a link
        sys.path.append(folder)
    from console.app import Console  # noqa: PLC0415 - only in the api-server

    return Console()


lazy_console = LazyConsole()


class CloseWithServer:
    """ASGI middleware that closes the console when the api-server ends."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        finally:
            if scope["type"] == "lifespan":
                await lazy_console.close()


class RouterConsole(AirflowPlugin):
    """The console's page and API."""

    name = "router_console"
    fastapi_apps = [  # noqa: RUF012 - Airflow's interface
        {"app": lazy_console, "url_prefix": PREFIX, "name": "Router"}
    ]
    fastapi_root_middlewares = [  # noqa: RUF012 - as above
        {"name": "router console", "middleware": CloseWithServer, "args": [], "kwargs": {}}
    ]
    external_views = [  # noqa: RUF012 - as above
        {
            "name": "Router",
            "href": f"{BASE_PATH}{PREFIX}/page",
            "destination": "nav",
            "category": "browse",
            "url_route": "router",
        }
    ]
