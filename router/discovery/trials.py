"""Trials: candidates and the incumbent answer the same held-back prompts, and their answers are graded.

Each model is asked a few prompts at once, through the limiter and the Models Backend, each call in the log.
Answers are graded by cheap checks, against the reference where a prompt has one, and else by a judging model
that is neither of the two. What the grades mean is decided in `trial_result`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import uuid
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from router.background import cancel_and_wait
from router.discovery.comparison import TrialCall, is_enough
from router.discovery.trial_prompts import TrialPrompt
from router.learning import Judgement, against_reference, check, judge_prompts, parse_verdict
from router.models import DirectCaller, DirectResult, RosterModel
from router.settings import TrialSettings

JUDGE_TOKENS = 300
MILLION = 1e6


@dataclass(frozen=True, slots=True)
class TrialModel:
    """A model in a trial; prices in USD a million tokens, for what the backend gives no cost of."""

    model: RosterModel
    input_price: float = 0.0
    output_price: float = 0.0

    @property
    def name(self) -> str:
        return self.model.model


@dataclass(slots=True)
class Budget:
    """What trials may still cost, in USD. A call that is under way is finished."""

    left_usd: float

    def pay(self, cost_usd: float) -> None:
        """Take the cost of a call out."""
        self.left_usd -= cost_usd

    @property
    def is_empty(self) -> bool:
        return self.left_usd <= 0


@dataclass(frozen=True, slots=True)
class Grade:
    """One score of one call, as `call_scores` keeps it."""

    call_id: uuid.UUID
    source: str
    score: float
    reasons: tuple[str, ...] = ()
    scored_by: str | None = None


@dataclass(slots=True)
class _Answer:
    """What one model said to one prompt."""

    call: TrialCall = field(default_factory=TrialCall)
    call_id: uuid.UUID | None = None
    text: str = ""
    grades: list[Grade] = field(default_factory=list)

    def grade(self, source: str, score: float, reasons: Sequence[str] = (), by: str | None = None) -> None:
        assert self.call_id is not None
        self.grades.append(Grade(self.call_id, source, score, tuple(reasons), by))
        self.call = dataclasses.replace(self.call, grades={**self.call.grades, source: score})


@dataclass(frozen=True, slots=True)
class CandidateTrial:
    """One candidate's calls beside the incumbent's, prompt by prompt; `grades` are the candidate's."""

    contender: TrialModel
    candidate: tuple[TrialCall, ...]
    incumbent: tuple[TrialCall, ...]
    grades: tuple[Grade, ...]


@dataclass(frozen=True, slots=True)
class TrialSetup:
    """Where a category's trial takes place: with whom, on which prompts, by which rules."""

    category: str
    incumbent: TrialModel
    judge: TrialModel | None
    prompts: tuple[TrialPrompt, ...]
    settings: TrialSettings
    purse: Budget


async def run_trial(
    caller: DirectCaller, bench: TrialSetup, candidates: Sequence[TrialModel]
) -> Mapping[str, CandidateTrial]:
    """Ask all of them all prompts, the incumbent once. DatabaseError if a call cannot be logged.

    Calls that the purse does not pay for, or that got no permit in time, are there without an outcome.
    """
    everybody = [bench.incumbent, *candidates]
    said = await _together(
        *(_answers(caller, bench, one) for one in everybody), name=f"router trial for {bench.category}"
    )
    incumbent = said[0]
    trials = {}
    for candidate, answers in zip(candidates, said[1:], strict=True):
        theirs = [dataclasses.replace(answer, grades=[]) for answer in incumbent]
        if bench.judge is not None:
            await _judge(caller, bench, bench.judge, answers, theirs)
        trials[candidate.name] = CandidateTrial(
            candidate,
            tuple(answer.call for answer in answers),
            tuple(answer.call for answer in theirs),
            tuple(grade for answer in answers for grade in answer.grades),
        )
    return trials


async def _answers(caller: DirectCaller, bench: TrialSetup, one: TrialModel) -> list[_Answer]:
    """The model's answers in the order of the prompts; a hopeless model is not asked all of them."""
    answers = [_Answer() for _ in bench.prompts]
    numbers = iter(range(len(bench.prompts)))

    async def go_on() -> None:
        for number in numbers:  # each number is taken by one of those who go on at once
            if bench.purse.is_empty:
                return
            answers[number] = await _ask(caller, bench, one, bench.prompts[number])
            if is_enough([answer.call for answer in answers]):
                raise _EnoughSeen

    with contextlib.suppress(_EnoughSeen):
        await _together(
            *(go_on() for _ in range(bench.settings.max_concurrency)), name=f"router trial of {one.name}"
        )
    return answers


class _EnoughSeen(Exception):  # noqa: N818 - nothing is wrong with the trial
    """The model is hopeless; what is still asked of it is given up."""


async def _ask(caller: DirectCaller, bench: TrialSetup, one: TrialModel, prompt: TrialPrompt) -> _Answer:
    settings = bench.settings
    called = await caller.call(
        one.model, prompt.prompt, category=bench.category, purpose="trial", max_tokens=settings.max_tokens,
        timeout_seconds=settings.timeout_seconds,
    )  # fmt: skip
    if called.result is None:
        return _Answer(TrialCall(error=called.why))
    result, cost = called.result, _cost(called, one)
    bench.purse.pay(cost)
    call = TrialCall(result.outcome, {}, called.seconds, cost, result.error)
    answer = _Answer(call, called.call_id, result.answer or "")
    if call.answered:
        limit = min(settings.max_tokens, one.model.max_tokens)
        checked = check(
            prompt.prompt, answer.text, completion_tokens=result.completion_tokens, max_tokens=limit
        )
        answer.grade("check", checked.score, [flaw.value for flaw in checked.flaws])
        if prompt.reference is not None:
            answer.grade("reference", against_reference(answer.text, prompt.reference).score)
    return answer


def _cost(called: DirectResult, one: TrialModel) -> float:
    """What the backend says that the call cost; where it says nothing, by the model's prices."""
    if called.cost_usd or called.result is None:
        return called.cost_usd or 0.0
    prompt_tokens, answer_tokens = called.result.prompt_tokens or 0, called.result.completion_tokens or 0
    return (prompt_tokens * one.input_price + answer_tokens * one.output_price) / MILLION


async def _judge(
    caller: DirectCaller,
    bench: TrialSetup,
    judge: TrialModel,
    answers: Sequence[_Answer],
    theirs: Sequence[_Answer],
) -> None:
    """Have pairs of answers compared for which no reference tells which is right, in both orders."""
    pairs = [
        (prompt, one, other)
        for prompt, one, other in zip(bench.prompts, answers, theirs, strict=True)
        if prompt.reference is None and one.call.answered and other.call.answered
    ]
    waiting = iter(itertools.islice(pairs, bench.settings.judged))

    async def go_on() -> None:
        for prompt, one, other in waiting:
            if bench.purse.is_empty:
                return
            questions = judge_prompts(prompt.prompt, one.text, other.text)
            verdicts = [parse_verdict(await _asked(caller, bench, judge, question)) for question in questions]
            scores = Judgement(*verdicts).scores
            if scores is not None:
                one.grade("judge", scores[0], by=judge.name)
                other.grade("judge", scores[1], by=judge.name)

    await _together(
        *(go_on() for _ in range(bench.settings.max_concurrency)), name=f"router judge {judge.name}"
    )


async def _asked(caller: DirectCaller, bench: TrialSetup, judge: TrialModel, question: str) -> str:
    called = await caller.call(
        judge.model, question, category=bench.category, purpose="judge", max_tokens=JUDGE_TOKENS,
        timeout_seconds=bench.settings.timeout_seconds,
    )  # fmt: skip
    bench.purse.pay(_cost(called, judge))
    return (called.result.answer or "") if called.result is not None else ""


async def _together(*works: Coroutine[Any, Any, Any], name: str) -> list[Any]:
    """What all of them come to; if one fails the others are ended first."""
    tasks = [asyncio.create_task(work, name=f"{name} {number}") for number, work in enumerate(works)]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await cancel_and_wait(*tasks)
