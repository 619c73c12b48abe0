"""Parses chat completion requests in OpenAI's format.

Parameters that would change the answer and are not supported are rejected by name. Sampling parameters are
ignored, since the Models Backend takes a prompt and a length. docs/openai.md lists both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from router.answering import MAX_DEADLINE_SECONDS, MAX_TOKENS, MIN_DEADLINE_SECONDS
from router.queue import Conversation, MessageError, read_conversation
from router.server.responses import ApiError
from router.task import AnswerRank

AUTO = "auto"
MAX_STOPS = 4
MAX_SHOWN = 100  # characters of an unknown name in an error

# Values that mean the default, and are accepted; null always does.
DEFAULTS: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "prediction": (),
    "web_search_options": (),
    "store": (False,),
}
IGNORED = frozenset(
    {
        *("temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty"),
        *("repetition_penalty", "user", "metadata", "service_tier", "reasoning_effort", "verbosity"),
        *("safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    }
)


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

    conversation: Conversation
    requested_model: str
    model: str | None
    category: str | None
    max_tokens: int | None
    deadline_seconds: float | None
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool


Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Stops = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    Field(max_length=MAX_STOPS),
]


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class _RouterOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    category: str | None = None
    deadline_seconds: float | None = Field(
        default=None, ge=MIN_DEADLINE_SECONDS, le=MAX_DEADLINE_SECONDS, allow_inf_nan=False
    )


class _Body(BaseModel):
    """The parameters that are used."""

    model_config = ConfigDict(strict=True)

    model: str = Field(min_length=1)
    messages: Any = None
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    stop: Stops | None = None
    router: _RouterOptions | None = None


def parse_chat(document: Any, catalog: Catalog) -> ChatRequest:
    """Validates a request. Raises ApiError, which names the parameter."""
    if not isinstance(document, dict):
        raise ApiError(400, "The body must be a JSON object with model and messages.")
    _reject_unsupported(document)
    try:
        body = _Body.model_validate(document)
    except ValidationError as error:
        raise _invalid(error) from error
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options is only allowed when stream is true.", param="stream_options")
    options = body.router or _RouterOptions()
    if options.category is not None and options.category not in catalog.categories:
        known = ", ".join(catalog.categories)
        raise ApiError(400, f"router.category must be one of: {known}.", param="router.category")
    model, category = _route(body.model, catalog)
    return ChatRequest(
        conversation=_conversation(body.messages),
        requested_model=body.model,
        model=model,
        category=category or options.category,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        deadline_seconds=options.deadline_seconds,
        stops=tuple(body.stop or ()),
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
    )


def _reject_unsupported(document: dict[str, Any]) -> None:
    for name, value in document.items():
        if value is None or name in _Body.model_fields or name in IGNORED:
            continue
        if name not in DEFAULTS:
            shown = name[:MAX_SHOWN]
            raise ApiError(400, f"Unrecognized request argument supplied: {shown}", param=shown)
        if value not in DEFAULTS[name]:
            raise ApiError(
                400,
                f"{name} does not support this value: the router sends one prompt and returns one text.",
                param=name,
                code="unsupported_parameter",
            )


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


def _conversation(messages: Any) -> Conversation:
    try:
        return read_conversation(messages)
    except MessageError as error:
        raise ApiError(400, f"{error}.", param=error.param) from error
