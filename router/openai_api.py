"""The router for any program that speaks OpenAI's protocol: chat completions and models, over HTTP."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from router.api_keys import ApiKeys
from router.openai_chat import Answering, Chats, ReadCatalogue
from router.openai_door import Door, Limits
from router.openai_reply import ApiError, model_object


class OpenAiApi:
    """The server's ASGI application: the door, and behind it the paths."""

    def __init__(
        self,
        router: Answering,
        catalogue: ReadCatalogue,
        keys: ApiKeys | None,
        limits: Limits | None = None,
    ) -> None:
        """`catalogue` is asked for each request, so that models come and go while the server runs."""
        self._catalogue = catalogue
        self._chats = Chats(router, catalogue, limits or Limits())
        paths = Router(
            [
                Route("/v1/chat/completions", self._chats, methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
            ],
            redirect_slashes=False,
        )
        self._door = Door(paths, keys)

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
