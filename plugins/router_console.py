"""Hangs the console into Airflow: a page in its navigation, and the API under it at `/router`.

Nothing is built or imported before the first request: this file is read in every process of Airflow.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from airflow.plugins_manager import AirflowPlugin
from starlette.types import ASGIApp, Receive, Scope, Send

if TYPE_CHECKING:
    from console.app import Console

PREFIX = "/router"


class LazyConsole:
    """ASGI application that becomes the console at its first request."""

    def __init__(self) -> None:
        self._lock: asyncio.Lock | None = None
        self._console: Console | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._console is None:
            self._lock = self._lock or asyncio.Lock()
            async with self._lock:
                if self._console is None:
                    # In a thread: it brings the router's libraries, and Airflow goes on serving meanwhile.
                    self._console = await asyncio.to_thread(_build)
        await self._console(scope, receive, send)

    async def close(self) -> None:
        """End what the console has begun, if anybody has ever looked at it."""
        if self._console is not None:
            await self._console.state.close()


def _build() -> Console:
    folder = str(Path(__file__).resolve().parent)
    if folder not in sys.path:  # Airflow puts its own there, in which this file may be a link
        sys.path.append(folder)
    from console.app import Console  # noqa: PLC0415 - not in processes that only read plugins

    return Console()


lazy_console = LazyConsole()


class CloseWithServer:
    """ASGI middleware that does nothing but close the console when the api-server ends."""

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
    fastapi_apps = [  # noqa: RUF012 - Airflow's own way to name them
        {"app": lazy_console, "url_prefix": PREFIX, "name": "Router"}
    ]
    fastapi_root_middlewares = [  # noqa: RUF012 - the same
        {"name": "router console", "middleware": CloseWithServer, "args": [], "kwargs": {}}
    ]
    external_views = [  # noqa: RUF012 - the same
        {
            "name": "Router",
            "href": f"{PREFIX}/page",
            "destination": "nav",
            "category": "browse",
            "url_route": "router",
        }
    ]
