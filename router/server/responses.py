"""Responses in OpenAI's format: completions, streams, models and errors.

Each completion has one more field, `router`: how the prompt was routed and who answered.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from router.answering import Answer
from router.errors import printable

CHUNK_CHARACTERS = 200
OWNER = "llm-router"
SERVER_ERRORS = 500
MAX_MESSAGE = 1000  # characters of an error's message
KEEP_ALIVE = b": waiting\n\n"
STREAM_END = b"data: [DONE]\n\n"
ROUTING = (
    *("category", "confidence", "reason", "preferred", "fallback", "provisional", "rank", "sources"),
    *("task_id", "seconds", "cost_usd"),
)
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """Error that the client receives, with its HTTP status."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        retry_after_seconds: float | None = None, routing: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """`routing` is how a prompt was routed that no model answered."""
        super().__init__(printable(message, MAX_MESSAGE))
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_seconds = retry_after_seconds
        self.routing = routing

    @property
    def document(self) -> dict[str, Any]:
        default = "invalid_request_error" if self.status < SERVER_ERRORS else "server_error"
        kind = ERROR_TYPES.get(self.status, default)
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error, **({"router": self.routing} if self.routing else {})}

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After in seconds, and in milliseconds, which OpenAI's clients prefer."""
        if self.status == 401:  # noqa: PLR2004 - HTTP
            return {"www-authenticate": "Bearer"}
        if self.retry_after_seconds is None:
            return {}
        seconds = max(0.0, self.retry_after_seconds)
        return {"retry-after": str(math.ceil(seconds)), "retry-after-ms": str(math.ceil(seconds * 1000))}


class ApiResponse(JSONResponse):
    """JSON whose texts may hold half a surrogate pair: it is sent as a question mark."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=False, default=str).encode("utf-8", "replace")


class EventStream(StreamingResponse):
    """Server-sent events."""

    media_type = "text/event-stream"

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        await self.stream_response(send)  # the endpoint itself watches for a disconnect


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer to one chat request, with the request's id and time (Unix seconds).

    `max_tokens` is the longest answer that was possible: one of that many tokens was cut off.
    """

    answer: Answer
    completion_id: str
    created: int
    max_tokens: int | None = None
    stops: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        """Name of the model that answered."""
        assert self.answer.model is not None
        return self.answer.model

    @property
    def text(self) -> str:
        """The answer up to the first stop text."""
        positions = [at for stop in self.stops if (at := self.answer.text.find(stop)) >= 0]
        return self.answer.text[: min(positions)] if positions else self.answer.text

    @property
    def finish_reason(self) -> str:
        if self.answer.finish_reason and self.text == self.answer.text:
            return self.answer.finish_reason
        used = self.answer.completion_tokens
        cut = self.max_tokens is not None and used is not None and used >= self.max_tokens
        return "length" if cut and self.text == self.answer.text else "stop"

    def completion(self) -> dict[str, Any]:
        """Returns the whole completion."""
        message: dict[str, Any] = {
            "role": "assistant",
            "content": self.text if self.text or not self.answer.tool_calls else None,
            "refusal": self.answer.refusal,
            **({"tool_calls": [*self.answer.tool_calls]} if self.answer.tool_calls else {}),
        }
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self.finish_reason}
        head = _head("chat.completion", self.completion_id, self.created, self.model)
        return {**head, "choices": [choice], "usage": self.usage(), "router": routing_of(self.answer)}

    def events(self, *, include_usage: bool) -> Iterator[bytes]:
        """Yields the stream after its first event, which `role_event` returns."""
        head = _head("chat.completion.chunk", self.completion_id, self.created, self.model)
        usage = {"usage": None} if include_usage else {}
        for start in range(0, len(self.text), CHUNK_CHARACTERS):
            delta = {"content": self.text[start : start + CHUNK_CHARACTERS]}
            yield event({**head, "choices": [_delta(delta)], **usage})
        for number, call in enumerate(self.answer.tool_calls):
            yield event({**head, "choices": [_delta({"tool_calls": [{"index": number, **call}]})], **usage})
        choices = [_delta({}, self.finish_reason)]
        yield event({**head, "choices": choices, **usage, "router": routing_of(self.answer)})
        if include_usage:
            yield event({**head, "choices": [], "usage": self.usage()})
        yield STREAM_END

    def usage(self) -> dict[str, Any]:
        prompt, completion = self.answer.prompt_tokens or 0, self.answer.completion_tokens or 0
        cached = self.answer.cached_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            **({} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}),
        }

    def headers(self) -> dict[str, str]:
        """Returns the routing as headers. Characters outside Latin-1 become question marks."""
        answer = self.answer
        found = {
            "x-router-category": answer.category,
            "x-router-model": self.model,
            "x-router-provisional": str(answer.provisional).lower(),
        }
        if answer.task_id is not None:
            found["x-router-task"] = str(answer.task_id)
        return {name: value.encode("latin-1", "replace").decode("latin-1") for name, value in found.items()}


def routing_of(answer: Answer) -> dict[str, Any]:
    """Returns how the prompt was routed."""
    return {name: getattr(answer, name) for name in ROUTING} | {"sources": [*answer.sources]}


def role_event(completion_id: str, created: int, model: str, *, include_usage: bool) -> bytes:
    """Returns the first event of a stream; before there is an answer, `model` is the requested one."""
    head = _head("chat.completion.chunk", completion_id, created, model)
    choice = _delta({"role": "assistant", "content": "", "refusal": None})
    return event({**head, "choices": [choice], **({"usage": None} if include_usage else {})})


def _head(kind: str, completion_id: str, created: int, model: str) -> dict[str, Any]:
    return {"id": completion_id, "object": kind, "created": created, "model": model}


def _delta(delta: Mapping[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def event(document: Mapping[str, Any]) -> bytes:
    """Returns one server-sent event."""
    text = json.dumps(document, ensure_ascii=False, default=str)
    return b"data: " + text.encode("utf-8", "replace") + b"\n\n"


def model_object(name: str) -> dict[str, Any]:
    """Returns one model of `/v1/models`; its creation time is unknown."""
    return {"id": name, "object": "model", "created": 0, "owned_by": OWNER}
