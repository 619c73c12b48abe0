"""Trials: candidates and the incumbent answer the same held-back prompts, and their answers are graded.

All categories run at the same time. Each model gets a few prompts concurrently, those of its categories in
turn, through the limiter and the Models Backend; each call is logged. Answers are graded by cheap checks,
against the reference if the prompt has one, and else by a judge that is neither of the two. `comparison`
decides on the grades.
"""

from __future__ import annotations

import dataclasses
import itertools
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from router.discovery.comparison import TrialCall, could_win, has_failed
from router.discovery.progress import Role, SearchProgress
from router.discovery.trial_prompts import TrialPrompt
from router.learning import Budget, PricedModel, against_reference, check, compare, gather_or_cancel
from router.models import DirectCaller
from router.settings import LearningSettings, TrialSettings

_T = TypeVar("_T")


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
    """Calls of one candidate and of the incumbent in the order of the prompts; the candidate's grades.

    `elsewhere` are the candidate's calls for other categories in this search.
    """

    model: PricedModel
    candidate: tuple[TrialCall, ...]
    incumbent: tuple[TrialCall, ...]
    grades: tuple[Grade, ...]
    elsewhere: tuple[TrialCall, ...] = ()


@dataclass(frozen=True, slots=True)
class TrialSetup:
    """The trials of a category. The judges take turns; none of them is the incumbent."""

    category: str
    incumbent: PricedModel
    judges: tuple[PricedModel, ...]
    prompts: tuple[TrialPrompt, ...]
    candidates: tuple[PricedModel, ...]

    @property
    def models(self) -> tuple[PricedModel, ...]:
        return (self.incumbent, *self.candidates)


@dataclass(frozen=True, slots=True)
class _Trials:
    """What all calls of a search share."""

    caller: DirectCaller
    settings: TrialSettings
    learning: LearningSettings
    budget: Budget
    progress: SearchProgress
    answers: Mapping[tuple[str, str], list[_Answer]]  # (category, model)

    def of_model(self, model: str) -> Iterator[_Answer]:
        """The model's answers for all categories."""
        return itertools.chain.from_iterable(
            answers for (_, name), answers in self.answers.items() if name == model
        )


async def run_trials(
    caller: DirectCaller,
    setups: Sequence[TrialSetup],
    *,
    settings: TrialSettings,
    learning: LearningSettings,
    budget: Budget,
    progress: SearchProgress,
) -> Mapping[str, Mapping[str, CandidateTrial]]:
    """Sends all prompts of each category to its candidates and its incumbent; has their answers judged.

    Returns category -> model -> trial. Calls beyond the budget and calls without a permit in time have no
    outcome. Raises DatabaseError if a call cannot be logged.
    """
    trials = _Trials(
        caller, settings, learning, budget, progress,
        {(setup.category, model.name): [_Answer() for _ in setup.prompts]
         for setup in setups for model in setup.models},
    )  # fmt: skip
    of_model: dict[str, list[tuple[TrialSetup, PricedModel]]] = {}
    for setup in setups:
        for model in setup.models:
            of_model.setdefault(model.name, []).append((setup, model))
            role: Role = "incumbent" if model is setup.incumbent else "candidate"
            progress.expect(setup.category, model.name, role, len(setup.prompts))
    progress.enter(
        f"calling {len(of_model)} models with the trial prompts of {', '.join(s.category for s in setups)}"
    )
    await gather_or_cancel(*(_call_model(trials, works) for works in of_model.values()), name="router trial")
    progress.enter("judging pairs of answers")
    judged = await gather_or_cancel(*(_judged(trials, setup) for setup in setups), name="router judging")
    return {setup.category: of_category for setup, of_category in zip(setups, judged, strict=True)}


async def _call_model(trials: _Trials, works: Sequence[tuple[TrialSetup, PricedModel]]) -> None:
    """Sends one model the prompts of its categories in turn; stops if none of the first calls succeeds."""
    name = works[0][1].name
    prompts = _in_turn(
        [(setup, model, number) for number in range(len(setup.prompts))] for setup, model in works
    )

    async def work() -> None:
        for setup, model, number in prompts:  # shared by the workers: each prompt is sent once
            if trials.budget.is_empty:
                return
            answer = await _ask(trials, setup, model, setup.prompts[number])
            trials.answers[setup.category, name][number] = answer
            trials.progress.called(setup.category, name, answered=answer.call.answered)
            if has_failed([answer.call for answer in trials.of_model(name)]):
                raise _TrialEnded

    try:
        await gather_or_cancel(
            *(work() for _ in range(trials.settings.max_concurrency)), name=f"router trial of {name}"
        )
    except _TrialEnded:
        for setup, _ in works:
            trials.progress.stop(setup.category, name)


class _TrialEnded(Exception):  # noqa: N818 - not an error of the trial
    """Cancels the calls in flight, since their answers would not change the verdict."""


def _in_turn(works: Iterable[Sequence[_T]]) -> Iterator[_T]:
    """One item of each sequence in turn."""
    for items in itertools.zip_longest(*works):
        yield from (item for item in items if item is not None)


async def _ask(trials: _Trials, setup: TrialSetup, model: PricedModel, prompt: TrialPrompt) -> _Answer:
    settings, target = trials.settings, model.model.default_target
    if model is not setup.incumbent:
        target = settings.target
    called = await trials.caller.call(
        dataclasses.replace(model.model, default_target=target), prompt.prompt, category=setup.category,
        purpose="trial", max_tokens=settings.max_tokens, timeout_seconds=settings.timeout_seconds,
    )  # fmt: skip
    if called.result is None:
        return _Answer(TrialCall(error=called.why))
    result, cost = called.result, model.cost(called)
    trials.budget.spend(cost)
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


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two answers to a prompt without a reference."""

    number: int
    prompt: str
    own: _Answer
    incumbent: _Answer


async def _judged(trials: _Trials, setup: TrialSetup) -> dict[str, CandidateTrial]:
    """Has the answers of each candidate judged; returns model -> trial."""
    found = await gather_or_cancel(
        *(_trial(trials, setup, candidate) for candidate in setup.candidates),
        name=f"router judging for {setup.category}",
    )
    return {trial.model.name: trial for trial in found}


async def _trial(trials: _Trials, setup: TrialSetup, candidate: PricedModel) -> CandidateTrial:
    own = trials.answers[setup.category, candidate.name]
    # A copy: the judges' grades of a pair are of this pair only.
    incumbent = [
        dataclasses.replace(answer, grades=[])
        for answer in trials.answers[setup.category, setup.incumbent.name]
    ]
    elsewhere = tuple(
        answer.call
        for (category, model), answers in trials.answers.items()
        if model == candidate.name and category != setup.category
        for answer in answers
    )
    pairs = _pairs(setup, own, incumbent)[: trials.settings.judged]
    if could_win(
        *_calls(own, incumbent), [pair.number for pair in pairs],
        utility=trials.learning.utility_of(setup.category), sources=trials.learning.grading.sources,
        settings=trials.settings, elsewhere=elsewhere,
    ):  # fmt: skip
        await _judge(trials, setup, candidate, pairs)
    grades = tuple(grade for answer in own for grade in answer.grades)
    return CandidateTrial(candidate, *_calls(own, incumbent), grades, elsewhere)


def _calls(
    own: Sequence[_Answer], incumbent: Sequence[_Answer]
) -> tuple[tuple[TrialCall, ...], tuple[TrialCall, ...]]:
    return tuple(answer.call for answer in own), tuple(answer.call for answer in incumbent)


def _pairs(setup: TrialSetup, own: Sequence[_Answer], incumbent: Sequence[_Answer]) -> list[_Pair]:
    return [
        _Pair(number, prompt.prompt, one, other)
        for number, (prompt, one, other) in enumerate(zip(setup.prompts, own, incumbent, strict=True))
        if prompt.reference is None and one.call.answered and other.call.answered
    ]


async def _judge(trials: _Trials, setup: TrialSetup, candidate: PricedModel, pairs: Sequence[_Pair]) -> None:
    """Has the judges compare the pairs, each its share."""
    workers = -(-trials.settings.max_concurrency // 2)  # each has two calls in flight

    async def work(judge: PricedModel, waiting: Iterator[_Pair]) -> None:
        for pair in waiting:
            if trials.budget.is_empty:
                return
            compared = await compare(
                trials.caller, judge.model, setup.category, pair.prompt, (pair.own.text, pair.incumbent.text),
                timeout_seconds=trials.settings.timeout_seconds,
            )  # fmt: skip
            for called in compared.calls:
                trials.budget.spend(judge.cost(called))
            scores = compared.judgment.scores
            if scores is not None:
                pair.own.grade("judge", scores[0], by=judge.name)
                pair.incumbent.grade("judge", scores[1], by=judge.name)
                trials.progress.judged(setup.category, candidate.name)

    shares = [(judge, iter(pairs[at :: len(setup.judges)])) for at, judge in enumerate(setup.judges)]
    await gather_or_cancel(
        *(work(judge, share) for judge, share in shares for _ in range(workers)),
        name=f"router judges for {setup.category}",
    )
