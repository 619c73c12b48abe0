"""Handles one call: reads it, checks quota and faults, and answers after the model's latency."""

from __future__ import annotations

import asyncio
import enum
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from models_backend.answers import compose_answer, guess_category, token_count
from models_backend.completion import ProviderRefusal
from models_backend.conditions import Condition, Conditions
from models_backend.faults import FaultOrder, Faults
from models_backend.flaws import FlawBook, KnownAnswer
from models_backend.latency import latency_seconds
from models_backend.provider import Provider
from models_backend.quota import Quotas
from models_backend.schemas import UnsupportedSchemaError
from models_backend.settings import ServedModel, StandInSettings
from models_backend.shaping import Shaped, shaped
from router.request import RequestError, check_messages, conversation_of

DEFAULT_MAX_TOKENS = 512
LARGEST_MAX_TOKENS = 1_000_000
_OWN_FIELDS = frozenset({"model", "prompt", "max_tokens", "request_id", "tokens_reserved", "category"})


class Manner(enum.Enum):
    """How a reply is sent."""

    PLAIN = enum.auto()
    HANG = enum.auto()  # never
    DRIP = enum.auto()  # byte by byte


@dataclass(frozen=True, slots=True)
class Call:
    """One validated prompt for one model."""

    model: str
    prompt: str
    max_tokens: int = DEFAULT_MAX_TOKENS
    request_id: str | None = None
    tokens_reserved: int | None = None
    category: str | None = None
    request: Mapping[str, Any] | None = None  # messages and parameters as they came; None for a bare prompt


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply; `body` is JSON unless a fault replaced it."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    tokens_used: int = 0
    manner: Manner = Manner.PLAIN


class BadCall(Exception):  # noqa: N818 - what the client sent, not what we did
    """The request is invalid; carries the reply."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.reply = refusal(status, kind, message)


def refusal(status: int, kind: str, message: str, retry_after: object = None) -> Reply:
    """An error reply: `{"error": {"type", "message"}}`."""
    headers = {} if retry_after is None else {"retry-after": str(retry_after)}
    return Reply(status, json.dumps({"error": {"type": kind, "message": message}}).encode(), headers)


def read_json(content: bytes) -> Any:
    """Parses the body as JSON. Raises BadCall with status 422."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadCall(422, "bad_body", f"the body is not JSON: {error}") from error


def read_call(document: Any) -> Call:
    """Validates a call. Raises BadCall with status 422, naming the invalid key."""
    if not isinstance(document, dict):
        raise BadCall(422, "bad_body", "the body must be a JSON object with model, and prompt or messages")
    max_tokens = _whole(document, "max_tokens", 1)
    request = {key: value for key, value in document.items() if key not in _OWN_FIELDS and value is not None}
    return Call(
        model=_text(document, "model") or _missing("model"),
        prompt=_text(document, "prompt") or _prompt_of(request.get("messages")),
        max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
        request_id=_text(document, "request_id"),
        tokens_reserved=_whole(document, "tokens_reserved", 0),
        category=_text(document, "category"),
        request=request or None,
    )


def _prompt_of(messages: Any) -> str:
    if messages is None:
        _missing("prompt")
    try:
        return conversation_of(check_messages(messages)).text
    except RequestError as error:
        raise BadCall(422, "bad_body", str(error)) from error


def _text(document: dict[str, Any], key: str) -> str | None:
    value = document.get(key)
    if value is not None and not isinstance(value, str):
        raise BadCall(422, "bad_body", f"{key} must be a text")
    return value


def _whole(document: dict[str, Any], key: str, least: int) -> int | None:
    value = document.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= LARGEST_MAX_TOKENS:
        raise BadCall(422, "bad_body", f"{key} must be a whole number from {least} to {LARGEST_MAX_TOKENS}")
    return value


def _missing(key: str) -> NoReturn:
    raise BadCall(422, "bad_body", f"{key} is missing or empty")


class CallHandler:
    """Answers calls; of HTTP it uses status and headers only."""

    def __init__(
        self, settings: StandInSettings, faults: Faults, conditions: Conditions, provider: Provider | None
    ) -> None:
        self._settings = settings
        self._quotas = Quotas(settings.quotas)
        self._faults = faults
        self._conditions = conditions
        self._provider = provider
        self.book = FlawBook()
        self._garbage = itertools.cycle((b"It works!", b'{"model": "x", "usage": {}}', b'{"answer": "cut o'))

    async def solve(self, call: Call, arrived_at: float) -> Reply:
        """Replies after the model's latency; never raises for the content of a call."""
        model = self._settings.models.get(call.model)
        if model is None or not self._conditions.serves(call.model):
            return refusal(
                404, "unknown_model", f"no model {call.model!r}; GET /models names those that are served"
            )
        needed = token_count(call.prompt) + call.max_tokens
        retry_after = self._quotas.enter(call.model, arrived_at, needed)
        if retry_after is not None:
            return refusal(429, "rate_limited", f"{call.model} is over its quota", retry_after)
        try:
            return await self._admitted(model, call, needed)
        finally:
            self._quotas.leave(call.model)

    async def _admitted(self, model: ServedModel, call: Call, needed: int) -> Reply:
        fault = self._faults.pick(call.model)
        if fault is not None and fault.kind in _AT_ONCE:
            return _struck(fault)
        if fault is None and self._provider is not None and self._provider.serves(call.model):
            return await self._forward(self._provider, model, call)
        if needed > model.context_tokens:
            return refusal(
                400, "too_long", f"{needed} tokens do not fit {call.model}'s {model.context_tokens}"
            )
        category = call.category or self._settings.categories.get(call.prompt) or guess_category(call.prompt)
        condition = self._conditions.of(call.model, category)
        if self._conditions.fails(condition):
            return refusal(
                500,
                "internal_error",
                f"{call.model} fails for {category} prompts (simulated)",
            )
        return await self._answer(model, replace(call, category=category), fault, condition)

    async def _answer(
        self, model: ServedModel, call: Call, fault: FaultOrder | None, condition: Condition
    ) -> Reply:
        settings = self._settings
        await asyncio.sleep(
            condition.latency_factor
            * latency_seconds(
                call.model,
                call.prompt,
                seed=settings.seed,
                shape=settings.latency,
                time_scale=settings.time_scale,
            )
        )
        if fault is not None and fault.kind == "garbage":
            return Reply(200, next(self._garbage))
        answer = compose_answer(
            call.model, call.prompt, category=call.category, seed=settings.seed,
            references=settings.references, quality=condition.quality, variety=_variety(call),
        )  # fmt: skip
        emptied = fault is not None and fault.kind == "empty"
        try:
            found = shaped("" if emptied else answer.text, call.request or {}, max_tokens=call.max_tokens)
        except (UnsupportedSchemaError, LookupError, TypeError, AttributeError) as error:
            return refusal(400, "invalid_request", f"this request cannot be answered: {error}")
        manner = Manner.DRIP if fault is not None and fault.kind == "slow_drip" else Manner.PLAIN
        flaw = "empty" if emptied else answer.flaw
        self.book.note(KnownAnswer(call.request_id, call.model, call.category or "", flaw))
        tokens = (answer.prompt_tokens, found.tokens)
        return _answered(model, found, *tokens, manner=manner, price_factor=condition.price_factor)

    async def _forward(self, provider: Provider, model: ServedModel, call: Call) -> Reply:
        try:
            found = await provider.complete(call.model, call.prompt, call.max_tokens, call.request)
        except ProviderRefusal as error:
            return refusal(error.status, "provider", str(error), error.retry_after)
        prompt_tokens = token_count(call.prompt) if found.prompt_tokens is None else found.prompt_tokens
        answer = Shaped(found.text, found.finish_reason, found.tool_calls)
        completion_tokens = answer.tokens if found.completion_tokens is None else found.completion_tokens
        return _answered(model, answer, prompt_tokens, completion_tokens, cached_tokens=found.cached_tokens)


def _variety(call: Call) -> str:
    """Distinguishes answers of one prompt: they differ only with a temperature and without a seed."""
    request = call.request or {}
    return f"{call.request_id}" if request.get("temperature") and request.get("seed") is None else ""


_AT_ONCE = frozenset({"error", "rate_limit", "overload", "bad_gateway", "hang"})


def _struck(fault: FaultOrder) -> Reply:
    if fault.kind == "hang":
        return Reply(200, b"", manner=Manner.HANG)
    if fault.kind == "rate_limit":
        return refusal(429, "rate_limited", "a fault was ordered", fault.retry_after_seconds)
    if fault.kind == "bad_gateway":
        return Reply(502, b"<html><title>502 Bad Gateway</title></html>", {"content-type": "text/html"})
    if fault.kind == "overload":
        return refusal(503, "overloaded", "a fault was ordered", fault.retry_after_seconds)
    return refusal(500, "internal_error", "a fault was ordered")


def _answered(
    model: ServedModel,
    answer: Shaped,
    prompt_tokens: int,
    completion_tokens: int,
    *,
    cached_tokens: int | None = None,
    manner: Manner = Manner.PLAIN,
    price_factor: float = 1.0,
) -> Reply:
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    document = {
        "model": model.name,
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        **({"tool_calls": answer.tool_calls} if answer.tool_calls else {}),
        "usage": usage if cached_tokens is None else {**usage, "cached_tokens": cached_tokens},
        "cost_usd": round(price_factor * model.cost_usd(prompt_tokens, completion_tokens), 9),
    }
    body = json.dumps(document).encode()
    return Reply(200, body, tokens_used=prompt_tokens + completion_tokens, manner=manner)
