"""Pairwise judging: a judge compares two answers in both orders, within a budget."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from router.background import cancel_and_wait
from router.learning.grading import Judgment, judge_prompts, parse_verdict
from router.models import DirectCaller, DirectResult, RosterModel
from router.task import Outcome

VERDICT_TOKENS = 300  # for a sentence of reasons and the verdict; some models think first
MILLION = 1e6


@dataclass(frozen=True, slots=True)
class PricedModel:
    """A model with its prices in USD per million tokens."""

    model: RosterModel
    input_price: float = 0.0
    output_price: float = 0.0

    @property
    def name(self) -> str:
        return self.model.model

    def price(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The price of a call in USD."""
        return (prompt_tokens * self.input_price + completion_tokens * self.output_price) / MILLION

    def cost(self, called: DirectResult) -> float:
        """The cost of a call in USD: as the backend reports it, else by its tokens."""
        result = called.result
        if called.cost_usd or result is None:
            return called.cost_usd or 0.0
        return self.price(result.prompt_tokens or 0, result.completion_tokens or 0)


@dataclass(slots=True)
class Budget:
    """Calls and USD that may still be spent. Calls in flight are completed even if they exceed it."""

    usd: float
    calls: float = math.inf
    spent_calls: int = 0
    spent_usd: float = 0.0

    @property
    def is_empty(self) -> bool:
        return self.usd <= 0 or self.calls <= 0

    def spend(self, usd: float, calls: int = 1) -> None:
        """Deducts the cost of completed calls."""
        self.usd -= usd
        self.calls -= calls
        self.spent_usd += usd
        self.spent_calls += calls

    def reserve(self, usd: float, calls: int) -> bool:
        """Sets aside the maximum cost of calls before they are made; False if that much is not left."""
        if calls > self.calls or usd > self.usd:
            return False
        self.usd -= usd
        self.calls -= calls
        return True

    def release(self, usd: float, calls: int) -> None:
        """Returns a reservation; the actual cost is deducted by `spend`."""
        self.usd += usd
        self.calls += calls


@dataclass(frozen=True, slots=True)
class Comparison:
    """A judge's verdicts on two answers, and the calls for them."""

    judgment: Judgment
    calls: tuple[DirectResult, ...]

    @property
    def problem(self) -> str:
        """The reason why there is no verdict."""
        return next((call.why for call in self.calls if call.why), "no verdict in its reply")


async def compare(
    caller: DirectCaller, judge: RosterModel, category: str, prompt: str, answers: tuple[str, str], *,
    timeout_seconds: float,
) -> Comparison:  # fmt: skip
    """Asks a judge which of two answers is better, in both orders.

    DatabaseError if a call cannot be logged.
    """
    calls = await asyncio.gather(
        *(
            caller.call(
                judge, question, category=category, purpose="judge", max_tokens=VERDICT_TOKENS,
                timeout_seconds=timeout_seconds,
            )
            for question in judge_prompts(prompt, *answers)
        )
    )  # fmt: skip
    return Comparison(Judgment(*(parse_verdict(answer_of(call) or "") for call in calls)), tuple(calls))


def answer_of(called: DirectResult) -> str | None:
    """The answer of a call; None if there is none."""
    result = called.result
    return result.answer if result is not None and result.outcome is Outcome.ANSWERED else None


async def gather_or_cancel(*works: Coroutine[Any, Any, Any], name: str) -> list[Any]:
    """Runs coroutines concurrently and returns their results; if one fails, cancels the others first."""
    tasks = [asyncio.create_task(work, name=f"{name} {number}") for number, work in enumerate(works)]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await cancel_and_wait(*tasks)
