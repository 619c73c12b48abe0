"""Call request: one prompt for one model, as the backend client sends it."""

from __future__ import annotations

import math
import uuid
from dataclasses import dataclass

from router.models.roster import RosterModel
from router.request import ModelRequest
from router.task import CallResult, Claim, Outcome
from router.traffic import MAX_CALL_COST, MICRO_USD

_ANSWERS = frozenset({Outcome.ANSWERED, Outcome.GARBAGE})


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
    input_price: float = 0.0  # USD per million tokens
    output_price: float = 0.0

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
            input_price=model.input_price, output_price=model.output_price,
        )  # fmt: skip

    @classmethod
    def of_claim(cls, claim: Claim, model: RosterModel) -> CallRequest:
        """Sends the request of a claimed task; SQL has reserved its tokens by the same rule."""
        return cls(
            claim.call_id, model.model, model.endpoint, claim.prompt, claim.max_tokens, claim.reserved_tokens,
            model.timeout_seconds, claim.client, request=claim.request,
            input_price=model.input_price, output_price=model.output_price,
        )  # fmt: skip

    @property
    def reserved_cost(self) -> int:
        """The most that the call may cost, in millionths of a US dollar; as `reserved_cost` in SQL."""
        return self._cost(max(0, self.reserved_tokens - self.max_tokens), self.max_tokens)

    def cost_of(self, result: CallResult) -> int | None:
        """Returns the cost of a call that ended, in millionths of a US dollar; None if it is unknown.

        A call that was refused costs nothing. `known_cost` in SQL decides by the same rule.
        """
        if result.cost_usd is not None:
            return min(math.ceil(round(result.cost_usd * MICRO_USD, 6)), MAX_CALL_COST)
        if result.prompt_tokens is not None and result.completion_tokens is not None:
            return self._cost(result.prompt_tokens, result.completion_tokens)
        return None if result.outcome in _ANSWERS or result.may_go_on else 0

    def _cost(self, prompt_tokens: int, completion_tokens: int) -> int:
        # A price per million tokens is one of a token in millionths of a dollar.
        micro = prompt_tokens * self.input_price + completion_tokens * self.output_price
        return min(math.ceil(round(micro, 6)), MAX_CALL_COST)


def reserved_tokens(prompt: str, max_tokens: int, request: ModelRequest | None = None) -> int:
    """Returns an upper bound of a call's tokens: no token of a byte-level tokenizer is below one byte."""
    further = 0 if request is None else request.further_bytes
    return len(prompt.encode("utf-8", "replace")) + further + max_tokens
