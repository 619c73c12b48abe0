"""Call request: one prompt for one model, as the backend client sends it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from router.models.roster import RosterModel
from router.request import ModelRequest
from router.task import Claim


@dataclass(frozen=True, slots=True)
class CallRequest:
    """One prompt for one model; `timeout_seconds` counts from the connection attempt to the whole answer."""

    call_id: uuid.UUID
    model: str
    endpoint: str
    prompt: str
    max_tokens: int
    reserved_tokens: int
    timeout_seconds: float
    client: str = ""
    interactive: bool = False  # somebody waits for the answer
    request: ModelRequest | None = None  # None: only the prompt is sent

    @classmethod
    def to(
        cls, model: RosterModel, call_id: uuid.UUID, prompt: str, *max_tokens: int | None,
        client: str = "", interactive: bool = False, request: ModelRequest | None = None,
    ) -> CallRequest:  # fmt: skip
        """Addresses a prompt to a model. The smallest of `max_tokens` and the model's own limit applies."""
        limit = min([model.max_tokens, *(tokens for tokens in max_tokens if tokens is not None)])
        return cls(
            call_id, model.model, model.endpoint, prompt, limit, reserved_tokens(prompt, limit, request),
            model.timeout_seconds, client, interactive, request,
        )  # fmt: skip

    @classmethod
    def of_claim(cls, claim: Claim, model: RosterModel) -> CallRequest:
        """Sends the request of a claimed task; SQL has reserved its tokens by the same rule."""
        return cls(
            claim.call_id, model.model, model.endpoint, claim.prompt, claim.max_tokens, claim.reserved_tokens,
            model.timeout_seconds, claim.client, request=claim.request,
        )  # fmt: skip


def reserved_tokens(prompt: str, max_tokens: int, request: ModelRequest | None = None) -> int:
    """Returns an upper bound of a call's tokens: no token of a byte-level tokenizer is below one byte."""
    further = 0 if request is None else request.further_bytes
    return len(prompt.encode("utf-8", "replace")) + further + max_tokens
