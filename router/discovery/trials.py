"""Trials: candidates and the incumbent answer the same held-back prompts, and their answers are graded.

Each model gets a few prompts concurrently, through the limiter and the Models Backend; each call is logged.
Answers are graded by cheap checks, against the reference if the prompt has one, and else by a judge that is
neither of the two. `comparison` decides on the grades.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from router.discovery.comparison import TrialCall, has_failed
from router.discovery.trial_prompts import TrialPrompt
from router.learning import Budget, PricedModel, against_reference, check, compare, gather_or_cancel
from router.models import DirectCaller
from router.settings import TrialSettings


@dataclass(frozen=True, slots=True)
class Grade:
    """One score of one call, as stored in `call_scores`."""

    call_id: uuid.UUID
    source: str
    score: float
    reasons: tuple[str, ...] = ()
    scored_by: str | None = None


@dataclass(slots=True)
class _Answer:
    """One model's answer to one prompt, with its grades."""

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
    """Calls of one candidate and of the incumbent in the order of the prompts; the candidate's grades."""

    model: PricedModel
    candidate: tuple[TrialCall, ...]
    incumbent: tuple[TrialCall, ...]
    grades: tuple[Grade, ...]


@dataclass(frozen=True, slots=True)
class TrialSetup:
    """The setup of a category's trial."""

    category: str
    incumbent: PricedModel
    judge: PricedModel | None
    prompts: tuple[TrialPrompt, ...]
    settings: TrialSettings
    budget: Budget


async def run_trial(
    caller: DirectCaller, setup: TrialSetup, candidates: Sequence[PricedModel]
) -> Mapping[str, CandidateTrial]:
    """Sends all prompts to each candidate, and once to the incumbent.

    Calls beyond the budget and calls without a permit in time have no outcome. Raises DatabaseError if a call
    cannot be logged.
    """
    answers_of_all = await gather_or_cancel(
        *(_answers(caller, setup, model) for model in (setup.incumbent, *candidates)),
        name=f"router trial for {setup.category}",
    )
    trials = {}
    for candidate, answers in zip(candidates, answers_of_all[1:], strict=True):
        of_incumbent = [dataclasses.replace(answer, grades=[]) for answer in answers_of_all[0]]
        if setup.judge is not None:
            await _judge(caller, setup, setup.judge, answers, of_incumbent)
        trials[candidate.name] = CandidateTrial(
            candidate,
            tuple(answer.call for answer in answers),
            tuple(answer.call for answer in of_incumbent),
            tuple(grade for answer in answers for grade in answer.grades),
        )
    return trials


async def _answers(caller: DirectCaller, setup: TrialSetup, model: PricedModel) -> list[_Answer]:
    """The model's answers in the order of the prompts; stops early if none of the first calls succeeds."""
    answers = [_Answer() for _ in setup.prompts]
    numbers = iter(range(len(setup.prompts)))

    async def work() -> None:
        for number in numbers:  # shared by the workers: each prompt is sent once
            if setup.budget.is_empty:
                return
            answers[number] = await _ask(caller, setup, model, setup.prompts[number])
            if has_failed([answer.call for answer in answers]):
                raise _TrialEnded

    with contextlib.suppress(_TrialEnded):
        await gather_or_cancel(
            *(work() for _ in range(setup.settings.max_concurrency)), name=f"router trial of {model.name}"
        )
    return answers


class _TrialEnded(Exception):  # noqa: N818 - not an error of the trial
    """Cancels the calls in flight, since their answers would not change the verdict."""


async def _ask(caller: DirectCaller, setup: TrialSetup, model: PricedModel, prompt: TrialPrompt) -> _Answer:
    settings = setup.settings
    called = await caller.call(
        model.model, prompt.prompt, category=setup.category, purpose="trial", max_tokens=settings.max_tokens,
        timeout_seconds=settings.timeout_seconds,
    )  # fmt: skip
    if called.result is None:
        return _Answer(TrialCall(error=called.why))
    result, cost = called.result, model.cost(called)
    setup.budget.spend(cost)
    call = TrialCall(result.outcome, {}, called.seconds, cost, result.error)
    answer = _Answer(call, called.call_id, result.answer or "")
    if call.answered:
        limit = min(settings.max_tokens, model.model.max_tokens)
        checked = check(
            prompt.prompt, answer.text, completion_tokens=result.completion_tokens, max_tokens=limit
        )
        answer.grade("check", checked.score, [flaw.value for flaw in checked.flaws])
        if prompt.reference is not None:
            answer.grade("reference", against_reference(answer.text, prompt.reference).score)
    return answer


async def _judge(
    caller: DirectCaller,
    setup: TrialSetup,
    judge: PricedModel,
    answers: Sequence[_Answer],
    of_incumbent: Sequence[_Answer],
) -> None:
    """Judges pairs of answers to prompts without a reference, as many as `settings.judged`."""
    pairs = [
        (prompt, one, other)
        for prompt, one, other in zip(setup.prompts, answers, of_incumbent, strict=True)
        if prompt.reference is None and one.call.answered and other.call.answered
    ]
    waiting = iter(itertools.islice(pairs, setup.settings.judged))

    async def work() -> None:
        for prompt, one, other in waiting:
            if setup.budget.is_empty:
                return
            compared = await compare(
                caller, judge.model, setup.category, prompt.prompt, (one.text, other.text),
                timeout_seconds=setup.settings.timeout_seconds,
            )  # fmt: skip
            for called in compared.calls:
                setup.budget.spend(judge.cost(called))
            scores = compared.judgment.scores
            if scores is not None:
                one.grade("judge", scores[0], by=judge.name)
                other.grade("judge", scores[1], by=judge.name)

    workers = -(-setup.settings.max_concurrency // 2)  # each has two calls in flight
    await gather_or_cancel(*(work() for _ in range(workers)), name=f"router judge {judge.name}")
