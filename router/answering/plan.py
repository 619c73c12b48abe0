"""Plans the calls of one request: models in order, limits, and log rows. No I/O."""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from router.answering.policy import fallback_order, rank_models
from router.answering.store import CallRow
from router.classification import Classification
from router.models import (
    CallRequest,
    Roster,
    capable_models,
    context_limits,
    longest_first,
    request_for,
    reserved_tokens,
    too_long,
)
from router.request import Conversation, ModelRequest
from router.settings import RouterConfig
from router.task import AnswerRank, Role
from router.traffic import MAX_COUNT

PASSAGES_SOURCE = "knowledge"  # takes the place of a model's name
RANKS = {
    Role.ASKED: AnswerRank.CHOSEN_MODEL,
    Role.NAMED: AnswerRank.CHOSEN_MODEL,
    Role.NEXT: AnswerRank.CHOSEN_MODEL,
    Role.FALLBACK: AnswerRank.FALLBACK_MODEL,
    Role.PASSAGES: AnswerRank.PASSAGES,
}

Classify = Callable[[Conversation, float], Awaitable[Classification]]  # and the seconds until the deadline


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """A request, and how it is to be answered.

    With `model` only that model is called, with `models` only those. Without `deadline_seconds` the
    category's deadline applies. It counts from `began`, on the monotonic clock.
    """

    request: ModelRequest
    model: str | None = None
    deadline_seconds: float | None = None
    max_tokens: int | None = None
    client: str = ""
    models: frozenset[str] | None = None
    began: float = field(default_factory=time.monotonic)

    @property
    def chat(self) -> Conversation:
        """Text of the request."""
        return self.request.conversation


@dataclass(frozen=True, slots=True)
class RoutingPlan:
    """Models that may be called for one prompt, best first, and the limits of their answers in tokens.

    `max_tokens` is the request's own limit; `fallback_max_tokens` applies to fallback models as well.
    """

    roster: Roster
    category: str
    confidence: float | None
    reason: str = ""
    ranking: tuple[str, ...] = ()
    fallback_models: tuple[str, ...] = ()
    max_tokens: int | None = None
    fallback_max_tokens: int | None = None
    too_long: str | None = None  # set if the prompt fits no model, or not the named one
    client: str = ""
    interactive: bool = False
    config: RouterConfig | None = None

    @classmethod
    def of(
        cls, roster: Roster, config: RouterConfig, category: str, confidence: float | None, *,
        reason: str = "", model: str | None = None, max_tokens: int | None = None, request: ModelRequest,
        client: str = "", interactive: bool = False, models: frozenset[str] | None = None,
    ) -> RoutingPlan:  # fmt: skip
        """Plans a request of this category; a named `model` is the only one, else `models` are (None: all).

        Models that cannot do what the request needs, or whose context is too short for it, are left out. If
        none of those with a rank remains, others take their place, longest context first.
        """
        prompt_bytes = reserved_tokens(request.conversation.text, 0, request)
        allowed = [name for name in roster.models if models is None or name in models]
        limits = context_limits(
            {name: roster.models[name] for name in capable_models(config, allowed, request)}
        )
        tokens = {name: min(one.max_tokens, max_tokens or MAX_COUNT) for name, one in roster.models.items()}
        usable = tuple(name for name in limits if limits[name].fits(prompt_bytes, tokens[name]))
        too_long_for = model if model in limits and model not in usable else None
        if model is None and not usable and limits:
            too_long_for = longest_first(limits)[0].model
        refusal = too_long(limits[too_long_for], prompt_bytes, tokens[too_long_for]) if too_long_for else None
        if model is not None:
            return cls(
                roster,
                category,
                confidence,
                reason,
                ranking=(model,),
                max_tokens=max_tokens,
                too_long=refusal,
                client=client,
                interactive=interactive,
                config=config,
            )
        places = roster.places.get(category, {})
        ranking = rank_models(places, usable)
        if not ranking and rank_models(places, tuple(limits)):
            ranking = tuple(limit.model for limit in longest_first(limits) if limit.model in usable)
        preferred = ranking[0] if ranking else None
        return cls(
            roster, category, confidence, reason, ranking=ranking[: config.answering.max_models],
            fallback_models=fallback_order(config.fallback.models, usable, preferred),
            max_tokens=max_tokens, fallback_max_tokens=config.fallback.max_tokens, too_long=refusal,
            client=client, interactive=interactive, config=config,
        )  # fmt: skip

    @property
    def preferred(self) -> str | None:
        return self.ranking[0] if self.ranking else None

    @property
    def fallback(self) -> str | None:
        return self.fallback_models[0] if self.fallback_models else None

    def call_request(self, call_id: uuid.UUID, role: Role, model: str, request: ModelRequest) -> CallRequest:
        """Builds the call to the model; the smallest limit bounds the length of its answer."""
        role_limit = self.fallback_max_tokens if role is Role.FALLBACK else None
        assert self.config is not None
        sent = request_for(self.config, model, request)
        return CallRequest.to(
            self.roster.models[model], call_id, request.conversation.text, self.max_tokens, role_limit,
            client=self.client, interactive=self.interactive, request=sent if sent.stored() else None,
        )  # fmt: skip

    def call_row(
        self, call_id: uuid.UUID, role: Role, model: str, *,
        worker: str, number: int, reserved_tokens: int = 0,
    ) -> CallRow:  # fmt: skip
        """Returns the log row that is written before the call is sent."""
        return CallRow(
            call_id=call_id, model=model, role=role, rank=RANKS[role], category=self.category,
            confidence=self.confidence, worker=worker, attempt=number, reserved_tokens=reserved_tokens,
            preferred=self.preferred, fallback=self.fallback, client=self.client,
        )  # fmt: skip
