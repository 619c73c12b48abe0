"""Runs the HTTP server: the router behind OpenAI's protocol, from start to shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.routing import Router as Routes
from starlette.types import Receive, Scope, Send

from router.answering import Router
from router.background import PeriodicJobs
from router.errors import ConfigError
from router.server.api_keys import ApiKeys
from router.server.chat import ChatCompletions, read_catalog
from router.server.connections import (
    ACCEPTED,
    BACKLOG,
    BoundedProtocol,
    Connections,
    max_connections,
    raise_open_files,
)
from router.server.key_limits import KeyLimits
from router.server.middleware import Limits, protected
from router.server.responses import ApiError, model_object

KEYS_SECONDS = 1.0
LAST_USED_SECONDS = 60.0
KEEPALIVE_SECONDS = 75
ERROR_SECONDS = 5  # after the grace, for clients to receive that the server is stopping


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Address (port 0: any free one), keys (None: local programs only), limits and grace at shutdown.

    `origins` are those of web pages that may use the API.
    """

    host: str
    port: int
    keys: ApiKeys | None
    limits: Limits
    grace_seconds: float
    config: Path
    origins: tuple[str, ...] = ()


async def run_server(options: ServeOptions, listening: Callable[[str], None]) -> None:
    """Serves until SIGINT or SIGTERM; calls `listening` with the URL. Raises ConfigError."""
    with contextlib.closing(_listen(options.host, options.port)) as listener:
        router = Router.from_config(options.config)
        jobs = PeriodicJobs()
        app = OpenAIApp(router, options.keys, options.limits, options.origins)
        connections = max_connections(raise_open_files(), options.limits.max_concurrency)
        server = _Server(app, options.grace_seconds, Connections(connections))
        try:
            await router.open()
            if options.keys is not None:
                jobs.start(KeyLimits(router, options.keys).follow, KEYS_SECONDS, "api keys")
                store = options.keys.store_last_used
                jobs.start(lambda: asyncio.to_thread(store), LAST_USED_SECONDS, "last use of api keys")
            listening(_url(listener))
            await server.serve([listener])
        finally:
            await jobs.stop()
            if options.keys is not None:
                with contextlib.suppress(ConfigError):
                    await asyncio.to_thread(options.keys.store_last_used)
            await router.close(grace_seconds=server.grace_left())


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"Cannot listen on {host}, port {port}: {why}. Use another --port.") from error


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


class _Server(uvicorn.Server):
    """Stops at a signal: no new requests; those in progress may end within the grace."""

    def __init__(self, app: OpenAIApp, grace_seconds: float, connections: Connections) -> None:
        self._app = app
        self._grace_seconds = grace_seconds
        self._stopped_at: float | None = None
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(BoundedProtocol, bounds=connections),  # type: ignore[arg-type]
                backlog=ACCEPTED,
                lifespan="off", ws="none", access_log=False, log_config=None, log_level="warning",
                server_header=False, proxy_headers=False, timeout_keep_alive=KEEPALIVE_SECONDS,
                timeout_graceful_shutdown=int(grace_seconds) + ERROR_SECONDS,
            )
        )  # fmt: skip

    def grace_left(self) -> float:
        """Returns the seconds of the grace that are left."""
        passed = 0.0 if self._stopped_at is None else time.monotonic() - self._stopped_at
        return max(0.0, self._grace_seconds - passed)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)  # asyncio accepts as many at a time as may wait, unless told otherwise

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own version raises the signal again at the end, which kills the process.
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._stopped_at is None:
            self._stopped_at = time.monotonic()
            asyncio.get_running_loop().call_later(self._grace_seconds, self._app.cancel)
        super().handle_exit(sig, frame)


class OpenAIApp:
    """ASGI application of the server."""

    def __init__(
        self, router: Router, keys: ApiKeys | None, limits: Limits, origins: Sequence[str] = ()
    ) -> None:
        self._router = router
        self._chat = ChatCompletions(router, limits, lambda: keys is not None and keys.count > 1)
        routes = Routes(
            [
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
            ],
            redirect_slashes=False,
        )
        self._app = protected(routes, keys, origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    def cancel(self) -> None:
        """Cancels all requests in progress; their clients are asked to retry."""
        self._chat.cancel()

    async def _models(self, request: Request) -> JSONResponse:
        names = (await read_catalog(self._router, request.user.models)).names()
        return JSONResponse({"object": "list", "data": [model_object(name) for name in names]})

    async def _model(self, request: Request) -> JSONResponse:
        name: str = request.path_params["name"]
        if name not in (await read_catalog(self._router, request.user.models)).names():
            message = f"The model {name[:100]!r} does not exist, or your API key may not use it."
            raise ApiError(404, message, param="model", code="model_not_found")
        return JSONResponse(model_object(name))
