"""What was asked, who is asked for it, in which order, and with what. No I/O."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from router.answering import policy as race
from router.answering.fallback import Knowledge
from router.answering.store import CallRow
from router.answering.task_record import RequestContext
from router.classification import Classification
from router.models import CallRequest, Roster
from router.settings import RouterConfig
from router.task import AnswerRank, Role

PASSAGES_SOURCE = "knowledge"  # stands where a model's name would
RANKS = {
    Role.ASKED: AnswerRank.CHOSEN_MODEL,
    Role.NEXT: AnswerRank.CHOSEN_MODEL,
    Role.FALLBACK: AnswerRank.FALLBACK_MODEL,
    Role.PASSAGES: AnswerRank.PASSAGES,
}


Classify = Callable[[str, float], Awaitable[Classification]]  # the prompt, and how many seconds it may take


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What was asked. `model`: only this one. `deadline_seconds` None: that of the category."""

    prompt: str
    model: str | None = None
    deadline_seconds: float | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Desk:
    """What a prompt that comes now is answered with."""

    means: RequestContext
    config: RouterConfig
    roster: Roster
    knowledge: Knowledge | None


@dataclass(frozen=True, slots=True)
class RoutingPlan:
    """The models of the ranking that may be asked, the best first, and those that may answer as fallback."""

    categorised: Classification
    ranking: tuple[str, ...]
    cheap: tuple[str, ...]

    @classmethod
    def of(
        cls, roster: Roster, config: RouterConfig, categorised: Classification, named: str | None
    ) -> RoutingPlan:
        """For a prompt of this category; a model that was named is asked alone."""
        if named is not None:
            return cls(categorised, (named,), ())
        usable = tuple(roster.models)
        ranking = race.ranked(roster.places.get(categorised.category, {}), usable)
        preferred = ranking[0] if ranking else None
        cheap = race.fallback_order(config.fallback.models, usable, preferred)
        return cls(categorised, ranking[: config.answering.max_models], cheap)

    @property
    def preferred(self) -> str | None:
        return self.ranking[0] if self.ranking else None

    @property
    def fallback(self) -> str | None:
        return self.cheap[0] if self.cheap else None

    def row(self, order: CallRequest, role: Role, *, worker: str, attempt: int) -> CallRow:
        """What the log says of a call before it is made."""
        return CallRow(
            call_id=order.call_id, model=order.model, role=role, rank=RANKS[role],
            category=self.categorised.category, confidence=self.categorised.confidence, worker=worker,
            attempt=attempt, reserved_tokens=order.reserved_tokens, preferred=self.preferred,
            fallback=self.fallback,
        )  # fmt: skip


def call_request(
    roster: Roster, call_id: uuid.UUID, model: str, prompt: str, *most_tokens: int | None
) -> CallRequest:
    """What is sent to a model: its own longest answer, unless one of `most_tokens` is less."""
    return CallRequest.to(roster.models[model], call_id, prompt, *most_tokens)
