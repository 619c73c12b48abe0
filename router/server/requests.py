"""Parses chat completion requests in OpenAI's format: the request, and what only this server reads of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from router.answering import MAX_DEADLINE_SECONDS, MAX_TOKENS, MIN_DEADLINE_SECONDS
from router.request import ModelRequest, RequestError, UnstorableRequestError, read_request
from router.server.responses import ApiError
from router.task import AnswerRank

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Catalog:
    """Models with their longest answers in tokens, and categories."""

    models: Mapping[str, int]
    categories: tuple[str, ...]
    fallback_tokens: int = MAX_TOKENS

    def names(self) -> list[str]:
        """Returns every value that the parameter `model` may have."""
        return [AUTO, *(f"{AUTO}:{category}" for category in self.categories), *self.models]

    def max_tokens(self, model: str | None, rank: AnswerRank, requested: int | None) -> int | None:
        """Returns the tokens that an answer of this model and rank could have; None without a model."""
        if model is None:
            return None
        limit = min(self.models.get(model, MAX_TOKENS), requested or MAX_TOKENS)
        return min(limit, self.fallback_tokens) if rank is AnswerRank.FALLBACK_MODEL else limit


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """Validated chat request. With `model` None the router chooses."""

    request: ModelRequest
    requested_model: str
    category: str | None
    deadline_seconds: float | None
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class _RouterOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    category: str | None = None
    deadline_seconds: float | None = Field(
        default=None, ge=MIN_DEADLINE_SECONDS, le=MAX_DEADLINE_SECONDS, allow_inf_nan=False
    )


class _Transport(BaseModel):
    """How the answer is sent, and what only this server knows."""

    model_config = ConfigDict(strict=True)

    model: str = Field(min_length=1)
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    router: _RouterOptions | None = None


def parse_chat(document: Any, catalog: Catalog) -> ChatRequest:
    """Validates a request. Raises ApiError, which names the parameter."""
    if not isinstance(document, dict):
        raise ApiError(400, "The body must be a JSON object with model and messages.")
    try:
        request = read_request({name: value for name, value in document.items() if name != "model"})
        transport = _Transport.model_validate(document)
    except RequestError as error:
        raise invalid_request(error) from error
    except ValidationError as error:
        raise _invalid(error) from error
    if request.messages is None:
        raise ApiError(400, "messages is missing; send a prompt as the content of a message.", param="prompt")
    if transport.stream_options is not None and not transport.stream:
        raise ApiError(400, "stream_options is only allowed when stream is true.", param="stream_options")
    options = transport.router or _RouterOptions()
    if options.category is not None and options.category not in catalog.categories:
        known = ", ".join(catalog.categories)
        raise ApiError(400, f"router.category must be one of: {known}.", param="router.category")
    model, category = _route(transport.model, catalog)
    stop = request.parameters.get("stop") or ()
    return ChatRequest(
        request=replace(request, model=model),
        requested_model=transport.model,
        category=category or options.category,
        deadline_seconds=options.deadline_seconds,
        stops=(stop,) if isinstance(stop, str) else tuple(stop),
        stream=bool(transport.stream),
        include_usage=bool(transport.stream_options and transport.stream_options.include_usage),
    )


def invalid_request(error: RequestError) -> ApiError:
    """Returns the error for an invalid or unsupported parameter."""
    code = "unsupported_parameter" if error.unsupported else None
    status = 422 if isinstance(error, UnstorableRequestError) else 400
    return ApiError(status, f"{error}.", param=error.param, code=code)


def _invalid(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = [str(part) for part in first["loc"]]
    if path[0] == "model":
        return ApiError(400, f"you must provide a model parameter: {AUTO!r} or a model's name", param="model")
    is_option = path[0] == "router" and first["type"] != "extra_forbidden"
    param = ".".join(path[:2]) if is_option else path[0]
    return ApiError(400, f"{param} is invalid: {first['msg']}.", param=param)


def _route(name: str, catalog: Catalog) -> tuple[str | None, str | None]:
    """Returns the model and the category that the parameter `model` names."""
    auto, colon, category = name.partition(":")
    if auto == AUTO and (not colon or category in catalog.categories):
        return None, category or None
    if name in catalog.models:
        return name, None
    raise ApiError(
        404,
        f"The model {name[:100]!r} does not exist, or your API key may not use it. GET /v1/models lists the"
        " available ones.",
        param="model",
        code="model_not_found",
    )
