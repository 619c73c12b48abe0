"""Judges a sample of the checked answers with another model.

For each sampled answer, the first model of the category answers the same prompt again, and a third model
says, in both orders, which answer is better. So all models are measured against the first; the first itself
scores a tie. The calls go through the limiter and are logged as `judge`; they are not evidence. Calls and
USD per period are bounded, also across several runs.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from router.database import fetch, fetch_one, postgres_text
from router.learning.grading import JUDGED_CHARACTERS, Judgment, Result, Verdict
from router.learning.pairwise import (
    VERDICT_TOKENS,
    Budget,
    PricedModel,
    answer_of,
    compare,
    gather_or_cancel,
)
from router.models import DirectCaller, DirectResult, Roster, read_roster
from router.settings import JudgingSettings, LearningSettings
from router.task import Outcome

CALLS_PER_ANSWER = 3  # the opponent's answer, and the judge in both orders
PERMIT_SECONDS = 60.0
MAX_SECONDS = 900.0  # the nightly run has other steps
MAX_CONCURRENCY = 8


@dataclass(frozen=True, slots=True)
class Judged:
    """Summary of one run: the results of the comparisons, and their cost."""

    drawn: int  # sampled answers without a judgment
    wins: int
    ties: int
    losses: int
    unread: int  # compared without a verdict
    unasked: int  # left for the next run: no budget, permit or judge
    calls: int
    cost_usd: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return (
            f"{self.drawn} answers drawn: {self.wins} wins, {self.ties} ties, {self.losses} losses against"
            f" the first of their category, {self.unread} without a verdict, {self.unasked} not judged;"
            f" {self.calls} calls, {self.cost_usd:.4f} USD"
        )


@dataclass(frozen=True, slots=True)
class _Drawn:
    call_id: uuid.UUID
    category: str
    model: str
    prompt: str
    answer: str


@dataclass(slots=True)
class _Tally:
    results: dict[Result, int] = field(default_factory=lambda: dict.fromkeys(Result, 0))
    unread: int = 0
    unasked: int = 0
    decided_in: set[str] = field(default_factory=set)  # categories
    notes: dict[str, None] = field(default_factory=dict)  # ordered, without duplicates


async def judge_answers(caller: DirectCaller, learning: LearningSettings) -> Judged:
    """Judges the sample of the last period within the rest of its budget. Running it again repeats no call.

    Raises DatabaseError or LimiterUnavailable if Postgres or Redis is unavailable; never for failed calls.
    """
    pool, settings, seconds = caller.pool, learning.judging, learning.period_seconds
    found = await fetch(
        pool, "SELECT * FROM answers_to_judge($1, period_to_judge($1), $2, $3)",
        seconds, settings.answers, JUDGED_CHARACTERS,
    )  # fmt: skip
    spent = await fetch_one(pool, "SELECT * FROM judging_usage($1)", seconds)
    roster = await read_roster(pool)
    found_prices = await fetch(pool, "SELECT model, input_price::float8, output_price::float8 FROM roster")
    prices = {row["model"]: (row["input_price"], row["output_price"]) for row in found_prices}
    models = {name: PricedModel(model, *prices.get(name, ())) for name, model in roster.models.items()}
    budget = Budget(settings.cost_usd - spent["usd"], settings.calls - spent["calls"])
    return await _Judging(caller, settings, roster, models, budget).run(
        [_Drawn(**dict(row)) for row in found]
    )


class _Judging:
    """One run."""

    def __init__(
        self, caller: DirectCaller, settings: JudgingSettings, roster: Roster,
        models: Mapping[str, PricedModel], budget: Budget,
    ) -> None:  # fmt: skip
        self._caller = caller
        self._settings = settings
        self._roster = roster
        self._models = models
        self._budget = budget
        self._tally = _Tally()
        self._deadline = time.monotonic() + MAX_SECONDS

    async def run(self, drawn: Sequence[_Drawn]) -> Judged:
        of_first = [answer for answer in drawn if self._ranked(answer.category)[:1] == [answer.model]]
        waiting = iter([answer for answer in drawn if answer not in of_first])
        await gather_or_cancel(*(self._work(waiting) for _ in range(MAX_CONCURRENCY)), name="router judging")
        for answer in of_first:
            if answer.category in self._tally.decided_in:
                await self._record_tie(answer)
        tally, budget = self._tally, self._budget
        return Judged(
            len(drawn), tally.results[Result.WIN], tally.results[Result.TIE], tally.results[Result.LOSS],
            tally.unread, tally.unasked, budget.spent_calls, budget.spent_usd, tuple(tally.notes),
        )  # fmt: skip

    async def _work(self, waiting: Iterator[_Drawn]) -> None:
        for answer in waiting:
            ranked = self._ranked(answer.category)
            judge = self._judge_of(ranked, answer.model)
            if time.monotonic() > self._deadline:
                self._skip(f"not all answers were judged within {MAX_SECONDS:g} s")
            elif judge is None:
                self._skip(f"{answer.category}: no third model is active that could judge {answer.model}")
            else:
                await self._compare(answer, self._models[ranked[0]], self._models[judge])

    def _ranked(self, category: str) -> list[str]:
        """The active models of the category, best first; models on probation are left out."""
        places = self._roster.places.get(category, {})
        active = {name for name, model in self._roster.models.items() if model.state == "active"}
        return sorted(active & set(places), key=lambda name: (places[name], name))

    def _judge_of(self, ranked: Sequence[str], judged: str) -> str | None:
        wanted = [name for name in self._settings.models if name in self._roster.models] or ranked
        return next((name for name in wanted if name not in (judged, *ranked[:1])), None) if ranked else None

    def _skip(self, reason: str) -> None:
        self._tally.unasked += 1
        self._tally.notes[reason] = None

    async def _compare(self, answer: _Drawn, opponent: PricedModel, judge: PricedModel) -> None:
        reserved = _max_usd(answer, opponent, judge), CALLS_PER_ANSWER
        if not self._budget.reserve(*reserved):
            self._skip("the budget of this period is used up (judging.calls, judging.cost_usd)")
            return
        calls: list[tuple[DirectResult, PricedModel]] = []
        try:
            if await self._claim(answer, opponent.name, judge.name, reserved):
                await self._ask(answer, opponent, judge, calls)
                usd, sent = _spent(calls)
                update = "UPDATE judgements SET calls = $2, cost = $3 WHERE call_id = $1"
                await fetch(self._caller.pool, update, answer.call_id, sent, usd)
        finally:
            self._budget.release(*reserved)
            self._budget.spend(*_spent(calls))

    async def _claim(self, answer: _Drawn, opponent: str, judge: str, reserved: tuple[float, int]) -> bool:
        """Records that the answer is being judged, at its maximum cost; False if another run does it."""
        claimed = await fetch_one(
            self._caller.pool,
            "INSERT INTO judgements (call_id, category, model, opponent, judge, note, cost, calls)"
            " VALUES ($1, $2, $3, $4, $5, 'begun', $6, $7) ON CONFLICT DO NOTHING RETURNING 1",
            answer.call_id, answer.category, answer.model, opponent, judge, *reserved,
        )  # fmt: skip
        return claimed is not None

    async def _ask(
        self, answer: _Drawn, opponent: PricedModel, judge: PricedModel,
        calls: list[tuple[DirectResult, PricedModel]],
    ) -> None:  # fmt: skip
        other = await self._caller.call(
            opponent.model, answer.prompt, category=answer.category, purpose="judge",
            timeout_seconds=PERMIT_SECONDS,
        )  # fmt: skip
        calls.append((other, opponent))
        if not _was_sent(other):  # the next run may try again
            await fetch(self._caller.pool, "DELETE FROM judgements WHERE call_id = $1", answer.call_id)
            self._skip(f"{opponent.name} could not be called: {other.why}")
            return
        text = answer_of(other)
        if text is None:
            note = f"{opponent.name} did not answer: {other.why}"
            await self._record(answer, Judgment(None, None), note)
            return
        compared = await compare(
            self._caller, judge.model, answer.category, answer.prompt, (answer.answer, text),
            timeout_seconds=PERMIT_SECONDS,
        )  # fmt: skip
        calls.extend((called, judge) for called in compared.calls)
        note = "" if compared.judgment.result else f"{judge.name}: {compared.problem}"
        await self._record(answer, compared.judgment, note or None)

    async def _record(self, answer: _Drawn, judgment: Judgment, note: str | None) -> None:
        result, scores = judgment.result, judgment.scores
        if result is None:
            self._tally.unread += 1
        else:
            self._tally.results[result] += 1
            self._tally.decided_in.add(answer.category)
        await fetch(
            self._caller.pool, "SELECT record_judgment($1, $2, $3, $4, $5, $6)", answer.call_id,
            judgment.straight and judgment.straight.value, judgment.swapped and judgment.swapped.value,
            result and result.value, scores and scores[0], postgres_text(note),
        )  # fmt: skip

    async def _record_tie(self, answer: _Drawn) -> None:
        """Records an answer of the first model as a tie with itself, without a call."""
        if await self._claim(answer, answer.model, answer.model, (0.0, 0)):
            scores = Judgment(Verdict.TIE, Verdict.TIE).scores
            await fetch(
                self._caller.pool, "SELECT record_judgment($1, 'tie', 'tie', 'tie', $2, $3)", answer.call_id,
                scores and scores[0], "the first of its category",
            )  # fmt: skip


def _max_usd(answer: _Drawn, opponent: PricedModel, judge: PricedModel) -> float:
    """An upper bound of the cost of judging an answer: one token per byte."""
    shown = len((answer.prompt + answer.answer)[: 2 * JUDGED_CHARACTERS].encode()) + JUDGED_CHARACTERS
    of_opponent = opponent.price(len(answer.prompt.encode()), opponent.model.max_tokens)
    return of_opponent + 2 * judge.price(shown, VERDICT_TOKENS)


def _spent(calls: Sequence[tuple[DirectResult, PricedModel]]) -> tuple[float, int]:
    """USD and number of the calls that were sent."""
    costs = [model.cost(called) for called, model in calls if _was_sent(called)]
    return sum(costs), len(costs)


def _was_sent(called: DirectResult) -> bool:
    return called.result is not None and called.result.outcome is not Outcome.UNSENT
