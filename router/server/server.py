"""The server as a process: the router behind the OpenAI protocol, from its start to its end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from router.server.chat import Answering, Chats, ReadCatalog
from router.server.middleware import AuthMiddleware, Limits
from router.server.requests import Catalog
from router.server.responses import ApiError, model_object

KEYS_SECONDS = 1.0
KEEPALIVE_SECONDS = 75
LAST_WORDS_SECONDS = 5  # after the grace, for clients to be told that the server stops


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Where to listen (port 0: a free one), whom to let in (keys None: this machine), how much, how long."""

    host: str
    port: int
    keys: ApiKeys | None
    limits: Limits
    grace_seconds: float
    config: Path


async def run_server(options: ServeOptions, listening: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; `listening` is told the URL. ConfigError says why it cannot begin."""
    with contextlib.closing(_listen(options.host, options.port)) as door:
        router = Router.from_config(options.config)
        duties = PeriodicJobs()
        api = OpenAIApp(router, lambda: _catalogue(router), options.keys, options.limits)
        server = _Server(api, options.grace_seconds)
        try:
            await router.open()
            if options.keys is not None:
                reload = options.keys.reload
                duties.start(lambda: asyncio.to_thread(reload), KEYS_SECONDS, "api keys")
            listening(_url(door))
            await server.serve([door])
        finally:
            await duties.stop()
            await router.close(grace_seconds=server.grace_left())


async def _catalogue(router: Router) -> Catalog:
    config = router.config
    longest = {model.model: model.max_tokens for model in await router.models()}
    return Catalog(longest, tuple(sorted(config.categories)), config.fallback.max_tokens)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"Cannot listen on {host}, port {port}: {why}. Give another --port.") from error


def _url(door: socket.socket) -> str:
    host, port = door.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


class _Server(uvicorn.Server):
    """Stops at a signal: no new requests, those under way may end within the grace."""

    def __init__(self, api: OpenAIApp, grace_seconds: float) -> None:
        self._api = api
        self._grace_seconds = grace_seconds
        self._stopped_at: float | None = None
        super().__init__(
            uvicorn.Config(
                api, http="h11",  # the other one takes in headers of any size
                lifespan="off", ws="none", access_log=False, log_config=None, log_level="warning",
                server_header=False, proxy_headers=False, timeout_keep_alive=KEEPALIVE_SECONDS,
                timeout_graceful_shutdown=int(grace_seconds) + LAST_WORDS_SECONDS,
            )
        )  # fmt: skip

    def grace_left(self) -> float:
        """Seconds of the grace that are left."""
        gone = 0.0 if self._stopped_at is None else time.monotonic() - self._stopped_at
        return max(0.0, self._grace_seconds - gone)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own would have the process die of the signal in the end.
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
            asyncio.get_running_loop().call_later(self._grace_seconds, self._api.give_up)
        super().handle_exit(sig, frame)


class OpenAIApp:
    """The server's ASGI application: the door, and behind it the paths."""

    def __init__(
        self,
        router: Answering,
        catalogue: ReadCatalog,
        keys: ApiKeys | None,
        limits: Limits | None = None,
    ) -> None:
        """`catalogue` is asked for each request, so that models come and go while the server runs."""
        self._catalogue = catalogue
        self._chats = Chats(router, catalogue, limits or Limits())
        paths = Routes(
            [
                Route("/v1/chat/completions", self._chats, methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
            ],
            redirect_slashes=False,
        )
        self._door = AuthMiddleware(paths, keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._door(scope, receive, send)

    def give_up(self) -> None:
        """Cancel what is still being asked; its clients are told to come again."""
        self._chats.give_up()

    async def _models(self, _request: Request) -> JSONResponse:
        names = (await self._catalogue()).names()
        return JSONResponse({"object": "list", "data": [model_object(name) for name in names]})

    async def _model(self, request: Request) -> JSONResponse:
        name: str = request.path_params["name"]
        if name not in (await self._catalogue()).names():
            message = f"The model {name[:100]!r} does not exist."
            raise ApiError(404, message, param="model", code="model_not_found")
        return JSONResponse(model_object(name))
