"""What a request for a chat completion asks, in OpenAI's shape. No I/O.

A request is read strictly: what would change the answer and cannot be done here is refused by its name; what
only tunes the sampling is ignored, since the Models Backend takes a prompt and a length; both are listed in
docs/openai.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from router.errors import InputError
from router.queue import prompt_of
from router.server.responses import ApiError
from router.task import AnswerRank

AUTO = "auto"
LARGEST_MAX_TOKENS = 1_000_000
LONGEST_DEADLINE_SECONDS = 3600.0
MOST_STOPS = 4

# Only these values mean "as usual", and are taken; None always does.
USUAL: Mapping[str, tuple[Any, ...]] = {
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
READ = frozenset(
    {"model", "messages", "max_tokens", "max_completion_tokens", "stream", "stream_options", "stop", "router"}
)


@dataclass(frozen=True, slots=True)
class Catalog:
    """What can be asked: models, with their longest answers in tokens, and categories."""

    models: Mapping[str, int]
    categories: tuple[str, ...]
    fallback_tokens: int = LARGEST_MAX_TOKENS

    def names(self) -> list[str]:
        return [AUTO, *(f"{AUTO}:{category}" for category in self.categories), *self.models]

    def longest(self, model: str | None, rank: AnswerRank, asked: int | None) -> int | None:
        """The tokens that an answer of this model and rank could have; None if no model gave it."""
        if model is None:
            return None
        most = min(self.models.get(model, LARGEST_MAX_TOKENS), asked or LARGEST_MAX_TOKENS)
        return min(most, self.fallback_tokens) if rank is AnswerRank.FALLBACK_MODEL else most


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One request for a chat completion, read and checked. `model` None lets the router choose."""

    prompt: str
    asked_model: str
    model: str | None
    category: str | None
    max_tokens: int | None
    deadline_seconds: float | None
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool


def read_chat(document: Any, catalogue: Catalog) -> ChatRequest:
    """What the request asks; ApiError names the parameter that cannot be done."""
    if not isinstance(document, dict):
        raise ApiError(400, "The body must be a JSON object with model and messages.")
    _refuse_what_cannot_be_done(document)
    asked_model, model, category = _model(document, catalogue)
    wishes = _wishes(document, catalogue)
    stream = _flag(document, "stream")
    return ChatRequest(
        prompt=_prompt(document),
        asked_model=asked_model,
        model=model,
        category=category or wishes.get("category"),
        max_tokens=_max_tokens(document),
        deadline_seconds=wishes.get("deadline_seconds"),
        stops=_stops(document),
        stream=stream,
        include_usage=_include_usage(document, stream=stream),
    )


def _refuse_what_cannot_be_done(document: dict[str, Any]) -> None:
    for name, value in document.items():
        if value is None or name in READ or name in IGNORED:
            continue
        if name not in USUAL:
            raise ApiError(400, f"Unrecognized request argument supplied: {name}", param=name)
        if value not in USUAL[name]:
            raise ApiError(
                400,
                f"{name} is not supported with this value: the router sends one prompt and returns one text.",
                param=name,
                code="unsupported_parameter",
            )


def _model(document: dict[str, Any], catalogue: Catalog) -> tuple[str, str | None, str | None]:
    name = document.get("model")
    if not isinstance(name, str) or not name:
        raise ApiError(400, f"you must provide a model parameter: {AUTO!r} or a model's name", param="model")
    auto, colon, category = name.partition(":")
    if auto == AUTO and (not colon or category in catalogue.categories):
        return name, None, category or None
    if name in catalogue.models:
        return name, name, None
    raise ApiError(
        404,
        f"The model {name[:100]!r} does not exist. GET /v1/models names those that do.",
        param="model",
        code="model_not_found",
    )


def _wishes(document: dict[str, Any], catalogue: Catalog) -> dict[str, Any]:
    """`router`, our own parameter: {"category": ..., "deadline_seconds": ...}."""
    wishes = document.get("router")
    if wishes is None:
        return {}
    if not isinstance(wishes, dict) or set(wishes) - {"category", "deadline_seconds"}:
        raise ApiError(400, "router must be an object of category and deadline_seconds.", param="router")
    category, deadline = wishes.get("category"), wishes.get("deadline_seconds")
    if category is not None and category not in catalogue.categories:
        known = ", ".join(catalogue.categories)
        raise ApiError(400, f"There is no such category; known are {known}.", param="router.category")
    if deadline is not None and not (_is_number(deadline) and 0 <= deadline <= LONGEST_DEADLINE_SECONDS):
        most = f"{LONGEST_DEADLINE_SECONDS:g}"
        raise ApiError(
            400, f"deadline_seconds must be a number from 0 to {most}.", param="router.deadline_seconds"
        )
    return {"category": category, "deadline_seconds": deadline}


def _prompt(document: dict[str, Any]) -> str:
    try:
        return prompt_of(document.get("messages"))
    except InputError as error:
        raise ApiError(400, f"{error}.", param="messages") from error


def _max_tokens(document: dict[str, Any]) -> int | None:
    found = None
    for name in ("max_tokens", "max_completion_tokens"):
        value = document.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_MAX_TOKENS:
            raise ApiError(400, f"{name} must be a whole number from 1 to {LARGEST_MAX_TOKENS}.", param=name)
        found = value
    return found


def _stops(document: dict[str, Any]) -> tuple[str, ...]:
    stop = document.get("stop")
    stops = [stop] if isinstance(stop, str) else stop or []
    if (
        not isinstance(stops, list)
        or len(stops) > MOST_STOPS
        or not all(isinstance(one, str) and one for one in stops)
    ):
        raise ApiError(400, f"stop must be a text, or a list of at most {MOST_STOPS} texts.", param="stop")
    return tuple(stops)


def _include_usage(document: dict[str, Any], *, stream: bool) -> bool:
    options = document.get("stream_options")
    if options is None:
        return False
    if not stream:
        raise ApiError(400, "stream_options is only allowed when stream is true.", param="stream_options")
    if not isinstance(options, dict):
        raise ApiError(400, "stream_options must be an object.", param="stream_options")
    return _flag(options, "include_usage")


def _flag(document: dict[str, Any], name: str) -> bool:
    value = document.get(name)
    if value is not None and not isinstance(value, bool):
        raise ApiError(400, f"{name} must be true or false.", param=name)
    return bool(value)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False
