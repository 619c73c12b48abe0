"""Sampled answers judged by another model: the part of grading that costs calls.

For a sample of the answers that were graded, the first model of the category is asked the same prompt anew,
and a third model says, in both orders, which of the two answers is better. The first model is the measure of
the others: against itself it is a tie. All calls go through the limiter and stand in the log as `judge`; they
are no evidence. What one night may cost is bounded, in calls and in USD, also over several runs.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from router.background import cancel_and_wait
from router.database import fetch, fetch_one, postgres_text
from router.learning.grading import (
    JUDGED_CHARACTERS,
    Judgement,
    Result,
    Verdict,
    judge_prompts,
    parse_verdict,
)
from router.models import DirectCaller, DirectResult, Roster, read_roster
from router.settings import JudgingSettings, LearningSettings
from router.task import Outcome

CALLS_AN_ANSWER = 3  # the opponent's answer, and the judge in both orders
VERDICT_TOKENS = 300  # a sentence of reasons and the verdict; some models think first
PATIENCE_SECONDS = 60.0
LONGEST_SECONDS = 900.0  # the night has other work
AT_ONCE = 8
MILLION = 1e6


@dataclass(frozen=True, slots=True)
class Judged:
    """What the judges of one run said: answers that were compared, by result, and what it cost."""

    drawn: int  # answers of the sample that nobody had judged yet
    wins: int
    ties: int
    losses: int
    unread: int  # compared, but nothing could be read or was answered
    unasked: int  # left for another night: no budget, no permit or no judge
    calls: int
    cost_usd: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return (
            f"{self.drawn} answers drawn: {self.wins} wins, {self.ties} ties, {self.losses} losses against"
            f" the first of their category, {self.unread} not readable, {self.unasked} left;"
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
class _Budget:
    """What may still be spent. The most that a call can cost is set aside before it is made."""

    calls: int
    usd: float
    spent_calls: int = 0
    spent_usd: float = 0.0

    def set_aside(self, calls: int, usd: float) -> bool:
        if calls > self.calls or usd > self.usd:
            return False
        self.calls -= calls
        self.usd -= usd
        return True

    def account(self, set_aside: tuple[int, float], calls: int, usd: float) -> None:
        self.calls += set_aside[0] - calls
        self.usd += set_aside[1] - usd
        self.spent_calls += calls
        self.spent_usd += usd


@dataclass(slots=True)
class _Tally:
    results: dict[Result, int] = field(default_factory=lambda: dict.fromkeys(Result, 0))
    unread: int = 0
    unasked: int = 0
    decided_in: set[str] = field(default_factory=set)  # categories
    notes: dict[str, None] = field(default_factory=dict)  # in order, each once


async def judge_answers(caller: DirectCaller, learning: LearningSettings) -> Judged:
    """Judge the sample of the last period within what is left of its budget; asks nothing twice.

    DatabaseError or LimiterUnavailable if Postgres or Redis is away; what models do never raises.
    """
    pool, settings, seconds = caller.pool, learning.judging, learning.period_seconds
    found = await fetch(
        pool, "SELECT * FROM answers_to_judge($1, period_to_judge($1), $2, $3)",
        seconds, settings.answers, JUDGED_CHARACTERS,
    )  # fmt: skip
    spent = await fetch_one(pool, "SELECT * FROM judging_usage($1)", seconds)
    prices = await fetch(pool, "SELECT model, input_price::float8, output_price::float8 FROM roster")
    judging = _Judging(
        caller,
        settings,
        await read_roster(pool),
        _Budget(settings.calls - spent["calls"], settings.cost_usd - spent["usd"]),
        {row["model"]: (row["input_price"], row["output_price"]) for row in prices},
    )
    return await judging.run([_Drawn(**dict(row)) for row in found])


class _Judging:
    """One run. `prices`: USD a million tokens, of prompt and of answer."""

    def __init__(
        self, caller: DirectCaller, settings: JudgingSettings, roster: Roster, budget: _Budget,
        prices: Mapping[str, tuple[float, float]],
    ) -> None:  # fmt: skip
        self._caller = caller
        self._settings = settings
        self._roster = roster
        self._budget = budget
        self._prices = prices
        self._tally = _Tally()
        self._until = time.monotonic() + LONGEST_SECONDS

    async def run(self, drawn: Sequence[_Drawn]) -> Judged:
        measures = [answer for answer in drawn if self._in_order(answer.category)[:1] == [answer.model]]
        waiting = iter([answer for answer in drawn if answer not in measures])
        workers = [
            asyncio.get_running_loop().create_task(self._work(waiting), name=f"router judging {number}")
            for number in range(AT_ONCE)
        ]
        try:
            await asyncio.gather(*workers)
        finally:
            await cancel_and_wait(*workers)
        for answer in measures:
            if answer.category in self._tally.decided_in:
                await self._keep_measure(answer)
        tally, budget = self._tally, self._budget
        return Judged(
            len(drawn), tally.results[Result.WIN], tally.results[Result.TIE], tally.results[Result.LOSS],
            tally.unread, tally.unasked, budget.spent_calls, budget.spent_usd, tuple(tally.notes),
        )  # fmt: skip

    async def _work(self, waiting: Iterator[_Drawn]) -> None:
        for answer in waiting:
            order = self._in_order(answer.category)
            judge = self._judge_of(order, answer.model)
            if time.monotonic() > self._until:
                self._leave(f"not all were judged within {LONGEST_SECONDS:g} s")
            elif judge is None:
                self._leave(f"{answer.category}: no third model is in use that could judge {answer.model}")
            else:
                await self._compare(answer, order[0], judge)

    def _in_order(self, category: str) -> list[str]:
        """The models that are used in the category, the best first; not those on probation."""
        places = self._roster.places.get(category, {})
        active = {name for name, model in self._roster.models.items() if model.state == "active"}
        return sorted(active & set(places), key=lambda name: (places[name], name))

    def _judge_of(self, order: Sequence[str], judged: str) -> str | None:
        wanted = [name for name in self._settings.models if name in self._roster.models] or order
        return next((name for name in wanted if name not in (judged, *order[:1])), None) if order else None

    def _leave(self, why: str) -> None:
        self._tally.unasked += 1
        self._tally.notes[why] = None

    async def _compare(self, answer: _Drawn, opponent: str, judge: str) -> None:
        aside = CALLS_AN_ANSWER, self._most_usd(answer, opponent, judge)
        if not self._budget.set_aside(*aside):
            self._leave("the budget of this period is used up (judging.calls, judging.cost_usd)")
            return
        calls: list[tuple[DirectResult, str]] = []
        try:
            if await self._take(answer, opponent, judge, aside):
                await self._ask(answer, opponent, judge, calls)
                spent = self._spent(calls)
                keep = "UPDATE judgements SET calls = $2, cost = $3 WHERE call_id = $1"
                await fetch(self._caller.pool, keep, answer.call_id, *spent)
        finally:
            self._budget.account(aside, *self._spent(calls))

    async def _take(self, answer: _Drawn, opponent: str, judge: str, most: tuple[int, float]) -> bool:
        """Write down that it is judged, and what that costs at most; False if somebody else does."""
        taken = await fetch_one(
            self._caller.pool,
            "INSERT INTO judgements (call_id, category, model, opponent, judge, note, calls, cost)"
            " VALUES ($1, $2, $3, $4, $5, 'begun', $6, $7) ON CONFLICT DO NOTHING RETURNING 1",
            answer.call_id, answer.category, answer.model, opponent, judge, *most,
        )  # fmt: skip
        return taken is not None

    async def _ask(
        self, answer: _Drawn, opponent: str, judge: str, calls: list[tuple[DirectResult, str]]
    ) -> None:
        other = await self._call(opponent, answer.prompt, answer.category, None)
        calls.append((other, opponent))
        if not _was_sent(other):  # nothing was asked: another night may
            await fetch(self._caller.pool, "DELETE FROM judgements WHERE call_id = $1", answer.call_id)
            self._leave(f"{opponent} could not be asked: {other.why}")
            return
        text = _answer_of(other)
        if text is None:
            await self._keep(answer, Judgement(None, None), f"{opponent} did not answer: {other.why}")
            return
        said = await asyncio.gather(
            *(self._call(judge, prompt, answer.category, VERDICT_TOKENS)
              for prompt in judge_prompts(answer.prompt, answer.answer, text))
        )  # fmt: skip
        calls.extend((called, judge) for called in said)
        straight, swapped = (parse_verdict(_answer_of(called) or "") for called in said)
        trouble = next((called.why for called in said if called.why), "no verdict in what it said")
        judgement = Judgement(straight, swapped)
        await self._keep(answer, judgement, None if judgement.result else f"{judge}: {trouble}")

    async def _call(self, model: str, prompt: str, category: str, max_tokens: int | None) -> DirectResult:
        return await self._caller.call(
            self._roster.models[model], prompt, category=category, purpose="judge", max_tokens=max_tokens,
            timeout_seconds=PATIENCE_SECONDS,
        )  # fmt: skip

    async def _keep(self, answer: _Drawn, judgement: Judgement, note: str | None) -> None:
        result, scores = judgement.result, judgement.scores
        if result is None:
            self._tally.unread += 1
        else:
            self._tally.results[result] += 1
            self._tally.decided_in.add(answer.category)
        await fetch(
            self._caller.pool, "SELECT record_judgment($1, $2, $3, $4, $5, $6)", answer.call_id,
            judgement.straight and judgement.straight.value, judgement.swapped and judgement.swapped.value,
            result and result.value, scores and scores[0], postgres_text(note),
        )  # fmt: skip

    async def _keep_measure(self, answer: _Drawn) -> None:
        """The first model's answer: a tie with itself."""
        if await self._take(answer, answer.model, answer.model, (0, 0.0)):
            tie = Judgement(Verdict.TIE, Verdict.TIE)
            scores = tie.scores
            await fetch(
                self._caller.pool, "SELECT record_judgment($1, 'tie', 'tie', 'tie', $2, $3)", answer.call_id,
                scores and scores[0], "the measure of its category",
            )  # fmt: skip

    def _most_usd(self, answer: _Drawn, opponent: str, judge: str) -> float:
        """What judging this answer can cost, counted high: as if each byte were a token."""
        of_opponent = self._roster.models[opponent].max_tokens
        shown = len((answer.prompt + answer.answer)[: 2 * JUDGED_CHARACTERS].encode()) + JUDGED_CHARACTERS
        return self._price(opponent, len(answer.prompt.encode()), of_opponent) + 2 * self._price(
            judge, shown, VERDICT_TOKENS
        )

    def _spent(self, calls: Sequence[tuple[DirectResult, str]]) -> tuple[int, float]:
        """Calls that were sent, and USD."""
        sent = [(called, model) for called, model in calls if _was_sent(called)]
        return len(sent), sum(self._usd(called, model) for called, model in sent)

    def _usd(self, called: DirectResult, model: str) -> float:
        """What a call cost: as the backend says, else by its tokens."""
        result = called.result
        if result is None or result.cost_usd is not None:
            return called.cost_usd or 0.0
        return self._price(model, result.prompt_tokens or 0, result.completion_tokens or 0)

    def _price(self, model: str, prompt_tokens: int, completion_tokens: int) -> float:
        of_prompt, of_answer = self._prices.get(model, (0.0, 0.0))
        return (prompt_tokens * of_prompt + completion_tokens * of_answer) / MILLION


def _was_sent(called: DirectResult) -> bool:
    return called.result is not None and called.result.outcome is not Outcome.UNSENT


def _answer_of(called: DirectResult) -> str | None:
    result = called.result
    return result.answer if result is not None and result.outcome is Outcome.ANSWERED else None
