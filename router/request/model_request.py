"""One request to a model: messages and parameters as they were given, validated. No I/O."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from router.request.conversation import Conversation, conversation_of, schema_text
from router.request.errors import RequestError, UnstorableRequestError
from router.request.messages import check_messages, needs_of_messages
from router.request.parameters import Parameters

AUTO = "auto"  # the model of a request whose model the router chooses; `auto:CATEGORY` in that category
MAX_DEPTH = 64
MAX_SHOWN = 100  # characters of an unknown name in an error
MAX_TOKENS = 10_000_000
# How a request is transported, or who answers it: the entrance reads these itself.
TRANSPORT = frozenset({"stream", "stream_options", "router"})
# Parameters that cannot be kept, and the values of them that mean the default; null always does.
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prediction": (),
    "web_search_options": (),
    "store": (False,),
    "moderation": (),
}
# Values of parameters that mean the default: they need no capability.
_DEFAULTS: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "service_tier": ("auto", "default"),
    "metadata": ({},),
}


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """A bare prompt, or messages with parameters. `model` pins the model by its name, as it was given.

    `parameters` holds the values as they were given, by OpenAI's names. `max_tokens` bounds the answer.
    """

    conversation: Conversation
    messages: tuple[Mapping[str, Any], ...] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    max_tokens: int | None = None

    @classmethod
    def of_prompt(cls, prompt: str) -> ModelRequest:
        """Returns a request that is only a prompt."""
        return cls(Conversation(prompt, prompt))

    @property
    def pin(self) -> str | None:
        """Name of the model that must answer; None if the router chooses."""
        chosen_by_router = self.model is None or self.model.partition(":")[0] == AUTO
        return None if chosen_by_router else self.model

    def without(self, names: Collection[str]) -> ModelRequest:
        """Returns the request without these parameters."""
        if not names:
            return self
        return replace(self, parameters={k: v for k, v in self.parameters.items() if k not in names})

    def with_prompt(self, prompt: str) -> ModelRequest:
        """Returns the request with another prompt in place of prompt or messages."""
        return replace(self, conversation=Conversation(prompt, prompt), messages=None)

    def with_material(self, material: str) -> ModelRequest:
        """Returns the request with a first system message, which the model reads before all others."""
        assert self.messages is not None
        messages = ({"role": "system", "content": material}, *self.messages)
        return replace(self, conversation=conversation_of(messages), messages=messages)

    def needs(self) -> Iterator[tuple[str, str]]:
        """Yields each capability that the request needs, with the path of the value that needs it."""
        for name, value in self.parameters.items():
            if value not in _DEFAULTS.get(name, ()):
                yield _capability(name, value), name
        yield from needs_of_messages(self.messages or ())

    def stored(self) -> dict[str, Any] | None:
        """Returns the value of `tasks.request`; None for a bare prompt. `read_stored` reads it again."""
        if self._says_only_a_prompt and not self.parameters and self.pin is None:
            return None
        return {
            **({} if self.model is None else {"model": self.model}),
            **({} if self.messages is None else {"messages": list(self.messages)}),
            **({} if self.max_tokens is None else {"max_tokens": self.max_tokens}),
            **self.parameters,
        }

    @property
    def _says_only_a_prompt(self) -> bool:
        if self.messages is None:
            return True
        only = self.messages[0]
        return (
            len(self.messages) == 1
            and only.keys() == {"role", "content"}
            and isinstance(only["content"], str)
        )

    @property
    def further_bytes(self) -> int:
        """Bytes beyond the text that a model reads as well: tools, and the schema of the answer."""
        read = (self.parameters.get(name) for name in ("tools", "response_format"))
        return sum(len(schema_text(value).encode("utf-8", "replace")) for value in read if value)


def read_request(document: Any) -> ModelRequest:
    """Returns the request of an OpenAI-compatible body. Raises RequestError, which names the parameter.

    `prompt` may take the place of `messages`. Parameters of the transport (`stream`) are not read.
    """
    if not isinstance(document, dict):
        raise RequestError("the body must be a JSON object with messages")
    given = {name: value for name, value in document.items() if value is not None and name not in TRANSPORT}
    values = dict(given)
    model = given.pop("model", None)
    if model is not None and (not isinstance(model, str) or not model):
        raise RequestError("model must be the name of a model", "model")
    max_tokens = _max_tokens(given)
    messages, conversation = _conversation(given)
    _reject(given)
    try:
        Parameters.model_validate(given)
    except ValidationError as error:
        raise _invalid(error) from error
    _check_values(values)
    return ModelRequest(conversation, messages, given, model, max_tokens)


def read_stored(value: Any, prompt: str) -> ModelRequest:
    """Returns the request of a task by its columns `request` and `prompt`. Raises RequestError."""
    if not isinstance(value, dict) or value.get("messages") is not None:
        return read_request(value)
    return read_request({**value, "prompt": prompt})


def _conversation(given: dict[str, Any]) -> tuple[tuple[Mapping[str, Any], ...] | None, Conversation]:
    prompt = given.pop("prompt", None)
    if "messages" in given:
        if prompt is not None:
            raise RequestError("prompt and messages exclude each other", "prompt")
        messages = check_messages(given.pop("messages"))
        return messages, conversation_of(messages)
    if not isinstance(prompt, str):
        param = "messages" if prompt is None else "prompt"
        raise RequestError(f"{param} is missing or not {'a list' if prompt is None else 'text'}", param)
    return None, Conversation(prompt, prompt)


def _max_tokens(given: dict[str, Any]) -> int | None:
    limits = {name: given.pop(name) for name in ("max_tokens", "max_completion_tokens") if name in given}
    for name, value in limits.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_TOKENS:
            raise RequestError(f"{name} must be a whole number from 1 to {MAX_TOKENS}", name)
    return min(limits.values(), default=None)


def _reject(given: dict[str, Any]) -> None:
    for name in list(given):
        if name in Parameters.model_fields:
            continue
        if name not in REFUSED:
            shown = _shown(name)
            raise RequestError(f"Unrecognized request argument supplied: {shown}", shown)
        if given.pop(name) not in REFUSED[name]:
            raise RequestError(f"{name} does not support this value", name, unsupported=True)


def _invalid(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = [str(part) for part in first["loc"]]
    message = first["msg"].removeprefix("Value error, ")
    if not path:
        return RequestError(message, message.partition(" ")[0])
    return RequestError(f"{'.'.join(path)} is invalid: {message}", path[0])


def _capability(name: str, value: Any) -> str:
    """Returns the capability that a parameter needs with this value."""
    if name == "response_format":
        return "json_object" if value["type"] == "text" else str(value["type"])
    return "tools" if name in {"tool_choice", "parallel_tool_calls"} else name


def _check_values(given: Mapping[str, Any]) -> None:
    """Rejects what cannot be stored as JSON: NUL, half surrogate pairs, infinite numbers, deep nesting."""
    pending: list[tuple[Any, int, str]] = [(value, 1, name) for name, value in given.items()]
    pending += [(name, 1, name) for name in given]
    while pending:
        value, depth, name = pending.pop()
        shown = _shown(name)
        if depth > MAX_DEPTH:
            raise RequestError(f"{shown} is nested more than {MAX_DEPTH} levels deep", shown)
        if isinstance(value, dict):
            pending += [(each, depth + 1, name) for pair in value.items() for each in pair]
        elif isinstance(value, list):
            pending += [(each, depth + 1, name) for each in value]
        elif isinstance(value, str) and ("\0" in value or not _is_unicode(value)):
            raise UnstorableRequestError(f"{shown} contains a NUL character or half a surrogate pair", shown)
        elif isinstance(value, float) and not math.isfinite(value):
            raise UnstorableRequestError(f"{shown} contains a number that is not finite", shown)


def _shown(name: str) -> str:
    return name[:MAX_SHOWN].encode("ascii", "backslashreplace").decode()


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
