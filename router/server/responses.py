"""What goes back to a program that speaks OpenAI's protocol: completions, streams, models, errors. No I/O.

Beyond OpenAI's fields each completion has `router`: how the prompt was routed and who answered.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from router.answering import Answer

PASSAGES_MODEL = "passages"  # stands for `model` where no model answered
PIECE_CHARACTERS = 200
OWNER = "llm-router"
SERVER_ERRORS = 500
KEEP_ALIVE = b": waiting\n\n"
STREAM_END = b"data: [DONE]\n\n"
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What goes back instead of an answer, with its HTTP status."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_seconds = retry_after_seconds

    @property
    def document(self) -> dict[str, Any]:
        usual = "invalid_request_error" if self.status < SERVER_ERRORS else "server_error"
        kind = _KINDS.get(self.status, usual)
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Retry-After in whole seconds, and in milliseconds, which OpenAI's clients read first."""
        if self.status == 401:  # noqa: PLR2004 - HTTP
            return {"www-authenticate": "Bearer"}
        if self.retry_after_seconds is None:
            return {}
        seconds = max(0.0, self.retry_after_seconds)
        return {"retry-after": str(math.ceil(seconds)), "retry-after-ms": str(math.ceil(seconds * 1000))}


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer on its way back, under the id and the moment (Unix seconds) of its request.

    `longest` is how many tokens it could have: one that has so many was cut off.
    """

    answer: Answer
    completion_id: str
    created: int
    longest: int | None = None
    stops: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        """Who answered."""
        return self.answer.model or PASSAGES_MODEL

    @property
    def text(self) -> str:
        """The answer up to the first of the texts that were to stop it."""
        places = [place for stop in self.stops if (place := self.answer.text.find(stop)) >= 0]
        return self.answer.text[: min(places)] if places else self.answer.text

    @property
    def finish_reason(self) -> str:
        used = self.answer.completion_tokens
        cut = self.longest is not None and used is not None and used >= self.longest
        return "length" if cut and self.text == self.answer.text else "stop"

    def completion(self) -> dict[str, Any]:
        """The whole completion."""
        message = {"role": "assistant", "content": self.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self.finish_reason}
        return {
            **self._head("chat.completion"),
            "choices": [choice],
            "usage": self.usage(),
            "router": self.routing(),
        }

    def events(self, *, include_usage: bool) -> Iterator[bytes]:
        """The stream from the first piece of text on; the role went before it."""
        rest: dict[str, Any] = {"usage": None} if include_usage else {}
        for start in range(0, len(self.text), PIECE_CHARACTERS):
            piece = {"content": self.text[start : start + PIECE_CHARACTERS]}
            yield event(self._chunk(piece, None, rest))
        yield event(self._chunk({}, self.finish_reason, {**rest, "router": self.routing()}))
        if include_usage:
            yield event({**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage()})
        yield STREAM_END

    def usage(self) -> dict[str, int]:
        prompt, completion = self.answer.prompt_tokens or 0, self.answer.completion_tokens or 0
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    def routing(self) -> dict[str, Any]:
        """How the prompt was routed."""
        answer = self.answer
        return {
            "category": answer.category,
            "confidence": answer.confidence,
            "reason": answer.reason,
            "preferred": answer.preferred,
            "fallback": answer.fallback,
            "provisional": answer.provisional,
            "rank": int(answer.rank),
            "sources": list(answer.sources),
            "task_id": answer.task_id,
            "seconds": answer.seconds,
            "cost_usd": answer.cost_usd,
        }

    def headers(self) -> dict[str, str]:
        """The routing in short, for programs that only see headers."""
        answer = self.answer
        found = {
            "x-router-category": answer.category,
            "x-router-model": self.model,
            "x-router-provisional": str(answer.provisional).lower(),
        }
        return found if answer.task_id is None else {**found, "x-router-task": str(answer.task_id)}

    def _chunk(self, delta: Mapping[str, str], reason: str | None, rest: Mapping[str, Any]) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **rest}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.completion_id, "object": kind, "created": self.created, "model": self.model}


def role_event(completion_id: str, created: int, model: str, *, include_usage: bool) -> bytes:
    """The first event of a stream, sent before it is known who will answer: `model` is the name asked for."""
    delta = {"role": "assistant", "content": "", "refusal": None}
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
    chunk = {"id": completion_id, "object": "chat.completion.chunk", "created": created, "model": model}
    usage: dict[str, Any] = {"usage": None} if include_usage else {}
    return event({**chunk, "choices": [choice], **usage})


def event(document: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    text = json.dumps(document, ensure_ascii=False, default=str)
    return b"data: " + text.encode("utf-8", "replace") + b"\n\n"


def model_object(name: str) -> dict[str, Any]:
    """One model as `/v1/models` shows it; when it was made is not known here."""
    return {"id": name, "object": "model", "created": 0, "owned_by": OWNER}
